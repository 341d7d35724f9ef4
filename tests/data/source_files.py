"""Data sets written by hand with numpy and pyarrow, after the formats' descriptions, not with the project's writers."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa


def documents(seed, count, *, low=1, high=40, vocab=500, eos=None):
    """Random documents as lists of ints."""
    rng = np.random.default_rng(seed)
    docs = [rng.integers(1, vocab, rng.integers(low, high)).tolist() for _ in range(count)]
    return docs if eos is None else [[*doc, eos] for doc in docs]


def flat(docs):
    return [token for doc in docs for token in doc]


def ends(docs):
    return np.cumsum([len(doc) for doc in docs])


def write_nanoset(folder, name, docs, *, size=2, index=True, metadata=True, loss=None, tokenizer="gpt2"):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = flat(docs)
    (folder / f"{name}.ds").write_bytes(b"".join(struct.pack("<H" if size == 2 else "<I", t) for t in tokens))
    if index:
        (folder / f"{name}.ds.index").write_bytes(b"".join(struct.pack("<Q", e) for e in ends(docs).tolist()))
    if metadata:
        (folder / f"{name}.ds.metadata").write_text(f"{tokenizer}|{size}\n{len(tokens)}\n{len(tokens) / 1e3:.2f} K")
    if loss is not None:
        (folder / f"{name}.ds.loss").write_bytes(bytes(loss))
    return folder


def write_megatron(prefix, docs, *, code=8, sequences_per_doc=1):
    dtype = {1: "<u1", 4: "<i4", 5: "<i8", 8: "<u2"}[code]
    np.array(flat(docs), dtype).tofile(f"{prefix}.bin")
    pieces = [part for doc in docs for part in np.array_split(np.array(doc), sequences_per_doc)]
    lengths = [len(piece) for piece in pieces]
    offsets = (np.cumsum([0, *lengths[:-1]]) * np.dtype(dtype).itemsize).tolist()
    bounds = list(range(0, len(pieces) + 1, sequences_per_doc))
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(pieces), len(bounds)))
        file.write(struct.pack(f"<{len(lengths)}i", *lengths))
        file.write(struct.pack(f"<{len(offsets)}q", *offsets))
        file.write(struct.pack(f"<{len(bounds)}q", *bounds))
    return Path(prefix)


def write_saved_dataset(folder, columns, *, shards=2, batch_rows=7, types=None):
    """A `save_to_disk` folder: Arrow stream files listed in state.json, here in an order that is not alphabetical."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    types = types or {}
    n = len(next(iter(columns.values())))
    names = []
    for shard in range(shards):
        rows = slice(shard * n // shards, (shard + 1) * n // shards)
        table = pa.table({k: pa.array(v[rows], types.get(k, pa.list_(pa.int32()))) for k, v in columns.items()})
        name = f"data-{shards - shard:05d}.arrow"
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            for batch in table.to_batches(max_chunksize=batch_rows):
                writer.write_batch(batch)
        names.append(name)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@dataclass(frozen=True)
class FakeStage:
    """The fields of a stage that the data engine reads."""

    index: int = 0
    name: str = "one"
    start_step: int = 0
    end_step: int = 10
    never_runs: bool = False
    dataset: str | None = None
    dataset_path: str | None = None
    dataset_type: str = "nanoset"
    dataset_folders: tuple = ()
    dataset_weights: tuple = ()
    dataset_random_seed: int = 1234
    seq_len: int = 16
    global_batch_size: int = 8
    document_mask: bool = True
    min_doc_len: int = 0
    long_doc_len: int = 0
    long_doc_share: float | None = None
