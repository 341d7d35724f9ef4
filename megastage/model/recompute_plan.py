"""Which layers a recomputation policy touches (pure Python, for planning)."""

from __future__ import annotations


def recomputes(position: int, mode: str, option: str = "2") -> bool:
    """Whether the layer at `position` (0-based in its pipeline part) runs again in backward, wholly or ("op") partly.

    mode and option as in [activation_checkpoint]: "none", "full", or "selective" with "op" or a number n (every n-th
    layer from the first). Raises ValueError for anything else.
    """
    if mode == "none":
        return False
    if mode == "full":
        return True
    if mode != "selective":
        raise ValueError(f'activation_checkpoint.mode = "{mode}": use "none", "selective" or "full"')
    if option == "op":
        return True
    if not (option.isascii() and option.isdigit() and int(option) > 0):
        raise ValueError(f'activation_checkpoint.selective_ac_option = "{option}": use "op" or a positive number')
    return position % int(option) == 0
