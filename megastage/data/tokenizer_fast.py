"""A faster engine for BPE tokenizers: the optional package gigatoken, used only where it was seen to agree.

The reference stays the `tokenizers` library. Before a run the engine must give the same tokens on a sample of the
text and on strings that are hard to get right; during the run one short text of every batch is compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np

from megastage.data.tokenizer import Tokenizer, TokenizerError

ENGINES = ("auto", "hf", "gigatoken")
SAMPLE_CHARACTERS = 1 << 19
_SPOT_CHARACTERS = 2000
_SAMPLE_TEXTS = 20_000
_HARD = (
    *("", " ", "   ", "\n\n\n", " \n \t\r\n ", "a", "\u00e9", "e\u0301", "A\u030a", "\u4e2d\u6587"),
    *("\U0001f468\u200d\U0001f469\u200d\U0001f467", "\ufeff x", "\u00a0\u3000", "\u0000\u0001", "\u1e9b\u0323 \ufb01"),
    *("don't I'LL we've", "0 12 345 6789 1.5e-10", "x" * 300, "=" * 97),
)


class EngineError(TokenizerError):
    """The fast engine gave other tokens than the reference in the middle of a run."""


class FastTokenizer(Tokenizer):
    """A `Tokenizer` that encodes with gigatoken; everything else is the reference's."""

    def __init__(self, reference: Tokenizer) -> None:
        """Raises TokenizerError when gigatoken is missing or does not know this kind of tokenizer."""
        self.__dict__.update(reference.__dict__)
        self.reference = reference
        content = reference.to_json()
        if content is None:
            raise TokenizerError(f"{reference.name}: gigatoken reads tokenizer.json only")
        try:
            import gigatoken

            self._fast: Any = gigatoken.Tokenizer.from_json(content.decode("utf-8"))
        except ImportError as error:
            raise TokenizerError(f"gigatoken is not installed ({error}): pip install gigatoken") from None
        except Exception as error:  # the library raises many kinds for what it does not know
            raise TokenizerError(f"{reference.name}: gigatoken cannot take this tokenizer ({error})") from None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `Tokenizer.encode_batch`. Raises EngineError where a compared text has other tokens."""
        encoded = self._encode(list(texts))
        spot = next((i for i, text in enumerate(texts) if 0 < len(text) <= _SPOT_CHARACTERS), None)
        if spot is not None:
            (expected,) = self.reference.encode_batch([texts[spot]])
            if not np.array_equal(encoded[spot], expected):
                raise EngineError(
                    f"{self.name}: gigatoken gives other tokens than the tokenizers library for {texts[spot][:80]!r}; "
                    "run again with --engine hf"
                )
        return encoded

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        layout = self._fast.encode_batch(texts, parallel=False).layout
        offsets = np.asarray(layout.offsets.data, np.int64)
        ids = np.asarray(layout.content.data).astype(np.int64)
        return np.split(ids, offsets[1:-1]) if len(texts) > 1 else [ids[offsets[0] : offsets[-1]]]


def choose_engine(name: str, tokenizer: Tokenizer, sample: Iterable[str]) -> tuple[Tokenizer, str]:
    """The tokenizer to encode with, and why. name: one of ENGINES.

    "gigatoken" raises TokenizerError where it is not there or disagrees on the sample; "auto" takes the reference then.
    """
    if name == "hf":
        return tokenizer, "tokenizers"
    try:
        fast = FastTokenizer(tokenizer)
        compared = _compare(fast, sample)
    except TokenizerError as error:
        if name == "gigatoken":
            raise
        return tokenizer, f"tokenizers ({error})"
    return fast, f"gigatoken (equal to tokenizers on {compared:,} texts)"


def _compare(fast: FastTokenizer, sample: Iterable[str]) -> int:
    """How many texts were compared; raises TokenizerError for the first with other tokens."""
    added = json.loads(fast.reference.to_json() or b"{}").get("added_tokens") or []
    texts = list(_HARD)
    for token in [str(entry["content"]) for entry in added][:64]:
        texts += [token, f"a{token}b", f" {token} {token}\n"]
    left = SAMPLE_CHARACTERS
    for text in islice(sample, _SAMPLE_TEXTS):
        texts.append(text[:left])
        left -= len(text)
        if left <= 0:
            break
    try:
        got = fast._encode(texts)
    except Exception as error:
        raise TokenizerError(f"{fast.name}: gigatoken failed on a sample ({error})") from None
    for text, ours, expected in zip(texts, got, fast.reference.encode_batch(texts), strict=True):
        if not np.array_equal(ours, expected):
            raise TokenizerError(f"{fast.name}: gigatoken gives other tokens than tokenizers for {text[:80]!r}")
    return len(texts)
