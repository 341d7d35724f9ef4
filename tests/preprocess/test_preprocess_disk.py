"""Disks that are full or refuse a file: one line that says so, and nothing left behind but finished pieces."""

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from megastage.data.packed_memmap import PackedMemmapWriter
from megastage.preprocess.__main__ import main


@contextmanager
def no_file_over(size_bytes: int) -> Iterator[None]:
    """Writing fails in the middle of a file, as on a full disk, with EFBIG instead of ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_input(tmp_path: Path) -> Path:
    rows = ["counted sheep; " * 4000] * 40
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def write_data(tmp_path: Path) -> Path:
    with PackedMemmapWriter(tmp_path / "data", "uint16") as writer:
        for _ in range(20):
            writer.append(np.arange(20_000))
    return tmp_path / "data"


@pytest.mark.parametrize("kind", ["packed_memmap", "nanoset"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_tokenizing(
    tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture[str], kind: str, workers: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("megastage.preprocess.inputs.MIN_PIECE_BYTES", 1 << 19)
    output = tmp_path / "out"
    arguments = [str(write_input(tmp_path)), "--tokenizer", str(bpe), "--output", str(output), "--format", kind]
    with no_file_over(100_000):  # pieces are larger
        assert main([*arguments, "--workers", workers]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {output}: File too large; ")
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}
    with no_file_over(500_000):  # the whole is larger
        assert main([*arguments, "--workers", workers]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", ".out.work"}
    assert not list((tmp_path / ".out.work").glob("*.tmp*"))
    assert main([*arguments, "--workers", workers]) == 0
    assert "going on with an earlier run" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out"}


@pytest.mark.parametrize(
    "command",
    [
        ["convert", "{data}", "{out}", "--to", "packed_memmap"],
        ["convert", "{data}", "{out}", "--to", "nanoset"],
        ["convert", "{data}", "{out}", "--to", "megatron"],
        ["merge", "{data}", "{data}", "--output", "{out}"],
        ["pack", "{data}", "--seq-len", "512", "--output", "{out}"],
        ["pack", "{data}", "--seq-len", "512", "--output", "{out}", "--to", "parquet", "--method", "concatenate"],
    ],
    ids=lambda command: "-".join(part for part in command if "{" not in part),
)
def test_other_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    data = write_data(tmp_path)
    arguments = [part.format(data=data, out=tmp_path / "out") for part in command]
    with no_file_over(100_000):
        assert main(arguments) == 1
    assert "File too large" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"data"}
    assert main(arguments) == 0


@pytest.mark.parametrize("text", ["No space left on device", "Read-only file system", "Permission denied"])
def test_the_way_out_is_named(
    tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    import errno
    import os

    number = next(n for n in errno.errorcode if os.strerror(n) == text)
    ways = {errno.ENOSPC: "make room and run the same command again", errno.EROFS: "choose an output that can be"}

    def refuse(*_: object) -> None:
        raise OSError(number, text)

    monkeypatch.setattr("megastage.preprocess.shards.ShardWriter.finish", refuse)
    source = write_input(tmp_path)
    assert main([str(source), "--tokenizer", str(bpe), "--output", str(tmp_path / "out"), "--workers", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'out'}: {text}; ")
    assert ways.get(number, "ask for the right") in error


def test_a_tokenizer_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = write_input(tmp_path), tmp_path / "tokenizer.json"
    with no_file_over(1000):
        assert main(["train-tokenizer", str(source), "--vocab", "257", "--output", str(output)]) == 1
    assert f"error: {output}: File too large" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}


def test_a_writer_that_cannot_finish_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> Callable[[], None]:
        with PackedMemmapWriter(tmp_path / "data", "uint16") as writer:
            writer.append(np.arange(60_000))
        return writer.abort

    with no_file_over(1000), pytest.raises(OSError, match="File too large"):
        fill()
    assert not list(tmp_path.iterdir())
