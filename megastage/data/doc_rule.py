"""Which documents a stage reads by their length: a least length, and the share of its rows that long documents make."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np

_CHUNK = 1 << 22  # document ends looked at together


class DocRule(NamedTuple):
    """Documents of fewer than `min_doc_len` tokens are not read. With a share, those of `long_doc_len` tokens and more
    are long, and long and short ones make rows of their own, `long_doc_share` of all rows the long ones."""

    min_doc_len: int = 0
    long_doc_len: int = 0
    long_doc_share: float | None = None

    def rows_kept(self, n_long: int, n_short: int, turn: int) -> tuple[int, int]:
        """How many of these rows to read, (long, short), so that they follow the share: all of the scarcer kind.

        The other number is rounded down or up, up in as many of all values of `turn` (0 .. 2^64 - 1) as the fraction
        that is left says: over many blocks with evenly spread turns, what rounding takes and gives is equal.
        """
        share = Fraction(repr(self.long_doc_share))
        to_long, to_short = share.numerator, share.denominator - share.numerator
        if not to_long or not to_short:
            return n_long if to_long else 0, n_short if to_short else 0
        if n_long * to_short <= n_short * to_long:
            return n_long, _rounded(n_long * to_short, to_long, turn)
        return _rounded(n_short * to_long, to_short, turn), n_short

    def __str__(self) -> str:
        parts = [f"min_doc_len = {self.min_doc_len}"] if self.min_doc_len else []
        if self.long_doc_share is not None:
            parts += [f"long_doc_len = {self.long_doc_len}", f"long_doc_share = {self.long_doc_share:g}"]
        return ", ".join(parts)


def _rounded(n: int, d: int, turn: int) -> int:
    """floor(n / d + turn / 2^64), exactly."""
    return ((n << 64) + turn * d) // (d << 64)


class HasRule(Protocol):
    """A stage, or the record of one."""

    @property
    def min_doc_len(self) -> int: ...
    @property
    def long_doc_len(self) -> int: ...
    @property
    def long_doc_share(self) -> float | None: ...


def rule_of(stage: HasRule) -> DocRule | None:
    """The rule of a stage; None where it reads all documents alike."""
    least = stage.min_doc_len if stage.min_doc_len > 1 else 0  # documents without a token are never read
    if stage.long_doc_len and stage.long_doc_share is not None:
        return DocRule(least, stage.long_doc_len, float(stage.long_doc_share))
    return DocRule(least) if least else None


class Survey(NamedTuple):
    """What a source holds under a rule: numbers and tokens of the short and the long documents that pass (without a
    share all are short), and the longest document of all."""

    n_short: int
    n_long: int
    short_tokens: int
    long_tokens: int
    longest: int

    @classmethod
    def make(cls, doc_ends: np.ndarray, rule: DocRule) -> Survey:
        """doc_ends: int64 or uint64 [n], cumulative; read once."""
        n_short = n_long = short_tokens = long_tokens = longest = last = 0
        for first in range(0, len(doc_ends), _CHUNK):
            ends = doc_ends[first : first + _CHUNK].astype(np.int64)
            lengths = np.diff(ends, prepend=last)
            last, longest = int(ends[-1]), max(longest, int(lengths.max()))
            lengths = lengths[lengths >= max(1, rule.min_doc_len)]
            long = lengths >= rule.long_doc_len if rule.long_doc_share is not None else np.zeros(lengths.size, bool)
            n_long, n_short = n_long + int(long.sum()), n_short + int((~long).sum())
            long_tokens, short_tokens = long_tokens + int(lengths[long].sum()), short_tokens + int(lengths[~long].sum())
        return cls(n_short, n_long, short_tokens, long_tokens, longest)

    def fewest(self, rule: DocRule) -> int:
        """The number of documents of the scarcer kind that the rule needs."""
        if rule.long_doc_share is None or not rule.long_doc_share:
            return self.n_short
        return self.n_long if rule.long_doc_share == 1 else min(self.n_short, self.n_long)

    def problem(self, rule: DocRule) -> str | None:
        """Why no row can be made under the rule; None where one can."""
        longest = f"the longest document has {self.longest:,} tokens"
        if not self.n_short + self.n_long:
            return f"min_doc_len = {rule.min_doc_len}: no document is that long, {longest}; lower it, or use other data"
        share = rule.long_doc_share
        if share and not self.n_long:
            return (
                f"long_doc_len = {rule.long_doc_len}: no document is that long ({longest}), but long_doc_share = "
                f"{share:g} of the rows are to be made of such; lower long_doc_len, or use other data"
            )
        if share is not None and share < 1 and not self.n_short:
            return (
                f"long_doc_len = {rule.long_doc_len}: no document of at least {max(1, rule.min_doc_len)} tokens is "
                f"shorter ({longest}), but long_doc_share = {share:g} leaves rows for such; raise long_doc_len, lower "
                "min_doc_len, or set long_doc_share = 1"
            )
        return None
