"""The weights a run begins with: seeded, from another run's checkpoint, or from a Hugging Face folder."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megastage.build import Model
from megastage.checkpoint.hf import open_hf
from megastage.checkpoint.loading import load_initial
from megastage.config.schema import Config
from megastage.logs import log
from megastage.model.config import ModelConfig
from megastage.parallel.placement import initialise, local_window
from megastage.runtime import Runtime


def fill(cfg: Config, rt: Runtime, model: Model, seed: int) -> None:
    """Give this rank's shards their first values.

    checkpoint.initial_load_path names a checkpoint of this program, or with initial_load_in_hf a Hugging Face folder;
    without it the seed decides. Raises ValueError where the weights don't fit the model.
    """
    settings = cfg.checkpoint
    path = settings.initial_load_path
    if settings.initial_load_in_hf:
        folder = path or cfg.model.hf_assets_path
        if folder is None:
            raise ValueError(
                "checkpoint.initial_load_in_hf = true: set checkpoint.initial_load_path or model.hf_assets_path to the "
                "folder that holds config.json and *.safetensors"
            )
        _from_hugging_face(model, folder)
        log.info("Initial weights from %s (Hugging Face)", folder)
    elif path is not None:
        load_initial(path, model.tensors(), group=rt.checkpoint, model_only=True)
        log.info("Initial weights from %s", path)
    else:
        initialise(model.decoder, model.cfg, seed)


@torch.no_grad()
def _from_hugging_face(model: Model, path: str) -> None:
    """Copy this rank's window of each parameter; only the rows it holds are read."""
    try:
        folder = open_hf(path)
    except ValueError as error:
        raise ValueError(f"checkpoint.initial_load_in_hf: {error}") from error
    _require_equal(folder.cfg, model.cfg, path)
    for name, parameter in model.parameters.items():
        assert isinstance(parameter, DTensor)
        window = local_window(parameter)
        mine = (slice(None), *window[1:])
        local: Tensor = parameter.to_local()
        if local.numel():
            local.copy_(folder.read(name, window[0].start, window[0].stop)[mine])


def _require_equal(theirs: ModelConfig, ours: ModelConfig, path: str) -> None:
    problems = [
        f"{field.name} is {getattr(theirs, field.name)} in {path} and {getattr(ours, field.name)} in [model]"
        for field in fields(ModelConfig)
        if field.name not in ("name", "rope", "init_std") and getattr(theirs, field.name) != getattr(ours, field.name)
    ]
    if problems:
        raise ValueError(
            "checkpoint.initial_load_in_hf: the weights are of another model:\n  - " + "\n  - ".join(problems)
        )
    if theirs.rope != ours.rope:
        log.info("Note: the weights were trained with %s, [model] has %s", theirs.rope, ours.rope)
