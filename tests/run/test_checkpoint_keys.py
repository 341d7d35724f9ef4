"""The keys of [checkpoint] in real runs: seed checkpoints, other runs' checkpoints, exclusions, last save, export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import TINY, layout_flags, records, train, write_nanoset

from ranks import run_ranks

pytestmark = pytest.mark.dist

RUN = """
[training]
dataset_type = "nanoset"
dataset_path = "{0}"
steps = 4
seq_len = 64
global_batch_size = 4
local_batch_size = 1

[checkpoint]
enable = true
interval = 2
"""
SMALL = ["--model.n_layers", "2"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("keys")
    path = root / "run.toml"
    path.write_text(RUN.format(write_nanoset(root / "web", 30_000, 1)))
    return path


def _argv(config: Path, out: Path, *more: str, layout: dict[str, int] | None = None) -> list[str]:
    flags = layout_flags(**(layout or {}))
    return ["--config", str(config), "--job.dump_folder", str(out), *TINY, *SMALL, *flags, *more]


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four updates on one process, saved after two and four."""
    out = tmp_path_factory.mktemp("whole")
    train(1, _argv(config, out))
    return out


def _losses(out: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in records(["--job.dump_folder", str(out)])}


def _steps(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoint").iterdir() if path.name.startswith("step-"))


def _exit_code(argv: list[str]) -> int:
    import pretrain

    return pretrain.main(argv)


def test_a_seed_checkpoint_starts_any_layout(config, whole, tmp_path):
    argv = _argv(config, tmp_path, "--checkpoint.create_seed_checkpoint", "true")
    run_ranks(1, _exit_code, argv)
    assert _steps(tmp_path) == ["step-0"]
    train(2, _argv(config, tmp_path, layout={"tp": 2}))
    assert _losses(tmp_path) == pytest.approx(_losses(whole), rel=1e-5)
    assert run_ranks(1, _exit_code, argv) == [2]  # there is something to go on from


def test_going_on_from_another_runs_checkpoint(config, whole, tmp_path):
    source = ["--checkpoint.initial_load_path", str(whole / "checkpoint" / "step-2")]
    train(1, _argv(config, tmp_path / "all", *source, "--checkpoint.initial_load_model_only", "false"))
    assert _losses(tmp_path / "all") == {step: loss for step, loss in _losses(whole).items() if step > 2}
    train(1, _argv(config, tmp_path / "model", *source))
    started = _losses(tmp_path / "model")
    assert sorted(started) == [1, 2, 3, 4]
    assert started[1] < _losses(whole)[1] - 0.05  # trained weights, from the first sample on


def test_excluded_parts_begin_anew(config, whole, tmp_path):
    source = [
        "--checkpoint.initial_load_path", str(whole / "checkpoint" / "step-2"),
        "--checkpoint.initial_load_model_only", "false", "--checkpoint.exclude_from_loading",
    ]  # fmt: skip

    def run(name: str, excluded: str) -> list[dict]:
        return train(1, _argv(config, tmp_path / name, *source, excluded))

    full = {r["step"]: r for r in records(["--job.dump_folder", str(whole)])}
    moments = run("moments", '["optimizer"]')
    assert moments[0]["loss"] == full[3]["loss"]
    assert moments[1]["loss"] != full[4]["loss"]
    data = run("data", '["dataloader"]')
    assert [r["step"] for r in data] == [3, 4]
    assert [r["sample_digest"] for r in data] == [full[1]["sample_digest"], full[2]["sample_digest"]]
    state = run("state", '["train_state", "dataloader"]')
    assert [(r["step"], r["lr"]) for r in state] == [(s, full[s]["lr"]) for s in (1, 2, 3, 4)]
    assert state[0]["loss"] < full[1]["loss"] - 0.05


def test_what_is_saved_and_kept(config, tmp_path):
    train(1, _argv(config, tmp_path / "never", "--checkpoint.load_only", "true"))
    assert not (tmp_path / "never" / "checkpoint").exists()
    flags = ["--checkpoint.enable_first_step_checkpoint", "true", "--checkpoint.interval", "3"]
    train(1, _argv(config, tmp_path / "first", *flags, "--checkpoint.async_mode", "async"))
    assert _steps(tmp_path / "first") == ["step-1", "step-3", "step-4"]
    train(1, _argv(config, tmp_path / "kept", "--checkpoint.interval", "1", "--checkpoint.keep_latest_k", "2"))
    assert _steps(tmp_path / "kept") == ["step-3", "step-4"]


def test_the_last_save_may_be_the_model_alone(config, whole, tmp_path):
    only = ["--checkpoint.last_save_model_only", "true", "--checkpoint.export_dtype", "bfloat16"]
    train(1, _argv(config, tmp_path, *only))
    [shard] = (tmp_path / "checkpoint" / "step-4").glob("*.safetensors")
    tensors = load_file(shard)
    assert all(key.startswith("model.") for key in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    [full] = (whole / "checkpoint" / "step-4").glob("*.safetensors")
    expected = {key: value.bfloat16() for key, value in load_file(full).items() if key.startswith("model.")}
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", [{}, {"dp": 2, "tp": 2, "pp": 2}, {"rep": 2, "pp": 2}], ids=str)
def test_an_export_is_the_trained_model_for_transformers(layout, config, whole, tmp_path):
    """transformers computes the loss of a fifth update's rows that this trainer computes when it goes on."""
    world = 1
    for degree in layout.values():
        world *= degree
    tied = ["--model.tied_embeddings", "true"] if "rep" in layout else []
    mask = ["--training.document_mask", "false"]
    target = tmp_path / "hf"
    argv = _argv(config, tmp_path / "run", *tied, *mask, "--checkpoint.export", str(target), layout=layout)
    train(world, argv)
    assert run_ranks(1, _exit_code, _argv(config, tmp_path / "new", "--checkpoint.export", str(target))) == [2]
    more = _argv(config, tmp_path / "run", *tied, *mask, "--training.steps", "5", layout=layout)
    ours = train(world, more)[-1]["loss"]
    assert _transformers_loss_of_step(config, target, 5) == pytest.approx(ours, rel=2e-5)
    hf = ["--checkpoint.initial_load_in_hf", "true", "--checkpoint.initial_load_path", str(target), *tied, *mask]
    other = ["--model.norm_eps", "1e-3"]
    assert run_ranks(1, _exit_code, _argv(config, tmp_path / "eps", *hf, *other)) == [2]
    again = train(1, _argv(config, tmp_path / "import", *hf))
    first = train(1, _argv(config, tmp_path / "fresh", *tied, *mask))[0]["loss"]
    assert again[0]["loss"] < first - 0.05
    assert _transformers_loss_of_step(config, target, 1) == pytest.approx(again[0]["loss"], rel=2e-5)


def _transformers_loss_of_step(config: Path, folder: Path, step: int) -> float:
    """Loss of the exported model on the rows of update `step`, read by the data engine alone."""
    from dataclasses import replace

    from transformers import AutoModelForCausalLM

    from megastage.config.layout import Layout
    from megastage.config.load import load_config
    from megastage.data.engine import DataEngine
    from megastage.stages import resolve_stages

    cfg = load_config(["--config", str(config), *TINY, *SMALL], 1)
    [stage] = resolve_stages(cfg, Layout(1, 1, 1, 1, 1, 1), seed=7)
    engine = DataEngine.build([replace(stage, document_mask=False)], vocab_size=2048)
    engine.enter(0, data_rank=0, data_ranks=1)
    for _ in range(step):
        batch = engine.next()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=batch.tokens_BT).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten()))


def test_the_last_save_may_be_hugging_face_weights(config, tmp_path):
    argv = _argv(config, tmp_path, "--checkpoint.last_save_model_only", "--checkpoint.last_save_in_hf")
    (tmp_path / "checkpoint" / "step-4.hf.tmp").mkdir(parents=True)  # left by a run that was killed meanwhile
    train(1, argv)
    assert _steps(tmp_path) == ["step-2", "step-4.hf"]
    described = json.loads((tmp_path / "checkpoint" / "step-4.hf" / "config.json").read_text())
    assert described["num_hidden_layers"] == 2
    train(1, argv)  # goes on from step 2 to the end once more
    assert _steps(tmp_path) == ["step-2", "step-4.hf", "step-4.hf.superseded-1"]
    assert described["max_position_embeddings"] == 64
