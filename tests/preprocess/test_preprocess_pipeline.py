"""Text to data sets: tokens compared with the tokenizers library itself, read back by hand."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from megastage.data.long_text import stretches
from megastage.data.tokenizer import load_tokenizer
from megastage.preprocess.__main__ import main

ROOT = Path(__file__).parents[2]
WORDS = ["the", "cat", "sat", "Zürich", "東京", "😀", "counted", "1234", "sheep;", "f(x):\n", "", "", "x**2\r\n"]


def texts(count: int, seed: int = 0, words: int = 60) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, words))) for _ in range(count)]


def write_jsonl(path: Path, rows: list[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, field: row}) + "\n" for i, row in enumerate(rows)), encoding="utf-8")
    return path


@pytest.fixture
def tokenize(tmp_path: Path, bpe: Path) -> Callable[..., Path]:
    def run(*arguments: object, output: str = "out") -> Path:
        folder = tmp_path / output
        code = main([str(a) for a in arguments] + ["--tokenizer", str(bpe), "--output", str(folder), "--workers", "1"])
        assert code == 0
        return folder

    return run


def expected(bpe: Path, rows: list[str], eos: bool = True) -> tuple[list[int], list[int]]:
    """(tokens, document ends) straight from the library."""
    library = tokenizers.Tokenizer.from_file(str(bpe))
    end = [library.token_to_id("<|endoftext|>")] if eos else []
    tokens: list[int] = []
    ends = []
    for row in rows:
        if row:
            tokens += library.encode(row, add_special_tokens=False).ids + end
            ends.append(len(tokens))
    return tokens, ends


def read_packed(folder: Path) -> tuple[list[int], list[int]]:
    width = json.loads((folder / "metadata.json").read_text())["dtype"]
    tokens = np.fromfile(folder / "tokens.bin", dtype={"uint16": "<u2", "uint32": "<u4"}[width])
    return tokens.tolist(), np.fromfile(folder / "documents.bin", dtype="<u8").tolist()


def read_nanoset(folder: Path) -> tuple[list[int], list[int]]:
    (file,) = folder.glob("*.ds")
    name, count, _ = Path(f"{file}.metadata").read_text().split("\n")
    tokens = np.fromfile(file, dtype=f"<u{name.split('|')[1]}")
    assert tokens.size == int(count)
    return tokens.tolist(), np.fromfile(f"{file}.index", dtype="<u8").tolist()


def test_both_formats_hold_the_tokens_of_the_library(tmp_path: Path, bpe: Path, tokenize: Callable[..., Path]) -> None:
    rows = [*texts(50), "", " ", "\n\n", "東京" * 50, texts(1)[0]]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    want = expected(bpe, rows)
    assert read_packed(tokenize(source)) == want
    assert read_nanoset(tokenize(source, "--format", "nanoset", output="nano")) == want
    lines = (tmp_path / "nano" / "tokens.ds.metadata").read_text().split("\n")
    assert lines[0] == "toy|2"
    assert lines[2].endswith(" kT")
    assert read_packed(tokenize(source, "--no-eos", output="bare")) == expected(bpe, rows, eos=False)
    metadata = json.loads((tmp_path / "bare" / "metadata.json").read_text())
    assert metadata["eos_id"] is None
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "ndjson", "json"])
def test_every_kind_of_file_gives_the_same_tokens(
    tmp_path: Path, bpe: Path, tokenize: Callable[..., Path], ending: str
) -> None:
    rows = texts(40, seed=3)
    source = tmp_path / f"in.{ending}"
    plain = write_jsonl(tmp_path / "plain", rows).read_bytes()
    if ending == "parquet":
        pq.write_table(pa.table({"id": list(range(40)), "text": rows}), source, row_group_size=7)
    elif ending.endswith("gz"):
        half = len(plain) // 2  # two members, as `cat a.gz b.gz` makes
        source.write_bytes(gzip.compress(plain[:half]) + gzip.compress(plain[half:]))
    elif ending.endswith("zst"):
        zstandard = pytest.importorskip("zstandard")
        half = len(plain) // 2
        source.write_bytes(b"".join(zstandard.compress(part) for part in (plain[:half], plain[half:])))
    else:
        source.write_bytes(plain)
    assert read_packed(tokenize(source)) == expected(bpe, rows)


def test_nested_fields_in_json_and_parquet(tmp_path: Path, bpe: Path, tokenize: Callable[..., Path]) -> None:
    rows = texts(9, seed=4)
    lines = [json.dumps({"doc": {"body": {"raw": row}}}) for row in rows]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    table = pa.table({"doc": [{"body": {"raw": row}} for row in rows]})
    pq.write_table(table, tmp_path / "in.parquet")
    want = expected(bpe, rows)
    assert read_packed(tokenize(tmp_path / "in.jsonl", "--text-field", "doc.body.raw")) == want
    assert read_packed(tokenize(tmp_path / "in.parquet", "--text-field", "doc.body.raw", output="p")) == want
    (tmp_path / "flat.jsonl").write_text(json.dumps({"doc.body.raw": rows[0]}))
    flat = tokenize(tmp_path / "flat.jsonl", "--text-field", "doc.body.raw", output="f")
    assert read_packed(flat) == expected(bpe, rows[:1])


def test_text_files(tmp_path: Path, bpe: Path, tokenize: Callable[..., Path]) -> None:
    (tmp_path / "in" / "b").mkdir(parents=True)
    (tmp_path / "in" / "b" / "two.txt").write_bytes(b"zwei\r\nZeilen\n")
    (tmp_path / "in" / "one.txt").write_bytes(b"\xef\xbb\xbf" + "mit BOM: Zürich".encode())
    (tmp_path / "in" / "empty.txt").write_bytes(b"")
    (tmp_path / "in" / "notes.md").write_text("not read")
    (tmp_path / "in" / ".hidden.txt").write_text("not read")
    (tmp_path / "in" / "a.txt.gz").write_bytes(gzip.compress(b"compressed text"))
    want = ["compressed text", "mit BOM: Zürich", "zwei\r\nZeilen\n"]
    assert read_packed(tokenize(tmp_path / "in")) == expected(bpe, want)
    want = ["compressed text", "mit BOM: Zürich", "zwei", "Zeilen"]
    assert read_packed(tokenize(tmp_path / "in", "--txt-lines", output="lines")) == expected(bpe, want)


def test_json_lines_with_bom_crlf_blank_lines_and_no_last_newline(
    tmp_path: Path, bpe: Path, tokenize: Callable[..., Path]
) -> None:
    content = b'\xef\xbb\xbf{"text": "eins"}\r\n\r\n   \r\n{"text": "zw\\u00f6i"}\r\n{"text": "drei"}'
    (tmp_path / "in.jsonl").write_bytes(content)
    assert read_packed(tokenize(tmp_path / "in.jsonl")) == expected(bpe, ["eins", "zwöi", "drei"])


@pytest.mark.parametrize("newlines", [True, False])
def test_long_documents_keep_the_tokens_of_the_whole(
    tmp_path: Path, bpe: Path, tokenize: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, newlines: bool
) -> None:
    monkeypatch.setattr("megastage.data.long_text.LONG_CHARACTERS", 4000)
    monkeypatch.setattr("megastage.preprocess.readers.STREAM_BYTES", 1000)
    monkeypatch.setattr("megastage.preprocess.readers.BLOCK_BYTES", 777)  # splits UTF-8 sequences
    words = texts(400, seed=5)
    long = "\n".join(words) if newlines else "".join(words).replace("\n", "").replace(" ", "")
    source = write_jsonl(tmp_path / "in.jsonl", ["short", long, "short again"])
    (tmp_path / "long.txt").write_text(long, encoding="utf-8", newline="")
    assert read_packed(tokenize(source)) == expected(bpe, ["short", long, "short again"])
    assert read_packed(tokenize(tmp_path / "long.txt", output="txt")) == expected(bpe, [long])


@pytest.mark.parametrize("join", ["\n", " ", "\n    ", "1 "])
def test_long_text_is_cut_into_bounded_stretches(bpe: Path, monkeypatch: pytest.MonkeyPatch, join: str) -> None:
    monkeypatch.setattr("megastage.data.long_text.LONG_CHARACTERS", 2000)
    text = join.join(["some words, a line; 12 numbers", "x = [1, 2]", "Zürich liegt am See"] * 1000)
    chunks = [text[i : i + 700] for i in range(0, len(text), 700)]
    parts = list(stretches(iter(chunks), load_tokenizer(bpe)))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 4000 + 700
    library = tokenizers.Tokenizer.from_file(str(bpe))
    assert [i for part in parts for i in library.encode(part).ids] == library.encode(text).ids


def big_input(tmp_path: Path, count: int = 3000) -> list[str]:
    """Several pieces: a line file with a huge line in it, and small files."""
    rows = texts(count, seed=6, words=150)
    rows.insert(count // 2, "huge " * 100 * count)
    write_jsonl(tmp_path / "in" / "a.jsonl", rows)
    for i in range(5):
        (tmp_path / "in" / f"b{i}.txt").write_text(rows[i], encoding="utf-8", newline="")
    pq.write_table(pa.table({"text": rows[:100]}), tmp_path / "in" / "c.parquet", row_group_size=10)
    return rows + rows[:5] + rows[:100]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megastage.preprocess.inputs.MIN_PIECE_BYTES", 1 << 13)
    rows = big_input(tmp_path, 200)
    results = []
    for workers in ("1", "2", "3"):
        output = tmp_path / f"out{workers}"
        arguments = [str(tmp_path / "in"), "--tokenizer", str(bpe), "--output", str(output), "--workers", workers]
        assert main(arguments) == 0
        results.append(files_of(output))
    assert results[0] == results[1] == results[2]
    assert read_packed(tmp_path / "out1") == expected(bpe, rows)


def kill_and_rerun(tmp_path: Path, bpe: Path, workers: str, kind: str) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "tools.preprocess", str(tmp_path / "in"), "--tokenizer", str(bpe)]
    command += ["--format", kind, "--workers", workers, "--output"]
    subprocess.run([*command, str(tmp_path / "whole")], cwd=ROOT, check=True, capture_output=True)
    process = subprocess.Popen([*command, str(output)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work = tmp_path / ".out.work"
    deadline = time.monotonic() + 60
    while not list(work.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    workers_running = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(workers_running, timeout=5)[1], "workers outlive a killed run"
    assert list(work.glob("*.json")), "killed too early to prove anything"
    assert not output.exists(), "killed too late to prove anything"
    again = subprocess.run([*command, str(output)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "going on with an earlier run" in again.stdout
    assert files_of(output) == files_of(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, bpe: Path) -> None:
    big_input(tmp_path)
    kill_and_rerun(tmp_path, bpe, "2", "packed_memmap")


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kind"), [("1", "nanoset"), ("3", "packed_memmap"), ("2", "nanoset")])
def test_a_killed_run_goes_on_in_other_ways(tmp_path: Path, bpe: Path, workers: str, kind: str) -> None:
    big_input(tmp_path)
    kill_and_rerun(tmp_path, bpe, workers, kind)


def test_a_damaged_piece_is_made_again(
    tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megastage.preprocess.inputs.MIN_PIECE_BYTES", 1 << 12)
    rows = texts(200, seed=9)
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    arguments = [str(source), "--tokenizer", str(bpe), "--output", str(tmp_path / "out"), "--workers", "1"]

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("megastage.preprocess.pipeline._assemble", full_disk)
        assert main(arguments) == 1
    tokens = sorted((tmp_path / ".out.work").glob("*.tokens"))
    content = bytearray(tokens[0].read_bytes())
    content[7] ^= 1
    tokens[0].write_bytes(content)
    tokens[1].with_suffix(".lengths").write_bytes(b"")
    tokens[2].with_suffix(".json").write_text("{")
    capsys.readouterr()
    assert main(arguments) == 0
    assert f"{len(tokens) - 3} of {len(tokens)} pieces are done" in capsys.readouterr().out
    assert read_packed(tmp_path / "out") == expected(bpe, rows)


def test_finished_pieces_are_reused_only_for_the_same_work(
    tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = texts(3000, seed=8, words=120)
    source = write_jsonl(tmp_path / "in" / "a.jsonl", rows)
    more = write_jsonl(tmp_path / "in" / "b.jsonl", ["fine", "also fine"])
    with more.open("a") as stream:
        stream.write("{bad\n")
    arguments = [str(tmp_path / "in"), "--tokenizer", str(bpe), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 1
    assert f"{more}:3: not JSON" in capsys.readouterr().err
    done = len(list((tmp_path / ".out.work").glob("*.json")))
    assert done >= 1
    assert main([*arguments, "--eos", "5", "--skip-bad"]) == 0  # another end of document: nothing fits
    assert "going on" not in capsys.readouterr().out
    assert main([*arguments, "--overwrite"]) == 1
    capsys.readouterr()
    assert main([*arguments, "--overwrite", "--skip-bad"]) == 0
    assert f"{done} of" in capsys.readouterr().out
    assert read_packed(tmp_path / "out") == expected(bpe, [*rows, "fine", "also fine"])
    assert source.exists()


def test_a_worker_that_is_killed_is_a_clear_error(tmp_path: Path, bpe: Path) -> None:
    big_input(tmp_path)
    command = [sys.executable, "-m", "megastage.preprocess", str(tmp_path / "in"), "--tokenizer", str(bpe)]
    command += ["--workers", "2", "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / ".out.work").glob("*.tmp*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    worker = int(next((tmp_path / ".out.work").glob("*.tmp*")).suffix.removeprefix(".tmp"))
    os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors.startswith("error: a worker process died")
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("awaited", ["lock", "*.tmp*"], ids=["while workers start", "while they work"])
def test_ctrl_c_is_clean_and_the_run_can_go_on(tmp_path: Path, bpe: Path, awaited: str) -> None:
    big_input(tmp_path)
    command = [sys.executable, "-m", "megastage.preprocess", str(tmp_path / "in"), "--tokenizer", str(bpe)]
    command += ["--workers", "2", "--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # a shell's background jobs, and all they start, ignore SIGINT; a terminal's do not
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list((tmp_path / ".out.work").glob(awaited)) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal sends
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.strip() == "interrupted; the same command goes on from here"
    assert not (tmp_path / "out").exists()
