"""Long text in stretches that give the tokens of the whole, so that the memory of a tokenizer stays bounded."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from megastage.data.tokenizer import Tokenizer

LONG_CHARACTERS = 1 << 20
_WINDOW = 512
_SEARCH_CHARACTERS = 1 << 14
_TRIES = 32
# Before a space between a letter or digit and a letter, or after a line break between two visible characters.
_SEAMS = re.compile(r"(?<=[^\W_]) (?=[^\W\d_])|(?<=\S)\n(?=\S)")


def stretches(chunks: Iterator[str], tokenizer: Tokenizer) -> Iterator[str]:
    """Cut long text where the tokens stay those of the whole, so that memory stays bounded.

    Only tokenizers that cut text into words first are helped, and only between two words or lines where encoding the
    surroundings in two parts was seen to give the tokens of the whole. Without such a place the text stays in one
    piece.
    """
    held, start = "", 0
    for chunk in chunks:
        held, start = held[start:] + chunk, 0
        while len(held) - start > 2 * LONG_CHARACTERS:
            cut = _safe_cut(held, start, tokenizer) if tokenizer.splits_text else None
            if cut is None:
                yield "".join((held[start:], *chunks))
                return
            yield held[start:cut]
            start = cut
    if held[start:]:
        yield held[start:]


def _safe_cut(text: str, start: int, tokenizer: Tokenizer) -> int | None:
    """A place to cut, looked for backwards from LONG_CHARACTERS after `start` over the last half of that."""
    tries = 0
    end, least = start + LONG_CHARACTERS, start + LONG_CHARACTERS // 2
    while end > least and tries < _TRIES:
        begin = max(least, end - _SEARCH_CHARACTERS)
        for match in reversed(list(_SEAMS.finditer(text, begin, end))[-_TRIES:]):
            cut = match.start() if match[0] == " " else match.end()
            left, right = text[cut - _WINDOW : cut], text[cut : cut + _WINDOW]
            whole, *parts = tokenizer.encode_batch([left + right, left, right])
            if np.array_equal(whole, np.concatenate(parts)):
                return cut
            tries += 1
        end = begin
    return None
