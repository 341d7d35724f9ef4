"""Wrong input and wrong usage: each names the file, the value and the way out, and leaves no output behind."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megastage.preprocess.__main__ import main

GOOD = b'{"text": "fine"}\n'


def run(bpe: Path, tmp_path: Path, *arguments: str, tokenizer: str | None = None) -> int:
    fixed = ["--tokenizer", tokenizer or str(bpe), "--output", str(tmp_path / "out"), "--workers", "1"]
    return main([*arguments, *fixed])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "not JSON: Unterminated string"),
        (b"plain", "not JSON"),
        (b'["a"]', "a list, not an object with 'text'"),
        (b'"a string"', "a string, not an object"),
        (b'{"id": 1, "content": "x"}', "no field 'text', it has id, content; choose one with --text-field"),
        (b'{"text": null}', "field 'text' is null, not a string"),
        (b'{"text": 3.5}', "field 'text' is a number, not a string"),
        (b'{"text": ["a"]}', "field 'text' is a list, not a string"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "a\\ud800b"}', "half a surrogate pair at character 1"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data"),
        (b"\x00" * 30, "not JSON"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:24],
)
def test_a_bad_line_is_named_or_skipped(
    tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture[str], line: bytes, reason: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD * 2 + b"\n" + line + b"\n" + GOOD)
    assert run(bpe, tmp_path, str(source)) == 1
    error = capsys.readouterr().err
    assert f"error: {source}:4: " in error
    assert reason in error
    assert "--skip-bad" in error
    assert not (tmp_path / "out").exists()
    assert run(bpe, tmp_path, str(source), "--skip-bad") == 0
    out = capsys.readouterr().out
    assert "bad lines:           1\n" in out
    assert f"left out {source}:4: " in out
    assert "documents:           3 " in out


def test_line_numbers_are_right_in_later_pieces(
    tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megastage.preprocess.inputs.MIN_PIECE_BYTES", 100)
    lines = [GOOD] * 200
    bad = [3, 90, 91, 199]
    for index in bad:
        lines[index] = b"bad\n"
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"".join(lines))
    assert run(bpe, tmp_path, str(source), "--skip-bad") == 0
    out = capsys.readouterr().out
    assert [line.split(":")[1] for line in out.splitlines() if "left out /" in line] == [str(i + 1) for i in bad]
    assert "bad lines:           4\n" in out


def test_bad_rows_of_parquet(tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": ["a", "b", None, "d"]}), source, row_group_size=2)
    assert run(bpe, tmp_path, str(source)) == 1
    assert f"{source}:row 3: field 'text' is null" in capsys.readouterr().err
    assert run(bpe, tmp_path, str(source), "--skip-bad") == 0
    assert "bad lines:           1\n" in capsys.readouterr().out


def make_input(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.jsonl", b"", "no text found (0 empty documents, 0 bad lines)"),
        ("in.jsonl", b'{"text": ""}\n', "no text found (1 empty documents, 0 bad lines)"),
        ("in.txt", b"", "no text found"),
        ("in.txt", "späť".encode("latin-1", "ignore"), "in.txt:1: not UTF-8 at byte 2"),
        ("in.txt", b"one\ntwo \xff\n", "in.txt:2: not UTF-8"),
        ("in.txt", "text".encode("utf-16"), "is UTF-16, not UTF-8; convert it: iconv"),
        ("in.jsonl", GOOD.decode().encode("utf-16"), "is UTF-16"),
        ("in.csv", b"a,b", "unknown ending; accepted are .txt, .jsonl"),
        ("in.parquet", b"PAR1 nonsense PAR1", "not a readable parquet file"),
        ("in.jsonl.gz", gzip.compress(GOOD * 1000, mtime=0)[:-20], "damaged gzip data"),
        ("in.jsonl.gz", b"not gzip", "damaged gzip data"),
        ("in.jsonl.gz", b"", "in.jsonl.gz: empty, and so no gz file"),
        ("in.txt.zst", b"", "in.txt.zst: empty, and so no zst file"),
        ("in.jsonl.zst", b"not zstd", "damaged zstd data"),
        ("in.txt.gz", gzip.compress(b"x\xff" * 1000, mtime=0), "in.txt.gz:1: not UTF-8"),
    ],
)
def test_unusable_files(
    tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    assert run(bpe, tmp_path, str(make_input(tmp_path, name, content))) == 1
    error = capsys.readouterr().err
    assert message in error
    assert name in error
    assert not (tmp_path / "out").exists()


def test_a_truncated_zstd_file(tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zstandard = pytest.importorskip("zstandard")
    content = zstandard.compress(os.urandom(300_000).hex().encode())
    source = make_input(tmp_path, "in.txt.zst", content[:-100])
    assert run(bpe, tmp_path, str(source)) == 1
    assert f"{source}: the zstd data end early" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jsonl"], "missing.jsonl: no such file or folder"),
        (["*.nothing"], "this pattern matches no file"),
        (["{tmp}/empty"], "no input files in this folder"),
        (["{tmp}/in.jsonl", "{tmp}/*.jsonl"], "in.jsonl: named twice"),
        (["{tmp}/in.parquet", "--text-field", "body"], "no column 'body'; it has text"),
        (["{tmp}/in.jsonl", "--text-field", "a.b"], "no field 'a', it has text"),
        (["{tmp}/in.jsonl", "--eos", "<nope>"], "'<nope>' is neither a token nor an id below 300"),
        (["{tmp}/in.jsonl", "--eos", "300"], "'300' is neither a token nor an id below 300"),
    ],
)
def test_unusable_arguments(
    tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    make_input(tmp_path, "in.jsonl", GOOD)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "in.parquet")
    assert run(bpe, tmp_path, *(a.replace("{tmp}", str(tmp_path)) for a in arguments)) == 1
    assert message in capsys.readouterr().err


def test_pipes_are_refused_and_links_to_outer_folders_left_out(
    tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert run(bpe, tmp_path, str(tmp_path / "pipe.jsonl")) == 1
    assert "pipe.jsonl: a pipe or device" in capsys.readouterr().err
    inner = tmp_path / "tree" / "inner"
    inner.mkdir(parents=True)
    (inner / "a.txt").write_text("once")
    (inner / "back").symlink_to(tmp_path / "tree")
    (inner / "self").symlink_to(".")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("linked")
    (inner / "other").symlink_to(tmp_path / "elsewhere")
    assert run(bpe, tmp_path, str(tmp_path / "tree")) == 0
    assert "documents:           2 " in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_file_name_and_any_text_can_be_shown(tmp_path: Path, bpe: Path, encoding: str) -> None:
    name = os.fsencode(tmp_path / "not utf-8 ") + b"\xff.jsonl"
    with open(name, "wb") as stream:
        stream.write('{"text": "Zürich 東京"}\nbroken\n'.encode())
    environment = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
    command = [sys.executable, "-m", "megastage.preprocess"]
    tokenize = [name, "--tokenizer", bpe, "--output", tmp_path / "out", "--workers", "1", "--skip-bad"]
    for arguments, expected in ((tokenize, b"\\udcff.jsonl:2: not JSON"), (["inspect", tmp_path / "out"], b"rich ")):
        result = subprocess.run([*command, *arguments], capture_output=True, env=environment, check=False)
        assert result.returncode == 0, result.stderr
        assert expected in result.stdout


def test_a_tokenizer_without_end_of_document(tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(bpe.read_text())
    content["added_tokens"][0]["content"] = "<none>"
    content["model"]["vocab"]["<none>"] = content["model"]["vocab"].pop("<|endoftext|>")
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(content))
    source = str(make_input(tmp_path, "in.jsonl", GOOD))
    assert run(bpe, tmp_path, source, tokenizer=str(other)) == 1
    assert "names no end-of-document token; give one with --eos" in capsys.readouterr().err
    assert run(bpe, tmp_path, source, "--eos", "<none>", tokenizer=str(other)) == 0
    assert np.fromfile(tmp_path / "out" / "tokens.bin", dtype="<u2")[-1] == content["model"]["vocab"]["<none>"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["in.jsonl", "--tokenizer", "t"],
        ["in.jsonl", "--output", "o"],
        ["in.jsonl", "--output", "o", "--tokenizer", "t", "--train-tokenizer", "300"],
        ["in.jsonl", "--output", "o", "--tokenizer", "t", "--workers", "0"],
        ["in.jsonl", "--output", "o", "--tokenizer", "t", "--format", "arrow"],
        ["in.jsonl", "--output", "o", "--tokenizer", "t", "--eos", "1", "--no-eos"],
        ["verify"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: megastage-preprocess" in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argument in ("--help", "--version"):
        with pytest.raises(SystemExit) as stop:
            main([argument])
        assert stop.value.code == 0
    assert "train-tokenizer" in capsys.readouterr().out


def test_an_output_that_exists_is_refused_before_any_work(
    tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(make_input(tmp_path, "in.jsonl", GOOD))
    assert run(bpe, tmp_path, source) == 0
    before = (tmp_path / "out" / "metadata.json").stat().st_mtime_ns
    assert run(bpe, tmp_path, source) == 1
    assert "exists already; choose another output or overwrite it on purpose (--overwrite)" in capsys.readouterr().err
    assert run(bpe, tmp_path, "missing.jsonl", "--overwrite") == 1
    assert (tmp_path / "out" / "metadata.json").stat().st_mtime_ns == before
    assert run(bpe, tmp_path, source, "--overwrite") == 0
    assert run(bpe, tmp_path, source, "--overwrite", "--format", "nanoset") == 1
    assert "is not replaced" in capsys.readouterr().err


def test_two_runs_at_once_on_one_output(tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    (tmp_path / ".out.work").mkdir()
    with open(tmp_path / ".out.work" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(bpe, tmp_path, str(make_input(tmp_path, "in.jsonl", GOOD))) == 1
    assert "another run is writing this output" in capsys.readouterr().err


def test_a_full_disk_is_a_clear_error(
    tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr("megastage.data.packed_memmap.fsync_path", full)
    assert run(bpe, tmp_path, str(make_input(tmp_path, "in.jsonl", GOOD))) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


def test_input_that_changes_meanwhile(
    tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_input(tmp_path, "in.jsonl", GOOD)

    def touch(*_: object) -> dict[int, object]:
        source.write_bytes(GOOD * 2)
        from megastage.preprocess.pool import _run_here

        return _run_here(*_)  # type: ignore[arg-type, return-value]

    monkeypatch.setattr("megastage.preprocess.pipeline.run_pieces", lambda p, s, w, f: touch(p, s, f))
    assert run(bpe, tmp_path, str(source)) == 1
    assert f"{source}: changed while it was being read" in capsys.readouterr().err
