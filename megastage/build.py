"""From a configuration to this rank's part of the model: on the meta device, split, sharded, materialised, seeded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megastage import compiling, recompute
from megastage.config.layout import pipeline_layers
from megastage.config.schema import Config
from megastage.describe import reshards
from megastage.kernels import dispatch
from megastage.loss import ModelPart
from megastage.model.config import ModelConfig
from megastage.model.decoder import Decoder
from megastage.model.ops import MODEL_OPS, Ops
from megastage.parallel import data, tensor
from megastage.parallel.context import ContextGroup
from megastage.parallel.mesh import Mesh
from megastage.parallel.pipeline import LoopRunner, PipelineRunner, Runner
from megastage.parallel.tied import TiedEmbedding, find_tied
from megastage.stages import Stage


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

    def tensors(self) -> dict[str, Tensor]:
        """`model.<name>` -> parameter, as checkpoints key them."""
        return {f"model.{name}": parameter for name, parameter in self.parameters.items()}

    def owned(self) -> dict[str, nn.Parameter]:
        """Parameters without the copy of a tied weight that another part counts and saves."""
        return {name: p for name, p in self.parameters.items() if name not in self.tied.counted_elsewhere}


def model_ops(cfg: Config) -> Ops:
    """The operations of the decoder with the back ends that [kernels] names."""
    return Ops.from_backends({name: getattr(cfg.kernels, name) for name in MODEL_OPS})


def describe_kernels(cfg: Config, device: torch.device) -> str:
    """What each operation runs on, for the log."""
    return "\n".join(dispatch.describe(cfg.kernels.model_dump(), device))


def build_model(cfg: Config, model_cfg: ModelConfig, mesh: Mesh, device: torch.device) -> Model:
    """Make this rank's part: every parameter a DTensor on (data, tp), materialised but not yet filled."""
    layers = pipeline_layers(cfg, model_cfg.n_layers)[mesh.pp_rank]
    dtype = data.DTYPES[cfg.training.dtype]
    with torch.device("meta"):
        decoder = Decoder(
            model_cfg,
            model_ops(cfg),
            layers=layers,
            has_embedding=mesh.pp_rank == 0,
            has_head=mesh.pp_rank == mesh.layout.pp - 1,
        ).to(dtype)
    tensor.apply(decoder, mesh.tp)
    part = ModelPart(
        decoder, mesh.group("tp"), cfg.kernels.linear_cross_entropy, not cfg.parallelism.disable_loss_parallel
    )
    data.shard(
        part,
        mesh.fsdp,
        param_dtype=cfg.training.mixed_precision_param,
        reduce_dtype=cfg.training.mixed_precision_reduce,
        reshard_after_forward=reshards(cfg, mesh.layout),
    )
    part.to_empty(device=device)
    return Model(model_cfg, part, dict(decoder.named_parameters()), find_tied(model_cfg.tied_embeddings, mesh))


def make_runner(cfg: Config, model: Model, mesh: Mesh, stage: Stage, device: torch.device) -> Runner:
    """What runs a step's micro-batches in `stage`: a loop, or a pipeline schedule of the stage's shapes."""
    if mesh.layout.pp == 1:
        return LoopRunner(model.part, stage.micro_batch_size)
    return PipelineRunner(
        model.part,
        mesh.group("pp"),
        schedule=cfg.parallelism.pipeline_parallel_schedule,
        rows=stage.micro_batch_size,
        micro_batches=stage.micro_batches,
        seq_len=stage.seq_len // stage.context_parallel_degree,
        hidden_dtype=data.DTYPES[cfg.training.mixed_precision_param],
        device=device,
    )


def fit_to_stage(cfg: Config, model: Model, stage: Stage, context: ContextGroup) -> None:
    """Give the model the stage's RoPE table, attention over the ranks that share a row, and recomputation."""
    validated = cfg.validation.seq_len if cfg.validation.enable else 0
    model.decoder.set_rope(stage.rope, max(stage.seq_len, validated))
    model.decoder.set_ops(context.ops(model_ops(cfg)))
    mode, option = stage.recompute
    table = cfg.activation_checkpoint
    recompute.apply(
        model.decoder,
        mode,
        option,
        preserve_rng_state=table.preserve_rng_state,
        early_stop=table.early_stop,
        determinism_check=table.determinism_check,
        debug=table.debug,
    )
    compiling.apply(cfg, model.part, stage)
