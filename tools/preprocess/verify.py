"""The `verify` command."""

from __future__ import annotations

from argparse import Namespace

from megastage.data.tokenizer import load_tokenizer

from .datasets import TokenData, check_pages, check_tokenizer, open_data
from .progress import Progress


def run(options: Namespace) -> int:
    """Check every byte of `options.paths` that can be checked; returns the exit code."""
    for path in options.paths:
        data = open_data(path)
        progress = Progress(data.token_bytes, "verify")
        try:
            if data.tokenizer_json is not None:
                check_tokenizer(data, load_tokenizer(data.tokenizer_json), data.tokenizer_json)
            if data.kind == "packed_memmap":
                check_pages(data, progress.add)
                checked = "every checksum and token id is right"
            else:
                checked = f"sizes and index are right (it has no checksums), largest id {_largest(data, progress)}"
        finally:
            progress.close()
        print(f"{path}: {data.kind}, {data.n_documents:,} documents, {data.n_tokens:,} tokens: {checked}")
    return 0


def _largest(data: TokenData, progress: Progress) -> int:
    largest = 0
    for tokens, _ in data.documents():
        if tokens.size:
            largest = max(largest, int(tokens.max()))
        progress.add(tokens.nbytes)
    return largest
