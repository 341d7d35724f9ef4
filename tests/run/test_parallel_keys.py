"""Keys that change how a run computes, not what: the same losses as without them, and proof that they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch.distributed.fsdp import FSDPModule
from training import TINY, layout_flags, records, train, write_nanoset

from megastage import loss, recompute, trainer
from megastage.model.decoder import Decoder
from ranks import run_ranks

pytestmark = pytest.mark.dist

RUN = """
[training]
dataset_type = "nanoset"
dataset_path = "{0}"
steps = 3
seq_len = 64
global_batch_size = 4
local_batch_size = 1
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parallel")
    path = root / "run.toml"
    path.write_text(RUN.format(write_nanoset(root / "web", 20_000, 1)))
    return path


def _argv(config: Path, out: Path, *more: str, **layout: int) -> list[str]:
    return ["--config", str(config), "--job.dump_folder", str(out), *TINY, *layout_flags(**layout), *more]


@pytest.fixture(scope="module")
def one(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    root = tmp_path_factory.mktemp("one")
    tied = ["--model.tied_embeddings"]
    return {name: train(1, _argv(config, root / name, *flags)) for name, flags in (("untied", []), ("tied", tied))}


def _same(run: list[dict], one: list[dict]) -> None:
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in run] == pytest.approx([r[key] for r in one], rel=1e-5)
    for record in run:  # of the only source
        assert list(record["loss_by_source"].values()) == pytest.approx([record["loss"]], rel=1e-6)


def _watched(argv: list[str], what: str) -> Any:
    """Train in this rank and report what `what` saw."""
    import pretrain

    seen: list[Any] = []
    if what == "vocabulary":
        original = loss.linear_cross_entropy_by_token

        def spy(hidden: Any, weight: Any, labels: Any, **options: Any) -> Any:
            seen.append((hidden.shape[0], weight.shape[0]))
            return original(hidden, weight, labels, **options)

        loss.linear_cross_entropy_by_token = spy
    elif what == "layers":
        init = Decoder.__init__

        def watched_init(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            seen.append(list(self.layers))

        Decoder.__init__ = watched_init  # type: ignore[method-assign]
    elif what == "options":
        plain = torch.utils.checkpoint.checkpoint

        def recording(*args: Any, **kwargs: Any) -> Any:
            seen.append({k: kwargs[k] for k in ("early_stop", "preserve_rng_state", "determinism_check", "debug")})
            return plain(*args, **kwargs)

        recompute.checkpoint = recording
    else:
        step = trainer.Trainer.train_step

        def train_step(self: trainer.Trainer) -> Any:
            result = step(self)
            with torch.no_grad():
                batch = self.data.next().split(1)[0]
                self.model.part(batch.tokens_BT, batch.positions_BT, batch.cu_seqlens_BC, batch.labels_BT)
            layers = self.model.decoder.layers.values()
            gathered = [layer._get_fsdp_state()._fsdp_param_group.is_unsharded for layer in layers]
            seen.append(gathered)
            for module in self.model.part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
            return result

        trainer.Trainer.train_step = train_step  # type: ignore[method-assign]
    assert pretrain.main(argv) == 0
    return seen


@pytest.mark.parametrize("tied", ["untied", "tied"])
def test_the_loss_by_positions_instead_of_vocabulary(tied, config, one, tmp_path):
    flags = ["--parallelism.disable_loss_parallel", *(["--model.tied_embeddings"] if tied == "tied" else [])]
    argv = _argv(config, tmp_path, *flags, tp=2, pp=2 if tied == "tied" else 1)
    seen = run_ranks(4 if tied == "tied" else 2, _watched, argv, "vocabulary")
    _same(records(argv), one[tied])
    assert {shape for rank in seen for shape in rank} == {(32, 2048)}  # half the row, all of the vocabulary


def test_a_vocabulary_that_cannot_be_gathered(config, tmp_path):
    argv = _argv(config, tmp_path, "--parallelism.disable_loss_parallel", "--model.vocab_size", "2049", tp=2)
    from megastage.config.load import load_config

    with pytest.raises(ValueError, match=r"disable_loss_parallel.*model.vocab_size = 2050"):
        load_config(argv, 2)


@pytest.mark.parametrize(("choice", "kept"), [("always", False), ("never", True), ("default", False)])
def test_parameters_after_forward(choice, kept, config, tmp_path):
    flags = ["--parallelism.fsdp_reshard_after_forward", choice, "--training.steps", "1"]
    for rank in run_ranks(2, _watched, _argv(config, tmp_path, *flags, dp=2), "gathered"):
        assert rank == [[kept] * 4]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--parallelism.pipeline_parallel_split_points", '["layers.1"]'], [["0"], ["1", "2", "3"]]),
        (["--parallelism.pipeline_parallel_first_stage_less_layers", "3"], [["0"], ["1", "2", "3"]]),
        (["--parallelism.pipeline_parallel_last_stage_less_layers", "3"], [["0", "1", "2"], ["3"]]),
        (["--parallelism.pipeline_parallel_layers_per_stage", "3"], [["0", "1", "2"], ["3"]]),
        (
            [
                "--parallelism.module_fqns_per_model_part",
                '[["tok_embeddings", "layers.0"], ["layers.1", "layers.2", "layers.3", "norm", "output"]]',
            ],
            [["0"], ["1", "2", "3"]],
        ),
    ],
    ids=["points", "first", "last", "per-stage", "names"],
)
def test_where_the_pipeline_is_cut(flags, expected, config, one, tmp_path):
    more = ["--parallelism.pipeline_parallel_schedule", "GPipe", "--parallelism.pipeline_parallel_microbatch_size", "2"]
    argv = _argv(config, tmp_path, *flags, *more, pp=2)
    seen = run_ranks(2, _watched, argv, "layers")
    assert [rank[0] for rank in seen] == expected
    _same(records(argv), one["untied"])


def test_options_of_recomputation_reach_torch(config, one, tmp_path):
    table = {"early_stop": True, "preserve_rng_state": False, "determinism_check": "none", "debug": True}
    flags = ["--activation_checkpoint.mode", "full"]
    for name, value in table.items():
        flags += [f"--activation_checkpoint.{name}", str(value).lower()]
    argv = _argv(config, tmp_path, *flags, "--training.steps", "1")
    [seen] = run_ranks(1, _watched, argv, "options")
    assert seen == [table] * 16  # four layers, four micro-batches
    _same(records(argv), one["untied"][:1])


def test_blocks_of_a_stream(config, one, tmp_path):
    sizes = {}
    for block in (64, 2048):
        run = train(1, _argv(config, tmp_path / str(block), "--training.superblock_tokens", str(block)))
        sizes[block] = [r["sample_digest"] for r in run]
    assert sizes[64] != sizes[2048]
    with pytest.raises(RuntimeError, match="exit code 2"):
        train(1, _argv(config, tmp_path / "small", "--training.superblock_tokens", "63"))


def test_the_norm_limit(config, one, tmp_path):
    """Norms here are below the default limit of 1, which therefore changes nothing."""
    free, tight = (train(1, _argv(config, tmp_path / m, "--training.max_norm", m)) for m in ("inf", "0.05"))
    assert [r["loss"] for r in free] == [r["loss"] for r in one["untied"]]
    assert tight[0]["grad_norm"] == free[0]["grad_norm"] > 0.1
    assert tight[-1]["loss"] != free[-1]["loss"]
