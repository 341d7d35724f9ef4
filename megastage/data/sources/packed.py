"""packed_memmap: folders of our own format, and older triples `P_token.npy`, `P_mask.npy`, `P_index.npy`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megastage.data.mapping import map_file
from megastage.data.packed_memmap import METADATA, TOKENS, open_packed_memmap
from megastage.data.sources.base import Part, SourceError, SourceOptions, TokenSource, check_ends

_TOKEN = "_token.npy"


def open_folder(path: Path | str, options: SourceOptions) -> TokenSource:
    """Open a packed_memmap folder, a folder of such folders, a triple's prefix, or a folder of triples (sorted)."""
    path = Path(path)
    if (path / METADATA).exists() or (path / TOKENS).exists():
        return _join(path, [path], options)
    prefix = Path(str(path).removesuffix(_TOKEN))
    if prefix.with_name(prefix.name + _TOKEN).is_file():
        return _triples(path, [prefix], options)
    if not path.is_dir():
        raise SourceError(f"{path}: no such folder, and no {prefix.name + _TOKEN} either; check the path")
    folders = sorted(folder for folder in path.iterdir() if (folder / METADATA).exists())
    if folders:
        return _join(path, folders, options)
    tokens = sorted(file for file in path.iterdir() if file.name.endswith(_TOKEN))
    if tokens:
        return _triples(path, [file.with_name(file.name.removesuffix(_TOKEN)) for file in tokens], options)
    raise SourceError(f"{path}: no packed_memmap folder: {METADATA} is missing, and there is no *{_TOKEN} either")


def _join(path: Path, folders: list[Path], options: SourceOptions) -> TokenSource:
    opened = [open_packed_memmap(folder) for folder in folders]
    facts = {(data.metadata.tokenizer, data.metadata.eos_id) for data in opened}
    if len(facts) > 1:
        raise SourceError(f"{path}: its folders were made with different tokenizers or EOS ids; keep them apart")
    tokenizer, eos_id = facts.pop()
    return TokenSource(
        [Part(data.tokens, doc_ends=data.doc_ends) for data in opened],
        path=path,
        dataset_type="packed_memmap",
        kind="documents",
        eos_id=eos_id,
        vocab_size=tokenizer.vocab_size if tokenizer else None,
        tokenizer_hash=tokenizer.sha256 if tokenizer else None,
        recorded_hash=b"".join(data.metadata.pages_crc32.to_bytes(4, "little") for data in opened),
    )


def _triples(path: Path, prefixes: list[Path], options: SourceOptions) -> TokenSource:
    parts = [_open_triple(prefix) for prefix in prefixes]
    return TokenSource(parts, path=path, dataset_type="packed_memmap", kind="documents", eos_id=options.eos_id)


def _open_triple(prefix: Path) -> Part:
    token_file, mask_file, index_file = (
        prefix.with_name(f"{prefix.name}_{name}.npy") for name in ("token", "mask", "index")
    )
    tokens = _load(token_file)
    row_tokens = tokens.shape[1] if tokens.ndim == 2 else None
    if tokens.dtype.kind == "b":
        raise SourceError(f"{token_file}: holds truth values, expected tokens; is it the mask?")
    if tokens.ndim not in (1, 2) or not tokens.size:
        raise SourceError(f"{token_file}: shape {tokens.shape}; expected tokens [n] or rows of tokens [rows, length]")
    shape, tokens = tokens.shape, tokens.reshape(-1)
    mask = None
    if mask_file.exists():
        mask = _load(mask_file)
        if mask.shape != shape:
            raise SourceError(f"{mask_file}: shape {mask.shape}, but {token_file.name} has {shape}")
        mask = mask.reshape(-1)
        if mask.dtype.itemsize != 1 or int(mask.view(np.uint8).max()) > 1:
            raise SourceError(f"{mask_file}: must hold one byte a token, 1 = counts in the loss and 0 = does not")
    if index_file.exists():
        ends = _ends_from_index(index_file, _load(index_file), tokens.size)
    elif row_tokens:
        ends = np.arange(row_tokens, tokens.size + 1, row_tokens, dtype=np.int64)
    else:
        raise SourceError(f"{index_file}: missing; without it the documents of {token_file.name} are unknown")
    return Part(tokens, doc_ends=ends, loss_mask=mask)


def _load(file: Path) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses the header as a Python literal: damage raises almost anything
        raise SourceError(f"{file}: not readable as a plain numpy array ({error}); write it again") from None
    if not isinstance(array, np.memmap):
        raise SourceError(f"{file}: not a plain numpy array but {type(array).__name__}; save the array by itself")
    if array.dtype.kind not in "iub":
        raise SourceError(f"{file}: holds {array.dtype.str}, expected integers; convert it")
    if array.dtype.newbyteorder("<") != array.dtype:
        raise SourceError(f"{file}: holds {array.dtype.str}, expected little-endian integers; convert it")
    size, wanted = file.stat().st_size, array.offset + array.nbytes
    if size != wanted:
        raise SourceError(
            f"{file}: {size} bytes, but its header (shape {array.shape}) needs {wanted}; damaged, write it again"
        )
    if not array.flags.c_contiguous:
        raise SourceError(f"{file}: stored in Fortran order; save it in C order")
    return map_file(file, array.dtype, array.size, array.offset).reshape(array.shape)


def _ends_from_index(file: Path, index: np.ndarray, n_tokens: int) -> np.ndarray:
    """Document ends from what such files hold: ends, bounds with a leading 0, starts, or [start, end] pairs."""
    if index.ndim == 2 and index.shape[1] == 2 and len(index):
        pairs = index.astype(np.int64)
        stops = pairs[:, 1]
        if pairs[0, 0] == 0 and np.array_equal(pairs[1:, 0], stops[:-1]):
            check_ends(file, stops, n_tokens)
            return stops
        raise SourceError(f"{file}: pairs must be [start, end] of documents one after the other from 0; write it again")
    if index.ndim != 1 or not index.size:
        raise SourceError(f"{file}: shape {index.shape}; expected document ends [documents] or pairs [documents, 2]")
    ends = index.astype(np.int64)
    if ends[0] == 0 and ends[-1] < n_tokens:
        ends = np.append(ends, n_tokens)
    if ends[0] == 0:
        ends = ends[1:]
    check_ends(file, ends, n_tokens)
    return ends
