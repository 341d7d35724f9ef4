"""The bar for numerics: no further from the float64 result than twice PyTorch's own op at that dtype, or 2 ulp.

Element by element: an error may reach twice the largest one that PyTorch's op makes anywhere in the same tensor, or
2 ulp of the element itself, whichever is larger. Nothing else is forgiven: no tolerance, no norm over the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Error(NamedTuple):
    """Largest errors of ours and PyTorch's, and the largest share of its allowance that an element of ours takes."""

    ours: float
    torchs: float
    share: float


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbours of `dtype` at the magnitude of x (float64)."""
    limits = torch.finfo(dtype)
    return limits.eps * x.abs().clamp(min=limits.smallest_normal).log2().floor().exp2()


def compare(ours: Tensor, torchs: Tensor, true: Tensor) -> Error:
    """Errors against `true` (float64, from the inputs as `ours` got them); infinities must stand where they should."""
    assert ours.shape == torchs.shape == true.shape
    assert true.dtype == torch.float64
    finite = true.isfinite()
    assert torch.equal(ours.double()[~finite], true[~finite]), "infinities differ"
    if not finite.any():
        return Error(0.0, 0.0, 0.0)
    error, torch_error = ((x.double() - true)[finite].abs() for x in (ours, torchs))
    allowed = torch.maximum(2 * ulp(true[finite], ours.dtype), 2 * torch_error.max())
    share = (error / allowed).nan_to_num(nan=torch.inf).max()  # a NaN of ours misses any bar
    return Error(error.max().item(), torch_error.max().item(), share.item())


def assert_as_good(
    ours: Mapping[str, Tensor], torchs: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> dict[str, Error]:
    """Hold every result and gradient to the bar; returns the errors."""
    assert ours.keys() == torchs.keys() == exact.keys()
    errors = {name: compare(ours[name], torchs[name], true) for name, true in exact.items()}
    for name, error in errors.items():
        assert error.share <= 1, (
            f"{name}: error {error.ours:.3e}, PyTorch's {error.torchs:.3e}: {error.share:.2f} of it"
        )
    return errors


def joined(draws: Iterable[Sequence[Mapping[str, Tensor]]]) -> tuple[dict[str, Tensor], ...]:
    """(ours, PyTorch's, exact) of several draws of the numbers, end to end. In a tensor of a few elements one draw of
    PyTorch's error is luck, and twice that is no bar."""
    return tuple({n: torch.cat([x[n].flatten() for x in way]) for n in way[0]} for way in zip(*draws))
