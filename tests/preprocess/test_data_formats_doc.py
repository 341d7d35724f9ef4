"""packed_memmap read and written by nothing but docs/data-formats.md: no code of the project takes part."""

import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from megastage.data.packed_memmap import open_packed_memmap, verify
from megastage.preprocess.__main__ import main


def canonical_crc32(content: dict[str, Any]) -> int:
    others = {key: value for key, value in content.items() if key != "crc32"}
    return zlib.crc32(json.dumps(others, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii"))


def read(folder: Path) -> tuple[list[list[int]], dict[str, Any]]:
    """(documents, metadata) after the page, with everything checked that it says can be checked."""
    metadata = json.loads((folder / "metadata.json").read_bytes().decode("ascii"))
    assert metadata["format"] == "megastage.packed_memmap"
    assert metadata["version"] == 1
    assert metadata["crc32"] == canonical_crc32(metadata)
    letter, width = {"uint16": ("H", 2), "uint32": ("I", 4)}[metadata["dtype"]]
    raw, index, pages = ((folder / name).read_bytes() for name in ("tokens.bin", "documents.bin", "pages.crc32"))
    assert len(raw) == metadata["n_tokens"] * width
    assert len(index) == metadata["n_documents"] * 8
    assert zlib.crc32(index) == metadata["documents_crc32"]
    assert zlib.crc32(pages) == metadata["pages_crc32"]
    size = metadata["page_bytes"]
    assert size % 4 == 0
    checksums = [zlib.crc32(raw[i : i + size]) for i in range(0, len(raw), size)]
    assert pages == struct.pack(f"<{len(checksums)}I", *checksums)
    tokens = struct.unpack(f"<{metadata['n_tokens']}{letter}", raw)
    ends = struct.unpack(f"<{metadata['n_documents']}Q", index)
    assert ends[-1] == metadata["n_tokens"]
    return [list(tokens[a:b]) for a, b in zip((0, *ends[:-1]), ends, strict=True)], metadata


def write(folder: Path, documents: list[list[int]], dtype: str, **facts: Any) -> Path:
    """A data set after the page, in pages of 8 bytes."""
    folder.mkdir()
    letter = {"uint16": "H", "uint32": "I"}[dtype]
    flat = [token for document in documents for token in document]
    raw = struct.pack(f"<{len(flat)}{letter}", *flat)
    ends = [sum(map(len, documents[: i + 1])) for i in range(len(documents))]
    index = struct.pack(f"<{len(ends)}Q", *ends)
    pages = b"".join(struct.pack("<I", zlib.crc32(raw[i : i + 8])) for i in range(0, len(raw), 8))
    metadata: dict[str, Any] = {
        "format": "megastage.packed_memmap", "version": 1, "dtype": dtype, "n_tokens": len(flat),
        "n_documents": len(documents), "eos_id": None, "page_bytes": 8, "documents_crc32": zlib.crc32(index),
        "pages_crc32": zlib.crc32(pages), "tokenizer": None, **facts,
    }  # fmt: skip
    metadata["crc32"] = canonical_crc32(metadata)
    for name, content in (("tokens.bin", raw), ("documents.bin", index), ("pages.crc32", pages)):
        (folder / name).write_bytes(content)
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=3), "ascii")
    return folder


def test_what_the_command_writes_is_what_the_page_says(tmp_path: Path, bpe: Path) -> None:
    import tokenizers

    texts = ["first document", "Zürich 東京", "<|endoftext|>", "x" * 5000]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = [str(tmp_path / "in.jsonl"), "--tokenizer", str(bpe), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--workers", "1"]) == 0
    documents, metadata = read(tmp_path / "out")
    library = tokenizers.Tokenizer.from_file(str(bpe))
    end = library.token_to_id("<|endoftext|>")
    assert documents == [[*library.encode(text).ids, end] for text in texts]
    assert (metadata["dtype"], metadata["eos_id"], metadata["page_bytes"]) == ("uint16", end, 1 << 20)
    assert (metadata["tokenizer"]["name"], metadata["tokenizer"]["vocab_size"]) == ("toy", 300)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "tokens.bin", "documents.bin", "pages.crc32", "metadata.json", "tokenizer.json",
    }  # fmt: skip
    # the hash as docs/preprocess.md describes it, over the copy that lies beside the tokens
    content = json.loads((tmp_path / "out" / "tokenizer.json").read_text("utf-8"))
    kept = {key: content[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    kept["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in kept["model"]["merges"]]
    decided = json.dumps(_without_null_and_false(kept), sort_keys=True, separators=(",", ":")).encode("ascii")
    assert metadata["tokenizer"]["sha256"] == hashlib.sha256(decided).hexdigest()


def _without_null_and_false(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _without_null_and_false(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not None and item is not False}
    return [_without_null_and_false(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("known", [False, True])
def test_what_is_written_after_the_page_is_read(tmp_path: Path, dtype: str, known: bool) -> None:
    documents = [[1, 2, 3, 9], [], [65_535 if dtype == "uint16" else 4_000_000_000, 9], [4, 5, 6, 7, 8, 9]]
    facts = {"tokenizer": {"name": "theirs", "sha256": None, "vocab_size": None}, "eos_id": 9} if known else {}
    folder = write(tmp_path / "theirs", documents, dtype, **facts)
    assert read(folder)[0] == documents
    data = verify(folder)
    assert [data.document(i).tolist() for i in range(4)] == documents
    assert (data.metadata.eos_id, data.metadata.tokenizer is not None) == (9 if known else None, known)
    assert main(["convert", str(folder), str(tmp_path / "nano"), "--to", "nanoset"]) == 0
    assert main(["convert", str(tmp_path / "nano"), str(tmp_path / "back"), "--to", "packed_memmap"]) == 0
    assert read(tmp_path / "back")[0] == documents
    assert open_packed_memmap(tmp_path / "back").metadata.eos_id == 9  # the token that ends every document
