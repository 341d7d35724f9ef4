"""Stages that choose documents by length, in a whole run: stopped, gone on with on another layout, validated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from training import TINY, VOCAB, layout_flags, train

from megastage.data.packed_memmap import PackedMemmapWriter

pytestmark = pytest.mark.dist

RUN = """
[training]
dataset_type = "packed_memmap"
dataset_folders = ["{0}/web", "{0}/books"]
dataset_weights = [0.5, 0.5]
steps = 6
seq_len = 64
global_batch_size = 4
local_batch_size = 1
min_doc_len = 10

[[training.data_stages]]
name = "general"
start_step = 0

[[training.data_stages]]
name = "long"
start_step = 2
seq_len = 128
min_doc_len = 24
long_doc_len = 96
long_doc_share = 0.75

[validation]
enable = true
dataset_folders = ["{0}/web", "{0}/books"]
seq_len = 32
freq = 6

[checkpoint]
enable = true
interval = 3
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, mean in (("web", 40), ("books", 90)):
        with PackedMemmapWriter(tmp_path / name, "uint16") as writer:
            for length in np.maximum(2, rng.lognormal(np.log(mean), 0.8, 60)).astype(int).tolist():
                writer.append(rng.integers(1, VOCAB, length))
    (tmp_path / "run.toml").write_text(RUN.format(tmp_path))
    return tmp_path / "run.toml"


def test_a_run_goes_on_with_the_same_documents_on_another_layout(config, tmp_path):
    def argv(out: str, *more: str, **layout: int) -> list[str]:
        flags = ["--config", str(config), "--job.dump_folder", str(tmp_path / out), "--model.n_layers", "2"]
        return [*TINY, *flags, *layout_flags(**layout), *more]

    whole = train(1, argv("whole"))
    train(2, argv("cut", dp=2))
    run = train(2, argv("cut", "--checkpoint.load_step", "3", cp=2))  # from the middle of the second stage
    assert [r["sample_digest"] for r in run] == [r["sample_digest"] for r in whole]
    assert [r["loss"] for r in run] == pytest.approx([r["loss"] for r in whole], rel=1e-5)
    for mine, one in zip(run, whole, strict=True):
        assert mine["loss_by_source"] == pytest.approx(one["loss_by_source"], rel=1e-5)
    assert run[-1]["validation"]["loss"] == pytest.approx(whole[-1]["validation"]["loss"], rel=1e-5)
    labels = sum(of["valid_labels"] for of in whole[-1]["validation"]["sources"].values())
    tokens = sum(np.fromfile(config.parent / name / "tokens.bin", "<u2").size for name in ("web", "books"))
    documents = 120  # whose last token has no label; validation reads them all, whatever the stages do
    assert labels == tokens - documents
