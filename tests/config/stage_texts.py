"""Configurations with stages, written short, and their resolution."""

from __future__ import annotations

from megastage.config.layout import resolve_layout
from megastage.config.schema import Config
from megastage.stages import Stage, resolve_stages

STAGES = '[training]\ndataset_type = "nanoset"\ndataset_folders = ["/a", "/b"]\nsteps = 100\n'


def table(name: str, start: int, *more: str) -> str:
    return "\n".join(["[[training.data_stages]]", f'name = "{name}"', f"start_step = {start}", *more, ""])


def resolve(cfg: Config, world_size: int = 1, **more: int) -> tuple[Stage, ...]:
    return resolve_stages(cfg, resolve_layout(cfg, world_size), **{"seed": 1, **more})
