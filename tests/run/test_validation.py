"""The loss on held-out data: its value, the same on every layout, and no trace of it in training."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from training import TINY, layout_flags, train, write_nanoset

from megastage.config.load import load_config
from megastage.config.model_choice import model_config
from megastage.data.sources.base import SourceOptions, open_source
from megastage.model.decoder import Decoder
from megastage.parallel.placement import initialise
from megastage.validation import count_rows, read_rows

pytestmark = pytest.mark.dist

RUN = """
[training]
dataset_type = "nanoset"
dataset_path = "{0}"
steps = 5
seq_len = 64
global_batch_size = 4
local_batch_size = 1

[[training.data_stages]]
name = "short"
start_step = 0
end_step = 3

[[training.data_stages]]
name = "long"
start_step = 3
seq_len = 128

[validation]
dataset_folders = ["{1}", "{2}"]
seq_len = 96
local_batch_size = 4
freq = 2
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("validation")
    folders = [write_nanoset(root / "web", 20_000, 1)]
    folders += [write_nanoset(root / name, size, seed) for name, size, seed in (("held", 1500, 2), ("short", 50, 3))]
    path = root / "run.toml"
    path.write_text(RUN.format(*folders))
    return path


def _argv(config: Path, out: Path, *more: str, layout: dict[str, int] | None = None) -> list[str]:
    small = ["--model.n_layers", "2", *layout_flags(**(layout or {}))]
    return ["--config", str(config), "--job.dump_folder", str(out), *TINY, *small, *more]


ON = ["--validation.enable", "true"]


@pytest.fixture(scope="module")
def one(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return train(1, _argv(config, tmp_path_factory.mktemp("one"), *ON))


def test_it_leaves_no_trace_in_training(config, one, tmp_path):
    plain = train(1, _argv(config, tmp_path))
    exact = ("step", "loss", "grad_norm", "sample_digest")
    assert [[r[k] for k in exact] for r in one] == [[r[k] for k in exact] for r in plain]


def test_when_and_how_much(one):
    assert [r["step"] for r in one if "validation" in r] == [2, 3, 4, 5]  # every second, the boundary, the end
    last = one[-1]["validation"]
    each = list(last["sources"].values())
    assert [name.rsplit("/")[-1] for name in last["sources"]] == ["held", "short"]
    total = sum(of["loss"] * of["valid_labels"] for of in each)
    assert last["loss"] == pytest.approx(total / last["valid_labels"])
    assert last["perplexity"] == pytest.approx(math.exp(last["loss"]))
    assert last["loss"] < one[1]["validation"]["loss"]


LAYOUTS = [{"dp": 2}, {"cp": 2}, {"tp": 2, "pp": 2}, {"dp": 2, "tp": 2, "pp": 2}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(f"{k}{v}" for k, v in layout.items()))
def test_the_same_on_every_layout(layout, config, one, tmp_path):
    world = math.prod(layout.values())
    run = train(world, _argv(config, tmp_path, *ON, "--validation.dataloader.num_workers", "1", layout=layout))
    assert [r["loss"] for r in run] == pytest.approx([r["loss"] for r in one], rel=1e-5)
    for mine, theirs in zip(run, one):
        if "validation" in theirs:
            a, b = mine["validation"], theirs["validation"]
            assert a["valid_labels"] == b["valid_labels"]
            assert [of["loss"] for of in a["sources"].values()] == pytest.approx(
                [of["loss"] for of in b["sources"].values()], rel=1e-5
            )


def test_the_value_by_hand(config, tmp_path):
    """Untrained weights, one attention over the row: plain cross-entropy of the file's tokens, cut into rows of 96."""
    flags = ["--optimizer.lr", "0", "--training.document_mask", "false", "--training.steps", "1"]
    flags += ["--training.data_stages", "[]"]
    [record] = train(1, _argv(config, tmp_path, *ON, *flags))
    tokens = torch.from_numpy(np.fromfile(config.parent / "held" / "00000.ds", "<u2").astype(np.int64))
    cfg = model_config(load_config(_argv(config, tmp_path), 1))
    model = Decoder(cfg)
    initialise(model, cfg, 7)
    model.set_rope(cfg.rope, 96)
    loss, labels = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 96):
            row = tokens[start : start + 97]
            hidden = model(row[None, :-1], torch.arange(len(row) - 1)[None])
            loss += float(torch.nn.functional.cross_entropy(model.logits(hidden)[0], row[1:], reduction="sum"))
            labels += len(row) - 1
    held = next(iter(record["validation"]["sources"].values()))
    assert held["valid_labels"] == labels == 1499
    assert held["loss"] == pytest.approx(loss / labels, rel=1e-5)


def test_rows_hold_every_label_once(tmp_path):
    source = open_source("nanoset", write_nanoset(tmp_path / "n", 1000, 4), SourceOptions())
    tokens = source.read(0, 1000)
    assert count_rows(source, 64) == 16
    seen = []
    for first in range(0, 18, 3):  # two rows beyond the end
        batch = read_rows(source, first, 3, 64, document_mask=False, vocab_size=2048)
        seen.append(batch.labels_BT[batch.labels_BT != -100].numpy())
    np.testing.assert_array_equal(np.concatenate(seen), tokens[1:])
    masked = [read_rows(source, row, 1, 64, document_mask=True, vocab_size=2048) for row in range(16)]
    ends = [int((b.labels_BT == -100).sum()) for b in masked]
    documents = int((tokens[:-1] == 0).sum())  # a document's last token has no label
    assert sum(ends) == documents + 64 * 16 - 999


def test_steps_limit_the_batches(config, tmp_path):
    flags = [*ON, "--validation.steps", "1", "--training.steps", "1", "--training.data_stages", "[]"]
    [record] = train(1, _argv(config, tmp_path, *flags, "--training.document_mask", "false"))
    assert [of["valid_labels"] for of in record["validation"]["sources"].values()] == [4 * 96, 49]


_NANOSET = ["--validation.enable", "true", "--training.dataset_type", "nanoset", "--training.dataset_path", "x"]
_CP = ["--parallelism.context_parallel_degree", "2"]
_PP = [
    "--parallelism.pipeline_parallel_degree", "2", "--parallelism.pipeline_parallel_microbatch_size", "2",
    "--training.global_batch_size", "4",
]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "world", "message"),
    [
        ([], 1, 'validation: dataset_type "nanoset" needs data'),
        (["--validation.dataset_path", "y", "--validation.dataset", "c4_validation"], 1, r"validation\.dataset = "),
        (["--validation.dataset_path", "y", "--validation.seq_len", "90", *_CP], 2, "seq_len = 90.*multiple of 4"),
        (["--validation.dataset_path", "y", "--validation.local_batch_size", "3", *_PP], 2, "local_batch_size = 3"),
    ],
)
def test_impossible_settings_are_named(flags, world, message):
    with pytest.raises(ValueError, match=message):
        load_config([*_NANOSET, *flags], world)
