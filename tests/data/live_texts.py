"""Texts of every kind on disk, and a tokenizer whose work can be counted, for tests of text read as it is needed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

KINDS = ("jsonl", "json", "array", "gz", "zst", "txt", "parquet", "arrow", "saved", "mixed")


class Bytes:
    """A tokenizer written for the test: a token per byte; counts the characters that it was given."""

    name, vocab_size, sha256 = "bytes of the test", 300, "ab" * 32

    def __init__(self, eos_id: int | None = 299) -> None:
        self.eos_id, self.characters = eos_id, 0

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        self.characters += sum(map(len, texts))
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]


def make_texts(count: int, seed: int = 0, mean: int = 300) -> list[str]:
    """Documents of very different lengths, some empty, with other than ASCII characters; each tells its number."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.lognormal(np.log(mean), 1.2, count).astype(int), 40 * mean)
    letters = np.array(list("abcdefghij klmnop\nqrstu €ä"))
    return [
        "" if i % 17 == 5 else f"<{i}>" + "".join(letters[rng.integers(0, len(letters), n)])
        for i, n in enumerate(lengths.tolist())
    ]


def _lines(texts: list[str]) -> bytes:
    # blank lines between, and line ends of both kinds
    rows = [json.dumps({"n": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    return "".join(
        row + ("\r\n" if i % 5 == 0 else "\n\n" if i % 7 == 0 else "\n") for i, row in enumerate(rows)
    ).encode()


def write_texts(folder: Path, kind: str, texts: list[str], files: int = 3) -> Path:
    """The texts in order, in some files of a kind; returns the path to read."""
    folder.mkdir(parents=True)
    names = []
    for number in range(files):
        part = texts[number * len(texts) // files : (number + 1) * len(texts) // files]
        suffix = ("jsonl", "gz", "parquet")[number % 3] if kind == "mixed" else kind
        name = f"part-{number:03d}"
        if suffix in ("jsonl", "json"):
            (folder / f"{name}.{suffix}").write_bytes(_lines(part))
        elif suffix == "array":
            (folder / f"{name}.json").write_text(json.dumps([{"text": text} for text in part]))
        elif suffix == "gz":
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(_lines(part)))
        elif suffix == "zst":
            (folder / f"{name}.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(_lines(part)))
        elif suffix == "txt":
            for i, text in enumerate(part):
                (folder / f"{name}-{i:05d}.txt").write_text(text, newline="")
        elif suffix == "parquet":
            pq.write_table(pa.table({"text": part}), folder / f"{name}.parquet", row_group_size=37)
        else:
            table = pa.table({"text": part})
            kinds = pa.ipc.new_file if number % 2 and suffix == "arrow" else pa.ipc.new_stream
            with kinds(str(folder / f"{name}.arrow"), table.schema) as writer:
                writer.write_table(table, max_chunksize=23)
            names.append({"filename": f"{name}.arrow"})
    if kind == "saved":
        (folder / "state.json").write_text(json.dumps({"_data_files": names}))
    return folder
