"""Conversions there and back byte for byte; inspect, verify and merge; damage named."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megastage.data.packed_memmap import PackedMemmapWriter, TokenizerFacts, open_packed_memmap
from megastage.preprocess.__main__ import main
from megastage.preprocess.datasets import open_data
from megastage.preprocess.nanoset import human_count

PACKED = ("tokens.bin", "documents.bin", "pages.crc32")
NANOSET = ("tokens.ds", "tokens.ds.index", "tokens.ds.metadata")


def packed(folder: Path, dtype: str = "uint16", eos: int | None = 0, name: str = "toy") -> Path:
    rng = np.random.default_rng(1)
    facts = TokenizerFacts(name, "cd" * 32, 70_000 if dtype == "uint32" else 500)
    with PackedMemmapWriter(folder, dtype, eos_id=eos, tokenizer=facts) as writer:
        for length in (3, 1, 200, 50):
            writer.append([*rng.integers(1, facts.vocab_size or 1, length).tolist(), *([] if eos is None else [eos])])
    return folder


def same(a: Path, b: Path, names: tuple[str, ...]) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("way", ["nanoset", "megatron"])
def test_there_and_back_is_byte_equal(tmp_path: Path, dtype: str, way: str) -> None:
    start = packed(tmp_path / "start", dtype)
    assert main(["convert", str(start), str(tmp_path / "there"), "--to", way]) == 0
    assert main(["convert", str(tmp_path / "there"), str(tmp_path / "back"), "--to", "packed_memmap"]) == 0
    assert same(start, tmp_path / "back", PACKED)
    metadata = open_packed_memmap(tmp_path / "back").metadata
    assert (metadata.dtype, metadata.eos_id) == (dtype, 0)
    assert main(["convert", str(tmp_path / "back"), str(tmp_path / "again"), "--to", way]) == 0
    if way == "nanoset":
        assert same(tmp_path / "there", tmp_path / "again", NANOSET)
        assert (
            (tmp_path / "there" / "tokens.ds.metadata").read_text().startswith(f"toy|{2 if dtype == 'uint16' else 4}\n")
        )
    else:
        for suffix in ("bin", "idx"):
            assert (tmp_path / f"there.{suffix}").read_bytes() == (tmp_path / f"again.{suffix}").read_bytes()


def test_megatron_bytes_by_hand(tmp_path: Path) -> None:
    with PackedMemmapWriter(tmp_path / "p", "uint32") as writer:
        for document in ([70_000, 1], [2], [], [3, 4, 5]):
            writer.append(np.array(document, dtype=np.int64))
    assert main(["convert", str(tmp_path / "p"), str(tmp_path / "m"), "--to", "megatron"]) == 0
    want = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 4, 5) + struct.pack("<4i", 2, 1, 0, 3)
    want += struct.pack("<4q", 0, 8, 12, 12) + struct.pack("<5q", 0, 1, 2, 3, 4)
    assert (tmp_path / "m.idx").read_bytes() == want
    assert (tmp_path / "m.bin").read_bytes() == struct.pack("<6i", 70_000, 1, 2, 3, 4, 5)


def test_a_megatron_file_of_several_sequences_a_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.bin").write_bytes(struct.pack("<6q", 1, 2, 3, 4, 5, 6))
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 5, 3, 3) + struct.pack("<3i", 2, 1, 3)
    (tmp_path / "m.idx").write_bytes(index + struct.pack("<3q", 0, 16, 24) + struct.pack("<3q", 0, 2, 3))
    assert main(["convert", str(tmp_path / "m.idx"), str(tmp_path / "p"), "--to", "packed_memmap"]) == 0
    data = open_packed_memmap(tmp_path / "p")
    assert (data.metadata.dtype, data.tokens.tolist(), data.doc_ends.tolist()) == ("uint16", [1, 2, 3, 4, 5, 6], [3, 6])
    out = capsys.readouterr().out
    assert f"note: {tmp_path / 'm.idx'}: its int64 tokens become uint16\n" in out
    assert f"note: {tmp_path / 'm.idx'}: its 3 sequences are joined to 2 documents\n" in out


@pytest.mark.parametrize("way", ["nanoset", "megatron", "packed_memmap"])
def test_small_steps_give_the_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    start = packed(tmp_path / "start")
    assert main(["inspect", str(start)]) == 0
    shown = capsys.readouterr().out
    monkeypatch.setattr("megastage.preprocess.datasets._CHUNK_TOKENS", 60)  # a document is longer
    monkeypatch.setattr("megastage.preprocess.datasets._CHUNK_DOCUMENTS", 2)
    monkeypatch.setattr("megastage.preprocess.describe._STEP_TOKENS", 7)
    assert [lengths.tolist() for _, lengths in open_data(str(start)).documents()] == [[4, 2], [201], [51]]
    assert main(["inspect", str(start)]) == 0
    assert capsys.readouterr().out == shown
    assert main(["convert", str(start), str(tmp_path / "there"), "--to", way]) == 0
    assert main(["convert", str(tmp_path / "there"), str(tmp_path / "back"), "--to", "packed_memmap"]) == 0
    assert same(start, tmp_path / "back", PACKED)


def test_a_folder_of_megatron_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, tokens in (("b", [4, 5]), ("a", [1, 2, 3])):
        with PackedMemmapWriter(tmp_path / name, "uint16") as writer:
            writer.append(tokens)
        assert main(["convert", str(tmp_path / name), str(tmp_path / "many" / name), "--to", "megatron"]) == 0
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "many"), str(tmp_path / "one"), "--to", "packed_memmap"]) == 0
    assert "note:" not in capsys.readouterr().out
    assert open_packed_memmap(tmp_path / "one").doc_ends.tolist() == [3, 5]
    assert main(["inspect", str(tmp_path / "many")]) == 0
    assert "2 token files" in capsys.readouterr().out


def test_merge_and_its_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = packed(tmp_path / "a"), packed(tmp_path / "b")
    assert main(["merge", str(a), str(b), "--output", str(tmp_path / "ab")]) == 0
    one, both = open_packed_memmap(a), open_packed_memmap(tmp_path / "ab")
    assert both.tokens.tolist() == one.tokens.tolist() * 2
    assert both.doc_ends.tolist() == [*one.doc_ends.tolist(), *(one.doc_ends + one.tokens.size).tolist()]
    assert both.metadata.tokenizer == one.metadata.tokenizer
    capsys.readouterr()
    for other, word in (
        (packed(tmp_path / "c", "uint32"), "dtype"),
        (packed(tmp_path / "d", eos=None), "eos_id"),
        (packed(tmp_path / "e", name="other"), "tokenizer"),
    ):
        assert main(["merge", str(a), str(other), "--output", str(tmp_path / "no")]) == 1
        assert f"{other}: {word} is " in capsys.readouterr().err
        assert not (tmp_path / "no").exists()
    assert main(["merge", str(a), str(b), "--output", str(a), "--overwrite"]) == 1
    assert "is one of the inputs" in capsys.readouterr().err
    assert open_packed_memmap(a).tokens.tolist() == one.tokens.tolist()


def test_verify_names_the_first_bad_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = packed(tmp_path / "a")
    assert main(["verify", str(folder)]) == 0
    assert "4 documents, 258 tokens: every checksum" in capsys.readouterr().out
    content = bytearray((folder / "tokens.bin").read_bytes())
    content[100] ^= 4
    (folder / "tokens.bin").write_bytes(content)
    assert main(["verify", str(folder)]) == 1
    assert f"{folder / 'tokens.bin'}: page 0 (tokens 0 to 258)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["convert", "{data}", "{out}", "--to", "packed_memmap"],
        ["convert", "{data}", "{out}", "--to", "nanoset"],
        ["merge", "{sound}", "{data}", "--output", "{out}"],
        ["pack", "{data}", "--seq-len", "64", "--output", "{out}"],
    ],
    ids=lambda command: "-".join(part for part in command if "{" not in part),
)
def test_damage_is_not_given_new_checksums(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    sound, data = packed(tmp_path / "sound"), packed(tmp_path / "data")
    content = bytearray((data / "tokens.bin").read_bytes())
    content[100] ^= 4
    (data / "tokens.bin").write_bytes(content)
    assert main([part.format(data=data, sound=sound, out=tmp_path / "out") for part in command]) == 1
    assert f"{data / 'tokens.bin'}: page 0" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"sound", "data"}


def test_verify_looks_at_the_copy_of_the_tokenizer(
    tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("the cat sat")
    data = tmp_path / "data"
    assert main([str(tmp_path / "in.txt"), "--tokenizer", str(bpe), "--output", str(data), "--workers", "1"]) == 0
    assert main(["verify", str(data)]) == 0
    content = json.loads((data / "tokenizer.json").read_text("utf-8"))
    content["model"]["merges"][:2] = content["model"]["merges"][1::-1]
    (data / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    assert main(["verify", str(data)]) == 1
    assert f"{data / 'tokenizer.json'}: sha256 " in capsys.readouterr().err


def test_inspect_counts_right(
    tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = ["the cat", "the cat sat " * 100, "東京 Zürich"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert main(["in.jsonl", "--tokenizer", str(bpe), "--output", "data", "--workers", "1"]) == 0
    data = open_packed_memmap("data")
    capsys.readouterr()
    assert main(["inspect", "data", "--samples", "3", "--histogram", "h.png"]) == 0
    out = capsys.readouterr().out
    lengths = np.diff(data.doc_ends.astype(int), prepend=0)
    assert f"longest {lengths.max():,}" in out
    assert f"median {sorted(lengths)[1]:,}" in out
    assert f"{len(set(data.tokens.tolist())):,} different ones, the largest {data.tokens.max()}" in out
    assert "id 0, '<|endoftext|>'" in out
    assert "東京 Zürich<|endoftext|>" in out
    assert sum(int(line.split(" documents")[0].split()[-1]) for line in out.splitlines() if " and up " in line) == 3
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0.00 T"),
        (7, "7.00 T"),
        (999, "999 T"),
        (1000, "1.00 kT"),
        (9_178_421, "9.18 MT"),
        (25_600_000_000, "25.6 GT"),
    ],
)
def test_the_human_count_of_a_nanoset(count: int, text: str) -> None:
    assert human_count(count) == text


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["nanoset", "megatron"]))
def test_damaged_index_files_are_clear_errors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str
) -> None:
    folder = tmp_path_factory.mktemp("damage")
    packed(folder / "start")
    main(["convert", str(folder / "start"), str(folder / "x"), "--to", kind])
    names = ["x.bin", "x.idx"] if kind == "megatron" else [f"x/{name}" for name in NANOSET]
    file = folder / data.draw(st.sampled_from(names))
    content = file.read_bytes()
    if data.draw(st.booleans()) or file.suffix in (".bin", ".ds"):
        cut = data.draw(st.integers(1, len(content)))
        content = content[:-cut]
        if file.name.endswith("metadata") and len(content.split(b"\n")) > 1 and content.split(b"\n")[1] == b"258":
            return  # only the count for people is gone
    else:
        position = data.draw(st.integers(0, len(content) * 8 - 1))
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        content = bytes(flipped)
    file.write_bytes(content)
    problem, opened = None, None
    try:
        opened = open_data(str(folder / "x"))
    except ValueError as error:
        problem = str(error)
    if opened is None:
        assert problem is not None
        assert str(folder) in problem
        return
    # What no checksum guards may pass, but then it must hang together.
    assert opened.n_tokens == 258
    assert int(opened.lengths().sum()) == 258
    assert int(opened.lengths().min()) >= 0
    shutil.rmtree(folder)
