"""Small made-up texts for `c4_test` and `c4_validation`, so that the default config runs with no download.

Sentences come from a little grammar driven by splitmix64 (Steele et al. 2014): the same on every machine and Python.
"""

from __future__ import annotations

from collections.abc import Iterator

SPLITS = {"c4_test": (0x5EED, 3000), "c4_validation": (0xBEEF, 300)}

_PEOPLE = [
    "The baker",
    "A sailor",
    "Our teacher",
    "The old gardener",
    "My neighbour",
    "A young engineer",
    "Her brother",
]
_VERBS = ["carried", "painted", "repaired", "counted", "measured", "borrowed", "described", "polished", "sold"]
_ADJECTIVES = ["small", "heavy", "broken", "bright", "wooden", "silver", "quiet", "ancient", "round", "narrow"]
_THINGS = ["lantern", "bridge", "clock", "basket", "map", "violin", "window", "engine", "ladder", "kettle", "boat"]
_PLACES = ["by the river", "in the market", "behind the mill", "near the station", "on the hill", "under the oak"]
_TIMES = ["before sunrise", "every Monday", "after the storm", "last winter", "at noon", "during the fair"]
_REASONS = ["because the road was closed", "although it was raining", "since the price had fallen"]


def documents(name: str) -> Iterator[str]:
    """Documents of a split of `SPLITS`: 2 to 24 sentences each, about 0.3 KB to 2 KB."""
    state, count = SPLITS[name]
    draw = _Draws(state)
    for number in range(count):
        title = f"{draw.one(_ADJECTIVES).capitalize()} {draw.one(_THINGS)}, note {number + 1}."
        yield " ".join([title, *(_sentence(draw) for _ in range(2 + draw.below(23)))])


def _sentence(draw: _Draws) -> str:
    kind = draw.below(5)
    if kind == 0:
        a, b = 2 + draw.below(60), 2 + draw.below(60)
        return f"If there are {a} boxes and {b} more arrive {draw.one(_TIMES)}, there are {a + b} boxes."
    if kind == 1:
        thing = draw.one(_THINGS)
        return f"{draw.one(_PEOPLE)} said that the {thing} was {draw.one(_ADJECTIVES)}, {draw.one(_REASONS)}."
    head = f"{draw.one(_PEOPLE)} {draw.one(_VERBS)} a {draw.one(_ADJECTIVES)} {draw.one(_THINGS)} {draw.one(_PLACES)}"
    return f"{head} {draw.one(_TIMES)}." if kind < 4 else f"{head}, {draw.one(_REASONS)}."


class _Draws:
    def __init__(self, state: int) -> None:
        self._state = state

    def below(self, n: int) -> int:
        self._state = (self._state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        x = self._state
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return ((x ^ (x >> 31)) * n) >> 64

    def one(self, words: list[str]) -> str:
        return words[self.below(len(words))]
