"""The `convert` and `merge` commands."""

from __future__ import annotations

import os
from argparse import Namespace

from megastage.data.packed_memmap import TokenizerFacts
from megastage.data.tokenizer import load_tokenizer

from .datasets import WRITERS, DataError, TokenData, check_tokenizer, copy_documents, open_data
from .progress import Progress


def convert(options: Namespace) -> int:
    """Rewrite `options.path` as `options.output` in the format `options.to`; returns the exit code."""
    source = open_data(options.path)
    facts = source.tokenizer
    tokenizer_json = source.tokenizer_json.read_bytes() if source.tokenizer_json else None
    if options.tokenizer is not None:
        tokenizer = load_tokenizer(options.tokenizer)
        check_tokenizer(source, tokenizer, options.tokenizer)
        facts, tokenizer_json = tokenizer.facts, tokenizer.to_json()
    _write([source], options, facts, tokenizer_json, source.eos_id, source.dtype)
    return 0


def merge(options: Namespace) -> int:
    """Join `options.paths`, in their order, into `options.output`; returns the exit code."""
    sources = [open_data(path) for path in options.paths]
    first = sources[0]
    for other in sources[1:]:
        for name in ("dtype", "eos_id", "tokenizer"):
            mine, its = getattr(first, name), getattr(other, name)
            if mine != its:
                raise DataError(
                    f"{other.path}: {name} is {_shown(its)}, but {first.path} has {_shown(mine)}; only data of one "
                    "tokenizer can be merged, so give each its own folder in dataset_folders"
                )
    tokenizer_json = first.tokenizer_json.read_bytes() if first.tokenizer_json else None
    _write(sources, options, first.tokenizer, tokenizer_json, first.eos_id, first.dtype)
    return 0


def _shown(value: object) -> str:
    if not isinstance(value, TokenizerFacts):
        return "not recorded" if value is None else str(value)
    return f"{value.name} (sha256 {value.sha256 or 'not recorded'}, {value.vocab_size or 'unknown'} entries)"


def _write(
    sources: list[TokenData],
    options: Namespace,
    facts: TokenizerFacts | None,
    tokenizer_json: bytes | None,
    eos_id: int | None,
    dtype: str,
) -> None:
    for loss in (loss for source in sources for loss in source.losses):
        print(f"note: {loss}", flush=True)
    output = os.path.realpath(options.output)
    for source in sources:
        if output in {os.path.realpath(source.path), *map(os.path.realpath, source.files)}:
            raise DataError(f"{options.output}: is one of the inputs; choose another output")
    writer = WRITERS[options.to](
        options.output,
        dtype,
        eos_id=eos_id,
        tokenizer=facts,
        tokenizer_json=tokenizer_json,
        overwrite=options.overwrite,
    )
    progress = Progress(sum(source.token_bytes for source in sources), "write")
    try:
        copy_documents(sources, writer, progress.add)
    finally:
        progress.close()
    print(f"{options.output}: {writer.n_documents:,} documents, {writer.n_tokens:,} tokens, {options.to}, {dtype}")
