"""A compiled run has the losses of an eager one: on several layouts, with recomputation, over a change of stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch._dynamo.utils
from training import TINY, layout_flags, records, train, write_nanoset

from megastage import compiling
from ranks import run_ranks

pytestmark = pytest.mark.dist


def test_an_unknown_back_end_is_named():
    compiling.require_backend("inductor")
    with pytest.raises(
        ValueError, match=r'compile.backend = "induktor": torch has no such back end; use one of .*inductor'
    ):
        compiling.require_backend("induktor")


STAGES = """
[training]
dataset_type = "nanoset"
dataset_path = "{0}"
steps = 4
seq_len = 64
global_batch_size = 2
local_batch_size = 1

[[training.data_stages]]
name = "short"
start_step = 0
end_step = 2

[[training.data_stages]]
name = "long"
start_step = 2
seq_len = 128
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compile")
    path = root / "run.toml"
    path.write_text(STAGES.format(write_nanoset(root / "web", 20_000, 1, mean_document=30)))
    return path


def _argv(config: Path, out: Path, layout: dict[str, int], *more: str) -> list[str]:
    small = ["--model.n_layers", "2", *layout_flags(**layout)]
    return ["--config", str(config), "--job.dump_folder", str(out), *TINY, *small, *more]


@pytest.fixture(scope="module")
def eager(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return train(1, _argv(config, tmp_path_factory.mktemp("eager"), {}))


def _compiled_rank(argv: list[str]) -> int:
    """Graphs that were compiled in this rank, 0 if compilation never happened."""
    import pretrain

    assert pretrain.main(argv) == 0
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _check(world: int, argv: list[str], eager: list[dict]) -> int:
    graphs = run_ranks(world, _compiled_rank, argv, timeout_s=500)
    run = records(argv)
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in run] == pytest.approx([r[key] for r in eager], rel=1e-5)
    assert [r["sample_digest"] for r in run] == [r["sample_digest"] for r in eager]
    for record in run:
        assert list(record["loss_by_source"].values()) == pytest.approx([record["loss"]], rel=1e-6)
    return min(graphs)


ON = ["--compile.enable", "true", "--compile.backend", "aot_eager"]


@pytest.mark.parametrize(
    ("layout", "mode", "graphs"),
    [
        ({}, ("none", "2"), 4),  # a layer and the loss, at two lengths
        ({"tp": 2}, ("full", "2"), 4),
        ({"tp": 2}, ("selective", "op"), 4),
        ({"pp": 2}, ("selective", "2"), 2),  # the first part has no loss
        ({"cp": 2}, ("none", "2"), 4),
    ],
    ids=["one-none", "tp2-full", "tp2-op", "pp2-every2", "cp2-none"],
)
def test_same_losses_as_eager(layout, mode, graphs, config, eager, tmp_path):
    recompute = ["--activation_checkpoint.mode", mode[0], "--activation_checkpoint.selective_ac_option", mode[1]]
    world = max(layout.values(), default=1)
    assert _check(world, _argv(config, tmp_path / "out", layout, *ON, *recompute), eager) >= graphs


def test_only_the_loss(config, eager, tmp_path):
    argv = _argv(config, tmp_path / "out", {}, *ON, "--compile.components", '["loss"]')
    assert 1 <= _check(1, argv, eager) <= 2  # a graph for each stage's shape, none of a layer


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"tp": 2, "dp": 2}], ids=["one", "tp2dp2"])
def test_inductor(layout, config, eager, tmp_path):
    argv = _argv(config, tmp_path / "out", layout, "--compile.enable", "true")
    assert _check(4 if layout else 1, argv, eager) >= 4
