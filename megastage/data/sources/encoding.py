"""Documents of text to tokens, some at a time: the same tokens whether text is read up front or as it is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from megastage.data import long_text

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 512, 1 << 20


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 .. 255, and 256 for the end of a document: the made-up texts run without files."""

    name, vocab_size, eos_id, ends_with_words = "bytes", 257, 256, False
    sha256 = hashlib.sha256(b"megastage bytes 257").hexdigest()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """uint16[n] per text."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16) for text in texts]


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """The documents in lists of bounded size that the tokenizer takes at once; a long one is alone in its list."""
    texts: list[str] = []
    characters = 0
    for text in documents:
        if texts and len(text) > long_text.LONG_CHARACTERS:
            yield texts
            texts, characters = [], 0
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
    encoded = [np.concatenate([ids, *end]) for ids in _token_ids(texts, tokenizer)]
    return np.concatenate(encoded), np.array([len(ids) for ids in encoded], np.int64)


def _token_ids(texts: list[str], tokenizer: Any) -> list[np.ndarray]:
    """Without EOS. Of a long text some stretches at a time: a tokenizer takes a hundred times its memory."""
    if len(texts) > 1 or len(texts[0]) <= long_text.LONG_CHARACTERS or not tokenizer.ends_with_words:
        ids: list[np.ndarray] = tokenizer.encode_batch(texts)
        return ids
    parts = long_text.stretches(iter(texts), tokenizer)
    return [np.concatenate([tokenizer.encode_batch([part])[0].astype(np.uint32) for part in parts])]
