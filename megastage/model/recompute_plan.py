"""Which layers a recomputation policy touches (pure Python, for planning as well as for running)."""

from __future__ import annotations


def recomputes(layer: int, mode: str, option: str = "2") -> bool:
    """Whether layer `layer` (global, 0-based) runs again in backward, in whole or ("op") in part.

    Raises ValueError for an unknown mode or option.
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
    return (layer + 1) % int(option) == 0


def recomputed_share(n_layers: int, mode: str, option: str = "2") -> float:
    """Share of the layers' matrix products and attention that is computed again (for `flops.hardware_flops`)."""
    if (mode, option) == ("selective", "op"):
        return 0.0
    return sum(recomputes(i, mode, option) for i in range(n_layers)) / n_layers
