"""Megatron indexed data: `.idx` (header, sequence lengths, byte offsets, document bounds) and raw `.bin` tokens."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from megastage.data.sources.base import Part, SourceError, SourceOptions, TokenSource, check_ends, files_of, map_array

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<QBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def open_folder(path: Path | str, options: SourceOptions) -> TokenSource:
    """Open a prefix (`p` of `p.bin` and `p.idx`), one of the two files, or all pairs of a folder as one stream."""
    path = Path(path)
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    single = prefix.with_name(prefix.name + ".idx")
    files = [single] if single.is_file() or path.suffix in (".bin", ".idx") else files_of(path, [".idx"], "megatron")
    parts = [_open_part(file) for file in files]
    return TokenSource(parts, path=path, dataset_type="megatron", kind="stream", eos_id=options.eos_id)


def _open_part(idx: Path) -> Part:
    header_bytes = len(MAGIC) + HEADER.size
    if not idx.is_file():
        raise SourceError(f"{idx}: no such file; a megatron data set is a pair of .bin and .idx")
    with open(idx, "rb") as file:
        head = file.read(header_bytes)
    if len(head) < header_bytes:
        raise SourceError(f"{idx}: {len(head)} bytes, shorter than the header of {header_bytes}; write it again")
    if not head.startswith(MAGIC):
        raise SourceError(f"{idx}: starts with {head[:9]!r}, not {MAGIC!r}; this is no megatron index")
    version, code, n_sequences, n_bounds = HEADER.unpack_from(head, len(MAGIC))
    if version != 1:
        raise SourceError(f"{idx}: version {version}, this program reads version 1")
    if code not in DTYPES:
        raise SourceError(f"{idx}: dtype code {code}; tokens must be of code {', '.join(map(str, DTYPES))} (integers)")
    size, wanted = idx.stat().st_size, header_bytes + 12 * n_sequences + 8 * n_bounds
    if size != wanted:
        raise SourceError(
            f"{idx}: {size} bytes, but its header ({n_sequences} sequences, {n_bounds} document bounds) needs "
            f"{wanted}; truncated or damaged, write it again"
        )
    # the arrays start at byte 34, so they are copied once to be aligned
    lengths = map_array(idx, "<i4", offset=header_bytes, count=n_sequences).astype(np.int64)
    offsets = map_array(idx, "<i8", offset=header_bytes + 4 * n_sequences, count=n_sequences).astype(np.int64)
    bounds = map_array(idx, "<i8", offset=header_bytes + 12 * n_sequences, count=n_bounds).astype(np.int64)
    if not n_sequences or int(lengths.min()) < 0:
        raise SourceError(f"{idx}: {'no sequences' if not n_sequences else 'a negative length'}; write it again")
    tokens = map_array(idx.with_suffix(".bin"), DTYPES[code])
    ends = np.cumsum(lengths)
    expected = (ends - lengths) * tokens.itemsize
    if not np.array_equal(offsets, expected):
        where = int(np.flatnonzero(offsets != expected)[0])
        raise SourceError(
            f"{idx}: sequence {where} is at byte {int(offsets[where])}, expected {int(expected[where])}"
            f" (one after the other in {DTYPES[code]}); damaged, or a dtype code that is wrong"
        )
    check_ends(idx, ends, tokens.size, what="sequence end")
    if n_bounds < 2 or bounds[0] != 0:
        raise SourceError(f"{idx}: document bounds must start at 0 and end at {n_sequences}; write it again")
    check_ends(idx, bounds, n_sequences, what="document bound", items="sequences")
    return Part(tokens, doc_ends=np.concatenate([[0], ends])[bounds[1:]])
