"""From a configuration to this rank's part of the model: on the meta device, split, sharded, materialised, seeded."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from megastage import recompute
from megastage.config.schema import Config
from megastage.loss import ModelPart
from megastage.model.config import ModelConfig, RopeSpec
from megastage.model.decoder import Decoder
from megastage.model.flavors import get_flavor
from megastage.model.ops import MODEL_OPS, Ops
from megastage.parallel import data, tensor
from megastage.parallel.mesh import Mesh
from megastage.parallel.pipeline import LoopRunner, PipelineRunner, Runner, split_model
from megastage.parallel.placement import initialise
from megastage.parallel.tied import TiedEmbedding, find_tied
from megastage.stages import Stage, rope_spec

_OVERRIDES = tuple(field.name for field in fields(ModelConfig) if field.name not in ("name", "rope"))


def model_config(cfg: Config, tokenizer_vocab: int | None) -> ModelConfig:
    """The flavor that [model] names, with its overrides; without one for vocab_size, the tokenizer's where there is one."""
    base = get_flavor(cfg.model.name, cfg.model.flavor)
    chosen = {key: getattr(cfg.model, key) for key in _OVERRIDES if getattr(cfg.model, key) is not None}
    if "vocab_size" not in chosen and tokenizer_vocab is not None:
        chosen["vocab_size"] = tokenizer_vocab
    resized = replace(base, **chosen)
    if "head_dim" not in chosen and {"dim", "n_heads"} & chosen.keys():
        if resized.dim % resized.n_heads:
            raise ValueError(
                f"model.dim = {resized.dim} is not a multiple of model.n_heads = {resized.n_heads}: "
                "change one of them or set model.head_dim"
            )
        resized = replace(resized, head_dim=resized.dim // resized.n_heads)
    if resized.n_heads % resized.n_kv_heads:
        raise ValueError(
            f"model.n_heads = {resized.n_heads} is not a multiple of model.n_kv_heads = {resized.n_kv_heads}: "
            "every key/value head serves an equal number of query heads"
        )
    theta, scaling = cfg.model.rope_theta, cfg.model.rope_scaling
    return replace(resized, rope=rope_spec(theta, scaling, resized.rope))


@dataclass
class Model:
    """This rank's part. `parameters` maps checkpoint names to parameters."""

    cfg: ModelConfig
    part: ModelPart
    parameters: dict[str, nn.Parameter]
    tied: TiedEmbedding

    @property
    def decoder(self) -> Decoder:
        return self.part.decoder

    def owned(self) -> dict[str, nn.Parameter]:
        """Parameters without the copy of a tied weight that another part counts and saves."""
        return {name: p for name, p in self.parameters.items() if name not in self.tied.counted_elsewhere}


def build_model(cfg: Config, model_cfg: ModelConfig, mesh: Mesh, device: torch.device, seed: int) -> Model:
    """Make this rank's part, every parameter a DTensor on (data, tp), with the values that `seed` gives everywhere."""
    backends = {name: getattr(cfg.kernels, name) for name in MODEL_OPS}
    layers = split_model(cfg.parallelism, model_cfg.n_layers)[mesh.pp_rank]
    dtype = data.DTYPES[cfg.training.dtype]
    with torch.device("meta"):
        decoder = Decoder(
            model_cfg,
            Ops.from_backends(backends),
            layers=layers,
            has_embedding=mesh.pp_rank == 0,
            has_head=mesh.pp_rank == mesh.layout.pp - 1,
        ).to(dtype)
    tensor.apply(decoder, mesh.tp)
    part = ModelPart(decoder, mesh.group("tp"), cfg.kernels.linear_cross_entropy)
    reshard = cfg.parallelism.fsdp_reshard_after_forward
    data.shard(
        part,
        mesh.fsdp,
        param_dtype=cfg.training.mixed_precision_param,
        reduce_dtype=cfg.training.mixed_precision_reduce,
        reshard_after_forward=mesh.layout.pp == 1 if reshard == "default" else reshard == "always",
    )
    part.to_empty(device=device)
    initialise(decoder, model_cfg, seed)
    return Model(model_cfg, part, dict(decoder.named_parameters()), find_tied(model_cfg.tied_embeddings, mesh))


def make_runner(cfg: Config, model: Model, mesh: Mesh, stage: Stage, device: torch.device) -> Runner:
    """What runs a step's micro-batches in `stage`: a loop, or a pipeline schedule of the stage's shapes."""
    if mesh.layout.pp == 1:
        return LoopRunner(model.part, stage.local_batch_size)
    rows = cfg.parallelism.pipeline_parallel_microbatch_size
    per_rank = stage.global_batch_size // mesh.layout.data_ranks(stage.context_parallel_degree)
    return PipelineRunner(
        model.part,
        mesh.group("pp"),
        schedule=cfg.parallelism.pipeline_parallel_schedule,
        rows=rows,
        micro_batches=per_rank // rows,
        seq_len=stage.seq_len // stage.context_parallel_degree,
        hidden_dtype=data.DTYPES[cfg.training.mixed_precision_param],
        device=device,
    )


def fit_to_stage(cfg: Config, model: Model, stage: Stage) -> None:
    """Give the model the stage's RoPE table and recomputation."""
    rope: RopeSpec = stage.rope or model.cfg.rope
    model.decoder.set_rope(rope, stage.seq_len)
    mode, option = stage.recompute
    ac = cfg.activation_checkpoint
    recompute.apply(model.decoder, mode, option, preserve_rng_state=ac.preserve_rng_state, early_stop=ac.early_stop)
