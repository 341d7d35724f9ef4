"""The packed_memmap format: its bytes read by hand, and damage of every kind named."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megastage.data.packed_memmap import (
    PackedMemmapError,
    PackedMemmapWriter,
    TokenizerFacts,
    open_packed_memmap,
    verify,
)

FACTS = TokenizerFacts("toy", "ab" * 32, 60000)
RELAXED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def write(folder: Path, documents: list[list[int]], dtype: str = "uint16", **options: object) -> Path:
    with PackedMemmapWriter(folder, dtype, tokenizer=FACTS, page_bytes=64, **options) as writer:  # type: ignore[arg-type]
        for document in documents:
            writer.append(document)
    return folder


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 60000, n).tolist() for n in (5, 1, 300, 77, 2)]
    return write(tmp_path_factory.mktemp("packed") / "data", documents, eos_id=7)


@RELAXED
@given(
    documents=st.lists(st.lists(st.integers(0, 59999), max_size=80), min_size=1, max_size=12).filter(any),
    dtype=st.sampled_from(["uint16", "uint32"]),
)
def test_bytes_on_disk_are_the_documented_ones(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], dtype: str
) -> None:
    folder = write(tmp_path_factory.mktemp("bytes") / "d", documents, dtype)
    flat = [token for document in documents for token in document]
    width = 2 if dtype == "uint16" else 4
    raw = b"".join(token.to_bytes(width, "little") for token in flat)
    assert (folder / "tokens.bin").read_bytes() == raw
    ends, total = [], 0
    for document in documents:
        total += len(document)
        ends.append(total.to_bytes(8, "little"))
    assert (folder / "documents.bin").read_bytes() == b"".join(ends)
    pages = [zlib.crc32(raw[i : i + 64]).to_bytes(4, "little") for i in range(0, len(raw), 64)]
    assert (folder / "pages.crc32").read_bytes() == b"".join(pages)
    metadata = json.loads((folder / "metadata.json").read_text())
    assert (metadata["format"], metadata["version"], metadata["dtype"]) == ("megastage.packed_memmap", 1, dtype)
    assert (metadata["n_tokens"], metadata["n_documents"]) == (len(flat), len(documents))
    assert metadata["documents_crc32"] == zlib.crc32(b"".join(ends))
    assert metadata["pages_crc32"] == zlib.crc32(b"".join(pages))
    data = verify(folder)
    assert [data.document(i).tolist() for i in range(len(documents))] == documents


def test_pages_are_the_same_however_the_tokens_arrive(tmp_path: Path) -> None:
    tokens = np.arange(1000) % 500
    whole = write(tmp_path / "whole", [tokens.tolist()])
    with PackedMemmapWriter(tmp_path / "parts", "uint16", tokenizer=FACTS, page_bytes=64) as writer:
        writer.extend(tokens, [1000])
    for name in ("tokens.bin", "documents.bin", "pages.crc32", "metadata.json"):
        assert (whole / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


@pytest.mark.parametrize(
    ("documents", "dtype", "message"),
    [
        ([[1, 65536]], "uint16", "token 65536 is outside 0 .. 59999"),
        ([[1, 60000]], "uint32", "token 60000 is outside 0 .. 59999"),
        ([[-1]], "uint16", "token -1 is outside"),
        ([[]], "uint16", "no tokens were written"),
        ([[1]], "int64", "dtype 'int64'"),
    ],
)
def test_a_writer_refuses_and_leaves_nothing(
    tmp_path: Path, documents: list[list[int]], dtype: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "d", documents, dtype)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_asked(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", [[1, 2, 3]])
    with pytest.raises(ValueError, match="exists already"):
        write(folder, [[4]])
    assert open_packed_memmap(folder).tokens.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="outside"):
        write(folder, [[9], [-1]], overwrite=True)
    assert verify(folder).tokens.tolist() == [1, 2, 3]
    write(folder, [[4]], overwrite=True)
    assert verify(folder).tokens.tolist() == [4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]


def test_foreign_files_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.txt"):
        write(tmp_path / "home", [[1]], overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


def test_a_death_between_the_two_renames_is_repaired(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", [[1, 2, 3]])
    folder.rename(tmp_path / ".d.replaced")
    with pytest.raises(ValueError, match="exists already"):
        write(folder, [[4]])
    assert verify(folder).tokens.tolist() == [1, 2, 3]


def test_a_folder_without_metadata_is_incomplete(sample: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sample, tmp_path / "copy")
    (copy / "metadata.json").unlink()
    with pytest.raises(PackedMemmapError, match=r"metadata\.json: missing, so this is no complete"):
        open_packed_memmap(copy)


@RELAXED
@given(name=st.sampled_from(["tokens.bin", "documents.bin", "pages.crc32", "metadata.json"]), data=st.data())
def test_every_flipped_bit_is_found_and_named(
    sample: Path, tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    copy = shutil.copytree(sample, tmp_path_factory.mktemp("flip") / "copy")
    content = bytearray((copy / name).read_bytes())
    position = data.draw(st.integers(0, len(content) * 8 - 1))
    content[position // 8] ^= 1 << position % 8
    (copy / name).write_bytes(content)
    if name == "metadata.json":
        try:  # a flip of white space may leave the content equal
            if json.loads(content) == json.loads((sample / name).read_bytes()):
                return
        except ValueError:
            pass
    with pytest.raises(PackedMemmapError, match=name.replace(".", r"\.")):
        verify(copy)
    if name == "tokens.bin":
        open_packed_memmap(copy)  # opening reads no tokens
        with pytest.raises(PackedMemmapError, match=f"page {position // 8 // 64} "):
            verify(copy)


@RELAXED
@given(
    name=st.sampled_from(["tokens.bin", "documents.bin", "pages.crc32", "metadata.json"]),
    change=st.integers(-2000, 40).filter(bool),
)
def test_every_other_length_is_found_and_named(
    sample: Path, tmp_path_factory: pytest.TempPathFactory, name: str, change: int
) -> None:
    copy = shutil.copytree(sample, tmp_path_factory.mktemp("cut") / "copy")
    content = (copy / name).read_bytes()
    cut = content[: max(0, len(content) + change)] if change < 0 else content + b"\1" * change
    if cut.strip() == content.strip():
        return
    (copy / name).write_bytes(cut)
    with pytest.raises(PackedMemmapError, match=name.replace(".", r"\.")):
        open_packed_memmap(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format is 'other'"),
        ({"version": 2}, "version 2, this program reads version 1"),
        ({"dtype": "int32"}, "dtype 'int32'"),
        ({"n_tokens": 386}, r"tokens\.bin: 770 bytes.*records 386 n_tokens.*truncated"),
        ({"n_tokens": -1}, "n_tokens is -1"),
        ({"n_tokens": True}, "n_tokens is True"),
        ({"page_bytes": 0}, "page_bytes is 0"),
        ({"eos_id": "x"}, "eos_id is 'x'"),
        ({"tokenizer": {"name": "x"}}, "tokenizer is"),
    ],
)
def test_wrong_metadata_with_a_right_checksum(
    sample: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    copy = shutil.copytree(sample, tmp_path / "copy")
    content = json.loads((copy / "metadata.json").read_text()) | change
    del content["crc32"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    (copy / "metadata.json").write_text(json.dumps(content | {"crc32": zlib.crc32(canonical.encode())}))
    with pytest.raises(PackedMemmapError, match=message):
        open_packed_memmap(copy)


@pytest.mark.parametrize("content", [b"[" * 200000, b"[]", b"null", b"\xff\xfe", b" " * (2 << 20), b""])
def test_hostile_metadata(sample: Path, tmp_path: Path, content: bytes) -> None:
    copy = shutil.copytree(sample, tmp_path / "copy")
    (copy / "metadata.json").write_bytes(content)
    with pytest.raises(PackedMemmapError, match=r"metadata\.json"):
        open_packed_memmap(copy)
