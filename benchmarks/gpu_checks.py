"""What benchmarks/gpu.py checks and does not time: attention in every form, and the optimizer's numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_cases import Case, Result, Sizes, draw
from torch import Tensor

from megastage.kernels.flash_attention import attention
from megastage.kernels.optimizer import adamw_, adamw_reference_, step_scalars

# name to (tokens of the queries, of the keys, heads, key/value heads, head dimension, options of attention)
Form = tuple[int, int, int, int, int, dict[str, Any]]
FORMS: dict[str, Form] = {
    "head dim 64": (600, 600, 8, 2, 64, {}),
    "head dim 80, one head a group": (600, 600, 4, 4, 80, {}),
    "head dim 100": (333, 333, 4, 1, 100, {}),
    "head dim 256": (600, 600, 4, 2, 256, {}),
    "full, other lengths": (300, 777, 4, 2, 128, {"causal": False}),
    "second half of a row": (512, 1024, 4, 2, 128, {"q_offset": 512}),
    "window": (1000, 1000, 4, 2, 128, {"window": 130}),
    "softcap": (600, 600, 4, 2, 128, {"softcap": 20.0}),
    "one token": (1, 300, 4, 2, 128, {"q_offset": 299}),
}
TOY_FORMS: dict[str, Form] = {
    "head dim 20, one head a group": (40, 40, 2, 2, 20, {}),
    "second half of a row, window, softcap": (16, 32, 4, 2, 16, {"q_offset": 16, "window": 9, "softcap": 5.0}),
}


def check_makers(sizes: Sizes, device: torch.device, dtype: torch.dtype, back: str) -> list[Callable[[], Case]]:
    forms = TOY_FORMS if sizes.head_dim < 64 else FORMS
    at = (device, dtype, back)
    return [
        *(partial(attention_check, name, form, *at) for name, form in forms.items()),
        partial(optimizer_check, torch.float32, False, device, back),
        partial(optimizer_check, torch.bfloat16, True, device, back),
    ]


def attention_check(name: str, form: Form, device: torch.device, dtype: torch.dtype, back: str) -> Case:
    """Ours with its log-sum-exp against the definition; one head after another of a row of three documents."""
    T, S, H, K, D, options = form
    q = draw(2, T, H, D, device=device, dtype=dtype)
    k, v = (draw(2, S, K, D, device=device, dtype=dtype, seed=i) for i in (1, 2))
    sink = draw(H, device=device, dtype=dtype, seed=3)
    ends = [0, S // 3, S // 3 + 1, S]
    cu = torch.tensor([ends, [0, S, S, S]], dtype=torch.int32, device=device)
    ways: dict[str, Callable[..., Result]] = {
        "ours": lambda q, k, v, sink: attention(
            q, k, v, cu, sink_H=sink, return_lse=True, backend=back, **options
        ),
        "plain": lambda q, k, v, sink: definition(q, k, v, sink, cu, **options),
    }  # fmt: skip
    return Case(f"attention, {name}", T, (q, k, v, sink), ways)


def definition(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor, cu: Tensor,
    causal: bool = True, q_offset: int = 0, window: int = 0, softcap: float = 0.0,
) -> Result:  # fmt: skip
    """Attention written out. Every query here sees a key: an empty row would be NaN."""
    T, S, D, groups = q.shape[1], k.shape[1], q.shape[3], q.shape[2] // k.shape[2]
    query = torch.arange(T, device=q.device)[:, None] + q_offset
    key = torch.arange(S, device=q.device)[None, :]
    positions = torch.arange(S, dtype=torch.int32, device=q.device).expand(2, S).contiguous()
    document = torch.searchsorted(cu[:, 1:].contiguous(), positions, right=True)
    seen = document[:, q_offset : q_offset + T, None] == document[:, None, :]
    if causal:
        seen = seen & (query >= key)
    if window:
        seen = seen & (query - key < window)
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * D**-0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    scores = torch.cat((scores, sink[None, :, None, None].expand(q.shape[0], -1, T, 1)), 3)
    lse = scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(3)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(3)[..., :-1], v), lse


def optimizer_check(dtype: torch.dtype, stochastic: bool, device: torch.device, back: str) -> Case:
    """One step from given states; with stochastic rounding the same random words make the same bits."""
    param, grad, mean = (draw(10007, device=device, dtype=dtype, seed=i) for i in range(3))
    state = (param, grad, mean, mean.square())

    def ours(*tensors: Tensor) -> Result:
        p, g, m, s = (x.clone() for x in tensors)
        adamw_([p], [g], [m], [s], step=3, lr=1e-2, stochastic_rounding=stochastic, seed=5, backend=back)
        return p, m, s

    def plain(*tensors: Tensor) -> Result:
        p, g, m, s = (x.clone() for x in tensors)
        scalars = step_scalars(3, 1e-2, (0.9, 0.95), 1e-8, 0.1)
        adamw_reference_([p], [g], [m], [s], None, scalars, False, 5)
        return p, m, s

    name = f"adamw, {str(dtype).removeprefix('torch.')}{' stochastic' if stochastic else ''}"
    return Case(name, 10007, state, {"ours": ours, "plain": plain}, trains=False)
