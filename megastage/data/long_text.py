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
# A space between a letter or digit and a letter; a line break between two visible characters.
_SEAMS = (re.compile(r"(?<=[^\W_]) (?=[^\W\d_])"), re.compile(r"(?<=\S)\n(?=\S)"))


def stretches(chunks: Iterator[str], tokenizer: Tokenizer) -> Iterator[str]:
    """Cut long text where the tokens stay those of the whole, so that memory stays bounded.

    Only tokenizers whose tokens end with words are helped, and only between two words or lines where encoding the
    surroundings in two parts was seen to give the tokens of the whole. Where there is no such place the text is held
    until one comes. The space between two words is left out where the tokenizer itself puts one in front of a text.
    """
    waiting: list[str] = []
    size, reach = 0, LONG_CHARACTERS
    for chunk in chunks:
        waiting.append(chunk)
        size += len(chunk)
        if size <= 2 * reach or not tokenizer.ends_with_words:
            continue
        held, start = "".join(waiting), 0
        while size - start > 2 * reach:
            cut = _safe_cut(held, start + reach // 2, start + reach, tokenizer)
            if cut is None:
                reach *= 2
                continue
            yield held[start : cut[0]]
            start, reach = cut[1], LONG_CHARACTERS
        waiting, size = [held[start:]], size - start
        del held
    if size:
        yield "".join(waiting)


def _safe_cut(text: str, least: int, end: int, tokenizer: Tokenizer) -> tuple[int, int] | None:
    """Where one part can end and where the next begins, looked for backwards from `end`; None after some tries."""
    tries = 0
    while end > least and tries < _TRIES:
        begin = max(least, end - _SEARCH_CHARACTERS)
        for seams in _SEAMS:
            for match in reversed(list(seams.finditer(text, begin, end))[-_TRIES // 2 :]):
                cut = match.start() if match[0] == " " else match.end()
                for following in sorted({cut, match.end()}):
                    if _keeps_tokens(text, cut, following, tokenizer):
                        return cut, following
                tries += 1
        end = begin
    return None


def _keeps_tokens(text: str, cut: int, following: int, tokenizer: Tokenizer) -> bool:
    """Whether the surroundings of a cut, encoded in two parts, have the tokens of the whole."""
    begin, end = max(0, cut - _WINDOW), cut + _WINDOW
    whole, left, right = tokenizer.encode_batch([text[begin:end], text[begin:cut], text[following:end]])
    return np.array_equal(whole, np.concatenate([left, right]))
