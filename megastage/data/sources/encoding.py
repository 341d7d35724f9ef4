"""Documents of text to tokens, some at a time: the same tokens whether text is read up front or as it is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 512, 1 << 20


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 .. 255, and 256 for the end of a document: the made-up texts run without files."""

    name, vocab_size, eos_id = "bytes", 257, 256
    sha256 = hashlib.sha256(b"megastage bytes 257").hexdigest()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """uint16[n] per text."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16) for text in texts]


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """The documents in lists that the tokenizer takes at once, of bounded size but for a single long one."""
    texts: list[str] = []
    characters = 0
    for text in documents:
        texts.append(text)
        characters += len(text)
        if len(texts) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


def encode(texts: list[str], tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the texts end to end, each with the tokenizer's EOS if it has one, and their lengths, int64[texts]."""
    end = [] if tokenizer.eos_id is None else [np.array([tokenizer.eos_id])]
    encoded = [np.concatenate([ids, *end]) for ids in tokenizer.encode_batch(texts)]
    return np.concatenate(encoded), np.array([len(ids) for ids in encoded], np.int64)
