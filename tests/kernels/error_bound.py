"""The bar for numerics: no further from the float64 result than twice PyTorch's own op at that dtype, or 2 ulp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_as_good(
    ours: Sequence[Tensor], torchs: Sequence[Tensor], exact: Sequence[Tensor], terms: Sequence[float] = ()
) -> None:
    """Compare results (and gradients) with PyTorch's at the same dtype; `exact` comes from float64 inputs.

    terms: per result, the size of the terms whose difference it is, where that cancels by construction.
    """
    assert len(ours) == len(torchs) == len(exact)
    for number, (our, their, true) in enumerate(zip(ours, torchs, exact)):
        assert our.shape == true.shape
        assert true.dtype == torch.float64
        least = terms[number] if terms else torch.finfo(our.dtype).smallest_normal
        ulp = torch.finfo(our.dtype).eps * true.abs().clamp(min=least)
        error, their_error = (our.double() - true).abs(), (their.double() - true).abs()
        bound = torch.maximum(2 * ulp, 2 * their_error.max() if their.numel() else ulp)
        assert (error <= bound).all(), (
            f"result {number}: error {error.max():.3e} (PyTorch {their_error.max():.3e}) at value "
            f"{true.flatten()[(error - bound).argmax()]:.3e}"
        )
