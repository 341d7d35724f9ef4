"""The `inspect` command: statistics, a histogram of document lengths, decoded samples."""

from __future__ import annotations

from argparse import Namespace

import numpy as np

from megastage.data.tokenizer import Tokenizer, load_tokenizer

from .datasets import DataError, TokenData, check_tokenizer, open_data

_SHOWN_TOKENS = 96
_STEP_TOKENS = 1 << 22
_BAR_WIDTH = 40


def run(options: Namespace) -> int:
    """Print what `options.path` holds; returns the exit code."""
    data = open_data(options.path)
    tokenizer = _tokenizer(options.tokenizer, data)
    lengths = data.lengths()
    for name, value in _rows(data, tokenizer, lengths):
        print(f"{name + ':':<21}{value}")
    print("\ndocument lengths in tokens")
    for line in histogram_lines(lengths):
        print(f"  {line}")
    if options.histogram is not None:
        _draw(options.histogram, lengths, data.path)
    for index in _choose(lengths, options.samples, options.seed):
        tokens = data.document(index)
        print(f"\ndocument {index:,} ({tokens.size:,} tokens)")
        print(_show(tokens, tokenizer))
    return 0


def _tokenizer(path: str | None, data: TokenData) -> Tokenizer | None:
    if path is None and data.tokenizer_json is None:
        return None
    tokenizer = load_tokenizer(path if path is not None else data.tokenizer_json or "")
    check_tokenizer(data, tokenizer, path or data.tokenizer_json or "")
    return tokenizer


def _rows(data: TokenData, tokenizer: Tokenizer | None, lengths: np.ndarray) -> list[tuple[str, str]]:
    facts = data.tokenizer
    used, largest = _ids_used(data)
    name = "not recorded" if facts is None else facts.name
    if facts is not None and facts.vocab_size is not None:
        name += f", {facts.vocab_size:,} entries"
    eos = "none in common" if data.eos_id is None else f"id {data.eos_id}"
    if data.eos_id is not None and tokenizer is not None:
        eos += f", {tokenizer.decode([data.eos_id])!r}"
    quantiles = np.percentile(lengths, [50, 90, 99], method="lower").astype(np.int64)
    return [
        ("data", f"{data.path} ({data.kind}, {data.dtype}, {len(data.files)} token files)"),
        ("tokenizer", name),
        ("end of document", eos),
        ("documents", f"{data.n_documents:,}"),
        ("tokens", f"{data.n_tokens:,}"),
        (
            "tokens per document",
            f"mean {lengths.mean():,.1f}, median {quantiles[0]:,}, 90 % {quantiles[1]:,}, "
            f"99 % {quantiles[2]:,}, longest {lengths.max():,}",
        ),
        ("ids used", f"{used:,} different ones, the largest {largest:,}"),
    ]


def _ids_used(data: TokenData) -> tuple[int, int]:
    """(different ids, largest id) over all tokens."""
    seen = np.zeros(1 << 16, dtype=bool)
    for first in range(0, data.n_tokens, _STEP_TOKENS):
        tokens = data.source.read(first, min(first + _STEP_TOKENS, data.n_tokens))
        highest = int(tokens.max())
        if highest >= seen.size:
            seen = np.concatenate([seen, np.zeros(highest + 1 - seen.size, dtype=bool)])
        seen[tokens] = True  # as indexes they take 8 bytes each
    return int(seen.sum()), int(np.flatnonzero(seen)[-1])


def histogram_lines(lengths: np.ndarray) -> list[str]:
    """A text histogram over powers of two: documents, and the share of all tokens they hold."""
    powers = np.zeros(lengths.size, dtype=np.int64)
    powers[lengths > 0] = np.floor(np.log2(lengths[lengths > 0])).astype(np.int64)
    low, high = int(powers.min()), int(powers.max())
    counts = np.bincount(powers - low)
    tokens = np.bincount(powers - low, weights=lengths)
    lines = []
    for i in range(high - low + 1):
        bar = "#" * round(_BAR_WIDTH * counts[i] / counts.max())
        share = 100 * tokens[i] / max(1, lengths.sum())
        lines.append(f"{2 ** (low + i):>11,} and up {counts[i]:>11,} documents {share:5.1f} % of tokens {bar}".rstrip())
    return lines


def _choose(lengths: np.ndarray, count: int, seed: int) -> list[int]:
    filled = np.flatnonzero(lengths)
    chosen = np.random.default_rng(seed).choice(filled, size=min(max(0, count), filled.size), replace=False)
    return sorted(int(index) for index in chosen)


def _show(tokens: np.ndarray, tokenizer: Tokenizer | None) -> str:
    """The beginning and end of a document, decoded where a tokenizer is known."""

    def text(part: np.ndarray) -> str:
        return tokenizer.decode(part) if tokenizer is not None else " ".join(map(str, part.tolist()))

    if tokens.size <= 2 * _SHOWN_TOKENS:
        return text(tokens)
    left_out = tokens.size - 2 * _SHOWN_TOKENS
    return f"{text(tokens[:_SHOWN_TOKENS])}\n  ... {left_out:,} tokens ...\n{text(tokens[-_SHOWN_TOKENS:])}"


def _draw(path: str, lengths: np.ndarray, title: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError(f"{path}: drawing needs the library: pip install matplotlib") from None
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    top = int(np.ceil(np.log2(max(2, int(lengths.max()) + 1))))
    axes.hist(np.maximum(lengths, 1), bins=list(np.logspace(0, top, 4 * top + 1, base=2)))
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens per document", ylabel="documents", title=title)
    figure.savefig(path, dpi=120)
    print(f"\n{path}: histogram drawn")
