"""The final weights as a Hugging Face folder, from any layout: whole parameters pass through rank 0 one at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megastage.build import Model
from megastage.checkpoint.agreement import Ranks
from megastage.checkpoint.hf import export_hf, unfinished
from megastage.config.layout import pipeline_layers
from megastage.config.schema import Config
from megastage.data.tokenizer import Tokenizer
from megastage.logs import log
from megastage.model.parameters import parameter_shapes
from megastage.parallel.data import DTYPES
from megastage.parallel.mesh import Mesh
from megastage.parallel.placement import whole_tensor
from megastage.runtime import LONG_S, Runtime
from megastage.stages import Stage

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip


def exists(path: str, rt: Runtime) -> bool:
    """Whether rank 0 sees something at `path`. Collective."""
    return Ranks(rt.control).broadcast(Path(path).exists() if rt.is_main else None)


def refuse_existing(cfg: Config, rt: Runtime) -> None:
    """Before training: raise ValueError (on all ranks) where checkpoint.export would overwrite. Collective."""
    path = cfg.checkpoint.export
    if path is not None and exists(path, rt):
        raise ValueError(f"checkpoint.export = {path!r}: exists already; name a new folder, or remove this one")


def set_aside(folder: Path, rt: Runtime) -> None:
    """Rename what an earlier end of the run left at `folder` to FOLDER.superseded-K. Collective."""
    error = None
    if rt.is_main and folder.exists():
        number = 1
        while (target := folder.with_name(f"{folder.name}.superseded-{number}")).exists():
            number += 1
        try:
            folder.rename(target)
        except OSError as caught:
            error = caught
    Ranks(rt.control).agree(error)


def write(
    cfg: Config, rt: Runtime, mesh: Mesh, model: Model, stage: Stage, folder: Path, tokenizer: Tokenizer | None
) -> None:
    """Write config.json and safetensors with the RoPE and length of `stage`, in checkpoint.export_dtype, and the
    tokenizer's files. Collective.

    Raises ValueError or CheckpointFailed on every rank when rank 0 cannot write.
    """
    rt.set_timeout(LONG_S)  # the others wait for rank 0 to write
    shapes = parameter_shapes(model.cfg)
    dtype = DTYPES[cfg.checkpoint.export_dtype]
    parts = pipeline_layers(cfg, model.cfg.n_layers)
    stream = _whole_parameters(list(shapes), parts, rt, mesh, model, dtype)
    error: BaseException | None = None
    if rt.is_main:

        def read(name: str) -> Tensor:
            given, tensor = next(stream)
            assert given == name, (given, name)
            assert tensor is not None
            return tensor

        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _clear_half_done(folder)
            export_hf(
                folder, replace(model.cfg, rope=stage.rope), read, dtype=dtype, max_positions=stage.seq_len,
                eos_id=None if tokenizer is None else tokenizer.eos_id,
                beside=tokenizer_files(cfg.model.hf_assets_path, tokenizer),
            )  # fmt: skip
        except Exception as caught:
            error = caught
    for _ in stream:  # ranks that do not write take part in gathering, also when rank 0 gave up half-way
        pass
    Ranks(rt.control).agree(error)
    log.info("Exported the weights to %s (%s)", folder, cfg.checkpoint.export_dtype)


def _clear_half_done(folder: Path) -> None:
    """Remove what a run killed while it exported has left, or none that goes on from there could end."""
    work = unfinished(folder)
    if work.exists():
        shutil.rmtree(work)
        log.info("%s was left half-done by an earlier run: removed", work)


def tokenizer_files(path: str | None, tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """What `transformers.AutoTokenizer` reads, by name: the files at `path`, and made where absent a tokenizer.json and
    a tokenizer_config.json, without which it would split text as the model's first makers did.
    """
    if path is None or tokenizer is None:
        return {}
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    files = {name: (folder / name).read_bytes() for name in _TOKENIZER_FILES if (folder / name).is_file()}
    made = tokenizer.to_json()
    if made is not None:
        eos = {} if tokenizer.eos_id is None else {"eos_token": tokenizer.decode([tokenizer.eos_id])}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **eos}
        files.setdefault("tokenizer.json", made)
        files.setdefault("tokenizer_config.json", json.dumps(settings, indent=2).encode())
    return files


def _whole_parameters(
    names: list[str], parts: list[range], rt: Runtime, mesh: Mesh, model: Model, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor | None]]:
    """(name, the whole parameter on rank 0, None elsewhere), for every name in turn; all ranks iterate together."""
    ranks = mesh.root.mesh.flatten(1)  # [pp, ranks of a part]
    for name in names:
        part = _owner(name, parts)
        leader = int(ranks[part, 0])
        whole = None
        if mesh.pp_rank == part:
            parameter = model.parameters[name].detach()
            whole = (whole_tensor(parameter) if isinstance(parameter, DTensor) else parameter).to(dtype).cpu()
        if leader != 0 and rt.rank == leader:
            assert whole is not None
            dist.send(whole.contiguous(), 0, group=rt.control)
        if leader != 0 and rt.is_main:
            whole = torch.empty(parameter_shapes(model.cfg)[name], dtype=dtype)
            dist.recv(whole, leader, group=rt.control)
        yield name, whole if rt.is_main else None


def _owner(name: str, parts: list[range]) -> int:
    """The pipeline part that holds a parameter; the first for a tied table, which the last holds too."""
    if name.startswith("layers."):
        return next(i for i, layers in enumerate(parts) if int(name.split(".")[1]) in layers)
    return 0 if name.startswith("tok_embeddings") else len(parts) - 1
