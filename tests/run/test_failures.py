"""How runs end that can't go on: one message that says why, on whichever rank it happened, and no traceback."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from training import TINY, VOCAB, write_nanoset

from megastage import failure, resume, runtime, startup
from megastage.config.layout import resolve_layout
from megastage.config.load import load_config
from megastage.data import index
from megastage.model.flavors import get_flavor
from megastage.stages import resolve_stages
from ranks import free_port, run_ranks

GLOO = "[/build/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:19665."


def _caught(action) -> BaseException:
    try:
        action()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def _said(capsys: pytest.CaptureFixture[str], error: BaseException, rank: int, store: dist.Store) -> tuple[int, str]:
    code = failure.report(error, rank=rank, leads_node=rank == 0, store=store)
    return code, capsys.readouterr().err


def test_what_the_program_says_itself_stands_alone(capsys):
    code, text = _said(capsys, _caught(lambda: get_flavor("llama3", "9B")), 0, dist.HashStore())
    assert code == 2
    assert "9B" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    "action",
    [lambda: np.zeros(3) + np.zeros(4), lambda: int("x"), lambda: {}["x"], lambda: get_flavor("llama3")],
    ids=["numpy", "int", "key", "call"],
)
def test_a_mistake_of_the_program_keeps_its_traceback(action, capsys):
    code, text = _said(capsys, _caught(action), 0, dist.HashStore())
    assert code == 1
    assert "Traceback" in text


def test_a_file_error_names_the_file(capsys, tmp_path):
    code, text = _said(capsys, _caught((tmp_path / "absent").read_text), 0, dist.HashStore())
    assert (code, text) == (1, f"No such file or directory: {tmp_path / 'absent'}\n")


def test_each_message_is_printed_once(capsys):
    store, error = dist.HashStore(), _caught(lambda: get_flavor("llama3", "9B"))
    spoken = [_said(capsys, error, rank, store)[1] for rank in (3, 0, 1)]
    assert spoken[0].startswith("[rank 3] ")
    assert spoken[1:] == ["", ""]


def test_torchruns_summary_shows_what_the_program_says_itself_without_its_traceback(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    def fail() -> None:
        try:
            get_flavor("llama3", "9B")
        except ValueError as error:
            failure.report(error, rank=0, leads_node=True, store=dist.HashStore())

    fail()
    said = json.loads((tmp_path / "error.json").read_text())["message"]
    assert "9B" in said["message"]
    assert "Traceback" not in said["extraInfo"]["py_callstack"]


def test_who_stays_silent_before_there_is_a_store_outlives_the_one_that_speaks(capsys, monkeypatch):
    """torchrun stops all ranks when the first one ends: that must not be one that said nothing."""
    slept: list[float] = []
    monkeypatch.setattr(failure.time, "sleep", slept.append)
    error = _caught(lambda: get_flavor("llama3", "9B"))
    assert _said(capsys, error, 1, None) == (2, "")
    assert slept == [5.0]
    assert "9B" in _said(capsys, error, 0, None)[1]
    assert slept == [5.0]


def test_the_echo_of_a_failure_elsewhere_is_silent(capsys):
    store = dist.HashStore()
    _said(capsys, _caught(lambda: get_flavor("llama3", "9B")), 1, store)
    assert _said(capsys, RuntimeError(GLOO), 0, store) == (1, "")


def test_a_rank_that_vanished_is_reported_once(capsys):
    store = dist.HashStore()
    code, text = _said(capsys, RuntimeError(GLOO), 2, store)
    assert code == 1
    assert "Lost contact with another rank" in text
    assert "Traceback" not in text
    assert _said(capsys, RuntimeError(GLOO), 1, store) == (1, "")


def test_an_interrupt_is_no_mistake(capsys):
    code, text = _said(capsys, KeyboardInterrupt(), 0, dist.HashStore())
    assert code == 130
    assert "Traceback" not in text


def test_a_folder_that_cannot_be_written_to_is_named_with_its_key(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r'job.dump_folder = ".*file/out": can\'t be written to \(Not a directory\)'):
        runtime.make_writable(str(tmp_path / "file" / "out"), "job.dump_folder", is_main=True)


def _rank(argv: list[str], port: int, log: Path) -> int:
    import pretrain

    # as under torchrun, the store is not a rank's own
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.chdir(log.parent / os.environ["RANK"] if (log.parent / os.environ["RANK"]).exists() else log.parent)
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    return pretrain.main(argv)


def _fail(world: int, argv: list[str], folder: Path) -> tuple[list[int], str]:
    """Exit codes of all ranks and everything that they printed."""
    port, log = free_port(), folder / "log.txt"
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    codes = run_ranks(world, _rank, argv, port, log, timeout_s=60)
    del store
    return codes, log.read_text()


def _argv(data: str, folder: Path, *more: str) -> list[str]:
    return [
        *TINY, "--training.dataset_type", "nanoset", "--training.dataset_path", data, "--training.steps", "50",
        "--training.seq_len", "64", "--training.global_batch_size", "4", "--training.local_batch_size", "1",
        "--job.dump_folder", str(folder / "out"), *more,
    ]  # fmt: skip


@pytest.mark.dist
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_bad_token_that_one_rank_reads_ends_the_job(workers, tmp_path):
    data = write_nanoset(tmp_path / "data", 4096, 0)
    tokens = np.fromfile(data / "00000.ds", "<u2")
    tokens[1000] = VOCAB + 5
    tokens.tofile(data / "00000.ds")
    argv = _argv(str(data), tmp_path, "--training.dataloader.num_workers", workers)
    codes, printed = _fail(2, argv, tmp_path)
    assert sorted(codes) == [1, 2]
    assert printed.count(f"token {VOCAB + 5} at position 1000") == 1
    assert "Traceback" not in printed


@pytest.mark.dist
def test_other_data_on_one_rank_end_the_job(tmp_path):
    for rank in ("0", "1"):
        write_nanoset(tmp_path / rank / "data", 4096, int(rank))
    codes, printed = _fail(2, _argv("data", tmp_path), tmp_path)
    assert set(codes) <= {1, 2}  # 1: the other rank was gone before this one had heard
    assert printed.count("rank 1: data") == 1
    assert "Traceback" not in printed


@pytest.mark.dist
def test_a_loss_that_is_no_number_ends_the_job(tmp_path):
    data = write_nanoset(tmp_path / "data", 4096, 0)
    codes, printed = _fail(2, _argv(str(data), tmp_path, "--optimizer.lr", "1e20"), tmp_path)
    assert set(codes) == {1}
    assert printed.count("loss nan") == 1
    assert "[rank" not in printed  # rank 0 speaks for all
    assert "Traceback" not in printed


@pytest.mark.dist
def test_a_folder_left_by_a_killed_run_is_reported_once(tmp_path):
    data = write_nanoset(tmp_path / "data", 4096, 0)
    (tmp_path / "out" / "checkpoint" / "step-3.tmp").mkdir(parents=True)
    checkpoint = ("--checkpoint.enable", "true", "--training.steps", "1")
    codes, printed = _fail(2, _argv(str(data), tmp_path, *checkpoint), tmp_path)
    assert codes == [0, 0]
    assert printed.count("step-3.tmp was left half-done") == 1
    assert "[rank" not in printed


def test_a_missing_tokenizer_is_named_with_its_key():
    cfg = load_config(["--model.hf_assets_path", "absent/folder"])
    with pytest.raises(ValueError, match=r'^model.hf_assets_path = "absent/folder": .*no such file'):
        startup.open_tokenizer(cfg)


@pytest.mark.parametrize("folder", ["weights", "absent"])
def test_a_folder_without_a_tokenizer_serves_where_no_text_is_read(folder, tmp_path):
    (tmp_path / "weights").mkdir()
    argv = ["--model.hf_assets_path", str(tmp_path / folder), "--training.dataset_type"]
    data = ["--training.dataset_path", str(tmp_path)]
    assert startup.open_tokenizer(load_config([*argv, "nanoset", *data])) is None
    with pytest.raises(ValueError, match=r"^model.hf_assets_path = .*no (tokenizer in|such file)"):
        startup.open_tokenizer(load_config([*argv, "huggingface", *data]))
    (tmp_path / "weights" / "tokenizer.json").write_text("{")
    if folder == "weights":
        with pytest.raises(ValueError, match=r"^model.hf_assets_path"):
            startup.open_tokenizer(load_config([*argv, "nanoset", *data]))


def test_what_changes_the_updates_of_a_resumed_run_is_shown():
    saved = load_config(["--training.steps", "100"]).model_dump(mode="json")
    now = load_config(["--training.steps", "120", "--optimizer.lr", "1e-3", "--training.max_norm", "1.0"])
    changed = resume.changed_settings(saved, now.model_dump(mode="json"))
    assert changed == ["optimizer.lr 0.0008 -> 0.001", "training.steps 100 -> 120"]
    assert resume.changed_settings(saved, saved) == []


@pytest.mark.parametrize(("path", "key"), [(None, "dataset"), ("absent", "dataset_path")])
def test_a_source_that_cannot_be_opened_is_named_with_its_key(path, key, monkeypatch):
    def refuse(*_args: object) -> None:
        raise ValueError("not there")

    monkeypatch.setattr(index, "open_source", refuse)
    argv = ["--training.dataset_path", path] if path else []
    cfg = load_config(argv, 1)
    stages = resolve_stages(cfg, resolve_layout(cfg, 1), seed=0)
    with pytest.raises(index.DataError, match=f"stage 1 'default', {key}: not there"):
        index.build_index(stages, group=None, options=index.SourceOptions())
