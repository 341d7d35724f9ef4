"""Settings of the run that change no number: traces, timeouts, files, colours, garbage, the plan without a run."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from training import TINY, layout_flags, train, write_nanoset

from megastage import logs, planning, runtime
from megastage.config.layout import resolve_layout
from megastage.config.load import load_config
from megastage.config.model_choice import model_config
from megastage.metrics import TensorBoard, scalars
from megastage.model.parameters import count_parameters
from megastage.stages import resolve_stages
from ranks import run_ranks
from tools import plan

pytestmark = pytest.mark.dist

RUN = """
[job]
description = "a small run"

[training]
dataset_type = "nanoset"
dataset_path = "{0}"
steps = 4
seq_len = 64
global_batch_size = 2
local_batch_size = 1
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("settings")
    path = root / "run.toml"
    path.write_text(RUN.format(write_nanoset(root / "web", 20_000, 1)))
    return path


def _argv(config: Path, out: Path, *more: str) -> list[str]:
    return ["--config", str(config), "--job.dump_folder", str(out), *TINY, "--model.n_layers", "2", *more]


def _printing_rank(argv: list[str]) -> str:
    """What a rank printed."""
    import sys

    import pretrain

    sys.stdout = captured = io.StringIO()
    assert pretrain.main(argv) == 0
    return captured.getvalue()


def test_traces_files_and_records_of_every_rank(config, tmp_path):
    flags = [
        "--profiling.enable_profiling", "--profiling.profile_freq", "2", "--profiling.profiler_warmup", "1",
        "--metrics.save_for_all_ranks", "--metrics.enable_tensorboard", "--metrics.log_freq", "3",
        "--training.gc_debug", "--training.gc_freq", "2", "--job.print_config",
        "--job.save_config_file", "kept/all.json",
        *layout_flags(tp=2),
    ]  # fmt: skip
    first, second = run_ranks(2, _printing_rank, _argv(config, tmp_path, *flags))
    for step in (2, 4):
        for rank in (0, 1):
            trace = json.loads((tmp_path / "profile_traces" / f"step-{step}" / f"rank-{rank}.json").read_text())
            assert any("linear_cross_entropy" in str(event.get("name")) for event in trace["traceEvents"])
    assert not (tmp_path / "profile_traces" / "step-3").exists()
    one, other = ((tmp_path / name).read_text().splitlines() for name in ("metrics.jsonl", "metrics-rank1.jsonl"))
    assert [json.loads(line)["loss"] for line in one] == [json.loads(line)["loss"] for line in other]
    assert len(list((tmp_path / "tb").rglob("events*"))) == 2
    assert "a small run: 2 ranks" in first
    assert '"log_freq": 3' in first
    assert [line for line in first.splitlines() if "Garbage collection" in line]
    assert "\x1b[" not in first  # not a terminal
    assert [line.split()[1] for line in first.splitlines() if line.startswith("step ")] == ["1/4", "3/4", "4/4"]
    assert second == ""
    assert json.loads((tmp_path / "kept" / "all.json").read_text())["config"]["metrics"]["log_freq"] == 3


def test_colours_only_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert logs.colors_wanted(False, Terminal())
    assert not logs.colors_wanted(True, Terminal())
    assert not logs.colors_wanted(False, io.StringIO())
    record = {
        "step": 1, "stage": "a", "loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "tokens_per_s": 1.0, "mfu": None,
        "memory_gib": 1.0, "data_wait_s": 0.0,
    }  # fmt: skip
    plain, coloured = (logs.step_line(record, 9, colors=colors) for colors in (False, True))
    assert "\x1b[32mloss 1.0000\x1b[39m" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain


def test_nested_figures_reach_tensorboard(tmp_path):
    nested = {"loss": 2.0, "sources": {"x": {"loss": 3}}}
    assert scalars({"step": 3, "stage": "a", "loss": 1.5, "validation": nested}) == {
        "loss": 1.5, "validation/loss": 2.0, "validation/sources/x/loss": 3,
    }  # fmt: skip
    board = TensorBoard(tmp_path)
    board.write({"step": 3, "loss": 1.5})
    board.close()
    assert list(tmp_path.glob("events*"))


def _timeouts(argv: list[str]) -> list[float]:
    """Default timeouts in seconds of (the world, control) after training."""
    import pretrain
    from megastage import trainer

    seen: list[float] = []

    def close(self: object) -> None:
        for group in (dist.group.WORLD, self.runtime.control):  # type: ignore[attr-defined]
            backend = group._get_backend(torch.device("cpu"))
            seen.append(backend.options._timeout.total_seconds())
        original(self)

    original = trainer.Trainer.close
    trainer.Trainer.close = close  # type: ignore[method-assign]
    assert pretrain.main(argv) == 0
    return seen


def test_timeouts_after_the_first_update(config, tmp_path):
    flags = ["--comm.init_timeout_seconds", "77", "--comm.train_timeout_seconds", "33", "--training.steps", "1"]
    [(world, control)] = run_ranks(1, _timeouts, _argv(config, tmp_path, *flags))
    assert world == 33
    assert control >= 1800


def _recorder(entries: int, folder: str) -> dict[str, str]:
    runtime.record_collectives(entries, Path(folder), "r_")
    return {key: value for key, value in os.environ.items() if key.startswith(("TORCH_FR", "TORCH_NCCL"))}


