"""The whole trainer on the Triton kernels, in the interpreter, gives the losses of the PyTorch path."""

from __future__ import annotations

from pathlib import Path

import pytest
from training import TINY, layout_flags, train, write_nanoset

from megastage.kernels.tuning import table

pytestmark = pytest.mark.dist

CONFIG = """
[training]
dataset_type = "nanoset"
dataset_path = "{0}"
seq_len = 16
steps = 10
global_batch_size = 2
local_batch_size = 1

[[training.data_stages]]
name = "short"
start_step = 0
end_step = 7

[[training.data_stages]]
name = "long"
start_step = 7
seq_len = 64
"""
OPS = ("flash_attention", "rms_norm", "rope", "swiglu", "linear_cross_entropy", "optimizer")
SMALL = ["--model.n_layers", "2", "--model.dim", "32", "--model.ffn_dim", "48"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("interpreted")
    folder = write_nanoset(root / "text", 20_000, 3, mean_document=12)  # several documents in every row
    (root / "run.toml").write_text(CONFIG.format(folder))
    return root / "run.toml"


def losses(config: Path, out: Path, backend: str, **layout: int) -> list[float]:
    back_ends = [flag for op in OPS for flag in (f"--kernels.{op}", backend)]
    world = layout.get("dp", 1) * layout.get("tp", 1) * layout.get("pp", 1)
    argv = ["--config", str(config), "--job.dump_folder", str(out), *TINY, *SMALL, *back_ends, *layout_flags(**layout)]
    return [record["loss"] for record in train(world, argv, timeout_s=600)]


@pytest.mark.parametrize(
    "layout",
    [{}, *(pytest.param({kind: 2}, marks=pytest.mark.slow) for kind in ("tp", "pp", "dp"))],
    ids=lambda layout: "-".join(f"{k}{v}" for k, v in layout.items()) or "one",
)
def test_losses_of_the_two_paths_agree(config, tmp_path, layout, monkeypatch):
    # an interpreted program costs the same whatever its size, and the ranks are forked from here
    monkeypatch.setitem(table.FORCED, "adamw", {"block": 16384, "num_warps": 4})
    expected = losses(config, tmp_path / "torch", "torch", **layout)
    found = losses(config, tmp_path / "triton", "triton", **layout)
    assert len(found) == 10
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[-1] != found[0]
