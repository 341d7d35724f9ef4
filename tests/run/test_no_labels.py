"""An update none of whose labels counts: nothing to learn from, and nothing is changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import TINY, train, write_nanoset

pytestmark = pytest.mark.dist

RUN = """
[training]
dataset_type = "nanoset"
steps = 3
seq_len = 32
global_batch_size = 2
local_batch_size = 2
[[training.data_stages]]
name = "words"
start_step = 0
dataset_path = "{words}"
[[training.data_stages]]
name = "crumbs"
start_step = 1
dataset_path = "{crumbs}"
"""


def _crumbs(folder: Path) -> Path:
    """A nanoset whose documents are of one token each: no token has a successor to predict."""
    folder.mkdir()
    tokens = 4000
    np.arange(tokens, dtype="<u2").tofile(folder / "00000.ds")
    np.arange(1, tokens + 1, dtype="<u8").tofile(folder / "00000.ds.index")
    (folder / "00000.ds.metadata").write_text(f"tokenizer|2\n{tokens}\n4.0 K tokens\n")
    return folder


def test_weights_and_moments_stay_as_they_were(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text(RUN.format(words=write_nanoset(tmp_path / "words", 4000, 1), crumbs=_crumbs(tmp_path / "crumbs")))

    def run(name: str, steps: int) -> tuple[list[dict], dict[str, torch.Tensor]]:
        out = tmp_path / name
        flags = [
            "--training.steps",
            str(steps),
            "--checkpoint.export",
            str(out / "hf"),
            "--lr_scheduler.total_steps",
            "3",
        ]
        argv = ["--config", str(config), "--job.dump_folder", str(out), *TINY, "--model.vocab_size", "4096", *flags]
        return train(1, argv), load_file(out / "hf" / "model.safetensors")

    first, one = run("one", 1)
    records, three = run("three", 3)
    assert first[0]["valid_labels"] > 0
    assert [record["valid_labels"] for record in records[1:]] == [0, 0]
    assert [record["loss"] for record in records[1:]] == [None, None]
    assert [record["grad_norm"] for record in records[1:]] == [0, 0]
    assert records[2]["tokens"] == 3 * 2 * 32  # consumed all the same
    assert records[1]["lr"] > 0
    for name, tensor in one.items():
        assert torch.equal(tensor, three[name]), name
