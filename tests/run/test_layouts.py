"""The quick-start run with its three stages gives the same losses and reads the same samples on every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from quick_start import QUICK_START
from training import TINY, layout_flags, train, write_nanoset

pytestmark = pytest.mark.dist

SCALED = [
    "--training.steps", "7", "--training.data_stages.0.end_step", "3", "--training.data_stages.1.start_step", "3",
    "--training.data_stages.1.end_step", "5", "--training.data_stages.2.start_step", "5",
    "--training.seq_len", "512", "--training.global_batch_size", "4", "--training.local_batch_size", "1",
]  # fmt: skip
LAYOUTS = [
    {"dp": 2}, {"tp": 2}, {"pp": 2}, {"dp": 2, "tp": 2}, {"dp": 2, "pp": 2}, {"tp": 2, "pp": 2},
    {"dp": 2, "tp": 2, "pp": 2}, {"rep": 2, "dp": 2}, {"cp": 2}, {"cp": 2, "tp": 2}, {"dp": 2, "cp": 2, "pp": 2},
    {"tp": 4},
]  # fmt: skip


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quick")
    folders = [write_nanoset(root / name, 200_000, i) for i, name in enumerate(("general", "math", "code"))]
    config = root / "quick.toml"
    text = QUICK_START
    for folder in folders:
        text = text.replace(f"/data/{folder.name}", str(folder))
    config.write_text(text)
    return config


def _argv(config: Path, out: Path, long: int, layout: dict[str, int]) -> list[str]:
    return [
        "--config", str(config), "--job.dump_folder", str(out), *TINY, *SCALED,
        "--training.data_stages.2.seq_len", str(long), *layout_flags(**layout),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def one_process(quick_start: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return train(1, _argv(quick_start, tmp_path_factory.mktemp("one"), 4096, {}))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(f"{k}{v}" for k, v in layout.items()))
def test_same_losses_and_samples_as_one_process(layout, quick_start, one_process, tmp_path):
    world = 1
    for degree in layout.values():
        world *= degree
    run = train(world, _argv(quick_start, tmp_path / "out", 4096, layout))
    assert [r["stage"] for r in run] == ["general"] * 3 + ["reasoning"] * 2 + ["long_context"] * 2
    assert [r["seq_len"] for r in run] == [512] * 5 + [4096] * 2
    assert [r["sample_digest"] for r in run] == [r["sample_digest"] for r in one_process]
    assert [r["valid_labels"] for r in run] == [r["valid_labels"] for r in one_process]
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in run] == pytest.approx([r[key] for r in one_process], rel=1e-5)
    for mine, one in zip(run, one_process, strict=True):
        assert mine["loss_by_source"] == pytest.approx(one["loss_by_source"], rel=1e-5)


def test_a_source_has_a_loss_where_it_has_a_row(one_process):
    """4 rows a step at 0.8, 0.1, 0.1 and then 0.3, 0.35, 0.35: few steps read all three."""
    found = [{name.rpartition("/")[2] for name in r["loss_by_source"]} for r in one_process]
    assert set.union(*found) == {"general", "math", "code"}
    assert {len(names) for names in found} >= {2, 3}
    for record in one_process:
        values = record["loss_by_source"].values()
        assert min(values) <= record["loss"] <= max(values)


def test_the_loss_falls_and_the_samples_differ(one_process):
    assert one_process[-1]["loss"] < one_process[0]["loss"] - 0.1
    assert len({r["sample_digest"] for r in one_process}) == len(one_process)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"dp": 2, "tp": 2, "pp": 2}, {"cp": 4}], ids=["dp2xtp2xpp2", "cp4"])
def test_at_32k(layout, quick_start, tmp_path):
    world = 8 if "pp" in layout else 4
    one = train(1, _argv(quick_start, tmp_path / "one", 32_768, {}), timeout_s=900)
    run = train(world, _argv(quick_start, tmp_path / "many", 32_768, layout), timeout_s=1800)
    assert [r["sample_digest"] for r in run] == [r["sample_digest"] for r in one]
    assert [r["loss"] for r in run] == pytest.approx([r["loss"] for r in one], rel=1e-5)