def test_the_flight_recorder_is_set_up_through_the_environment(tmp_path):
    assert run_ranks(1, _recorder, 55, str(tmp_path))[0] == {
        "TORCH_FR_BUFFER_SIZE": "55",
        "TORCH_FR_DUMP_TEMP_FILE": str(tmp_path / "r_"),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    assert run_ranks(1, _recorder, 0, str(tmp_path))[0] == {"TORCH_FR_BUFFER_SIZE": "0"}


def test_memory_estimation_prints_and_stops(config, tmp_path):
    flags = ["--memory_estimation.enable", *layout_flags(tp=2, pp=2), "--training.global_batch_size", "4"]
    printed, *others = run_ranks(4, _printing_rank, _argv(config, tmp_path, *flags))
    assert "Memory in stage 'default'" in printed
    assert printed.count("pipeline rank") == 2
    assert others == [""] * 3
    assert not tmp_path.joinpath("metrics.jsonl").exists()


def test_the_plan_is_that_of_the_run(config, tmp_path, capsys):
    argv = _argv(config, tmp_path)
    assert plan.main(["--nproc", "2", *argv]) == 0
    planned = capsys.readouterr().out
    [printed] = run_ranks(1, _printing_rank, argv)
    start, end = printed.index("DATA STAGE TRAINING PLAN"), printed.rindex("=" * 60)
    shared = [line for line in printed[start:end].splitlines() if "Tokens per step" not in line]
    assert len(shared) > 8
    for line in shared:
        assert line in planned
    assert "Tokens per step: 128 (2 rows = 2 data ranks x 1 micro-batches of 1)" in planned
    assert "2 ranks = pipeline 1 x replicate 1 x shard 2" in planned
    # 2 layers: 2 x 64 + 64 x 64 + 2 x 32 x 64 + 64 x 64 + 3 x 64 x 160; both tables and the last norm
    assert f"{2 * 43136 + 2 * 2048 * 64 + 64:,} parameters" in planned


def test_the_plan_without_data(config, tmp_path, capsys):
    missing = _argv(config, tmp_path, "--training.dataset_path", str(tmp_path / "nowhere"))
    assert plan.main(missing) == 2
    assert "nowhere" in capsys.readouterr().err
    assert plan.main(["--no-data", *missing]) == 0
    assert "Memory in stage 'default'" in capsys.readouterr().out


def test_estimates_follow_the_stage_and_the_precisions():
    flags = ["--training.dtype", "bfloat16", "--training.local_batch_size", "1", *layout_flags(dp=2, cp=2)]
    cfg = load_config([*TINY[:-4], *flags], 4)
    layout = resolve_layout(cfg, 4)
    [stage] = resolve_stages(cfg, layout, seed=0)
    model = model_config(cfg)
    [got] = planning.estimates(cfg, model, layout, stage)
    assert got.optimizer == 2 * got.parameters == 2 * got.gradients
    assert got.parameters == 2 * -(-count_parameters(model) // 4)  # bf16, over data and context ranks


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--profiling.enable_profiling", "--profiling.profile_freq", "2"], "profiling.profile_freq = 2"),
        (["--debug.deterministic_warn_only"], "needs debug.deterministic"),
        (["--memory_estimation.disable_fake_mode"], "memory_estimation.disable_fake_mode"),
        (["--checkpoint.create_seed_checkpoint"], "needs checkpoint.enable"),
        (["--checkpoint.last_save_in_hf"], "set last_save_model_only"),
        (["--checkpoint.initial_load_model_only", "false"], "needs initial_load_path"),
        (["--checkpoint.enable", "--checkpoint.export_dtype", "bfloat16"], "nothing is exported"),
        (["--checkpoint.exclude_from_loading", '["lr_scheduler"]'], "function of the step"),
        (["--checkpoint.exclude_from_loading", '["train_state"]'], "initial_load_path"),
        (
            ["--checkpoint.exclude_from_loading", '["optimizer"]', "--checkpoint.initial_load_path", "elsewhere"],
            "nothing but the model is loaded from initial_load_path",
        ),
    ],
)
def test_settings_that_would_do_nothing_are_errors(flags, message):
    with pytest.raises(ValueError, match=message):
        load_config(flags, 1)


def test_memory_snapshots_need_cuda(config, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(RuntimeError, match="exit code 2"):
        train(1, _argv(config, tmp_path, "--profiling.enable_memory_snapshot"))


def _deterministic(argv: list[str]) -> tuple[bool, dict[str, str | None]]:
    """Whether torch is strict about it in the end, and what the environment held when the ranks were joined."""
    import pretrain

    names, seen = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE"), {}
    start = runtime.start

    def watched(*args: float) -> runtime.Runtime:
        seen.update({name: os.environ.get(name) for name in names})
        return start(*args)

    pretrain.runtime.start = watched
    assert pretrain.main(argv) == 0
    return (
        torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled(),
        seen,
    )


def test_deterministic_algorithms(config, tmp_path):
    """Libraries read the environment once, when they first connect."""
    flags = ["--debug.deterministic", "--training.steps", "1"]
    [(strict, environment)] = run_ranks(1, _deterministic, _argv(config, tmp_path, *flags))
    assert strict
    assert environment == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_NVLS_ENABLE": "0"}
