"""Data that is not there, to be told beside what is wrong with the configuration.

A run that can start opens all of its sources and says more of them; here nothing is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megastage.config.stage import Stage


def absent_sources(stages: Sequence[Stage]) -> list[str]:
    """One line for each local folder or file that a stage would read and that is missing or empty."""
    found: dict[str, str] = {}
    for stage in stages:
        if stage.never_runs:
            continue
        for number, source in enumerate(stage.sources):
            what = _wrong(source, named=stage.dataset_type == "huggingface")
            if what:
                key = f"dataset_folders[{number}]" if stage.dataset_folders else "dataset_path"
                found.setdefault(source, f"stage {stage.index + 1} {stage.name!r}, {key}: {source}: {what}")
    return list(found.values())


def _wrong(source: str, *, named: bool) -> str | None:
    """Why there is nothing to read at `source`; named: it may be a data set's name and no path."""
    if "://" in source or not source or (named and not source.startswith((".", "/", "~"))):
        return None
    path = Path(source)
    try:
        if not path.exists():
            return "no such file or folder"
        return "an empty folder" if path.is_dir() and not any(path.iterdir()) else None
    except OSError as error:
        return f"can't be read ({error.strerror})"
