"""Nanoset folders: headerless `X.ds` tokens, `X.ds.index` document ends, `X.ds.metadata`, optional `X.ds.loss`.

The layout is datatrove's: the metadata's first line `tokenizer|token_size` is the only record of the dtype.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megastage.data.sources.base import Part, SourceError, SourceOptions, TokenSource, check_ends, files_of, map_array

_DTYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def open_folder(path: Path | str, options: SourceOptions) -> TokenSource:
    """Open one `.ds` file or all `*.ds` files of a folder (sorted) as one stream."""
    files = files_of(Path(path), [".ds"], "nanoset")
    facts = {file: read_metadata(file) for file in files}
    names = {name for name, _, _ in facts.values()}
    if len(names) > 1:
        raise SourceError(
            f"{path}: its files were made with different tokenizers ({', '.join(sorted(names))}); "
            "keep one tokenizer per folder"
        )
    parts = [_open_part(file, facts[file][1], facts[file][2]) for file in files]
    return TokenSource(parts, path=path, dataset_type="nanoset", kind="stream", eos_id=options.eos_id)


def read_metadata(file: Path) -> tuple[str, int, int | None]:
    """(tokenizer name, bytes a token, token count if recorded)."""
    metadata = file.with_name(file.name + ".metadata")
    try:
        lines = metadata.read_bytes()[:4096].decode("utf-8").split("\n")
    except FileNotFoundError:
        raise SourceError(
            f"{metadata}: missing, and nothing else records whether a token takes 2 or 4 bytes; copy it beside the "
            "data, or write it: first line `tokenizer|2` or `tokenizer|4`, second line the token count"
        ) from None
    except UnicodeDecodeError:
        raise SourceError(f"{metadata}: no text; restore it (first line `tokenizer|token_size`)") from None
    name, bar, size = lines[0].strip().rpartition("|")
    if not bar or size not in ("2", "4"):
        raise SourceError(f"{metadata}: first line {lines[0][:80]!r} is not `tokenizer|token_size` with size 2 or 4")
    count = lines[1].strip() if len(lines) > 1 else ""
    if count and not (count.isascii() and count.isdigit()):
        raise SourceError(f"{metadata}: second line {count[:80]!r} is no token count")
    return name, int(size), int(count) if count else None


def _open_part(file: Path, token_bytes: int, recorded: int | None) -> Part:
    tokens = map_array(file, _DTYPES[token_bytes])
    if recorded is not None and recorded != tokens.size:
        raise SourceError(
            f"{file}: holds {tokens.size} tokens of {token_bytes} bytes, but {file.name}.metadata records {recorded}: "
            "the file is truncated or the token size is wrong; restore both"
        )
    index, loss = file.with_name(file.name + ".index"), file.with_name(file.name + ".loss")
    ends = None
    if index.exists():
        ends = map_array(index, "<u8")
        check_ends(index, ends, tokens.size)
    mask = None
    if loss.exists():
        mask = map_array(loss, np.uint8)
        if mask.size != tokens.size:
            raise SourceError(
                f"{loss}: {mask.size} bytes, but {file.name} holds {tokens.size} tokens; one byte a token"
            )
    return Part(tokens, doc_ends=ends, loss_mask=mask)
