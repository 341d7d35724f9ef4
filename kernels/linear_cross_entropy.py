"""Output projection and cross-entropy in one, in tiles of tokens by vocabulary: the logits of a batch never exist at
once, and their gradient is formed while a tile is at hand, so that backward only scales what forward computed.

Vocabulary-parallel (Shoeybi et al. 2019, section 3): each rank of `group` holds rows [vocab_start, vocab_start + V) of
the weight; row maxima, sums of exponentials and target logits are reduced over the group.

Letters: N tokens, D model width, V vocabulary rows of this rank; C x W one tile of logits (tokens by vocabulary).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megastage.kernels.dispatch import same_device, use_triton

IGNORE = -100
CACHE_ELEMENTS = 1 << 17  # fp32 elements worked on at once on a CPU: half a MiB stays in the second-level cache


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    vocab_start: int = 0,
    z_loss: float = 0.0,
    chunk_tokens: int = 1024,
    chunk_vocab: int = 0,
    reduction: str = "sum",
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sum over valid tokens of cross-entropy (+ z_loss * lse^2, Chowdhery et al. 2022), a scalar in fp32.

    labels_N: int64, -100 is ignored; they are global vocabulary ids, and one that no rank holds makes the loss NaN.
    The gradient of `hidden_ND` is this rank's part: with a group of several ranks it must still be summed over the
    group by the caller.

    chunk_vocab: 0 keeps the logits of a token chunk whole, [chunk_tokens, V], and accumulates the weight's gradient in
    fp32 [V, D]. A positive number works in tiles [chunk_tokens, chunk_vocab]: logits are computed twice, but neither
    the whole rows nor that buffer exist, and a group communicates once in all instead of once a chunk.
    reduction: "sum", or "mean" over the valid labels given here (0 if there are none).
    fp64 inputs are computed in fp64 by the reference.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f'reduction = {reduction!r}: choose "sum" or "mean"')
    loss = linear_cross_entropy_by_token(
        hidden_ND, weight_VD, labels_N, vocab_start=vocab_start, z_loss=z_loss, chunk_tokens=chunk_tokens,
        chunk_vocab=chunk_vocab, group=group, backend=backend,
    )[0]  # fmt: skip
    if reduction == "mean":
        loss = loss / (labels_N != IGNORE).sum().clamp(min=1)
    return loss


def linear_cross_entropy_by_token(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    vocab_start: int = 0,
    z_loss: float = 0.0,
    chunk_tokens: int = 1024,
    chunk_vocab: int = 0,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """As `linear_cross_entropy`, and each token's part of the sum: fp32 [N], 0 where ignored, without a gradient."""
    _check(hidden_ND, weight_VD, labels_N, chunk_tokens, chunk_vocab)
    triton = use_triton(backend, hidden_ND.device, "linear_cross_entropy", hidden_ND.dtype)
    with_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    group_name = "" if group is None or group.size() == 1 else group.group_name
    loss, _, _, losses_N = linear_cross_entropy_op(
        hidden_ND, weight_VD, labels_N, vocab_start, z_loss, chunk_tokens, chunk_vocab, group_name, with_grad, triton
    )
    return loss, losses_N.detach()


def _check(h_ND: Tensor, w_VD: Tensor, labels_N: Tensor, chunk_tokens: int, chunk_vocab: int) -> None:
    if h_ND.ndim != 2 or w_VD.ndim != 2 or h_ND.shape[1] != w_VD.shape[1] or labels_N.shape != h_ND.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy takes hidden [N, D], weight [V, D] and labels [N], not {tuple(h_ND.shape)}, "
            f"{tuple(w_VD.shape)} and {tuple(labels_N.shape)}"
        )
    if h_ND.dtype != w_VD.dtype:
        raise ValueError(f"hidden is {h_ND.dtype} but weight is {w_VD.dtype}: cast one of them")
    if labels_N.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels are {labels_N.dtype}: give them as int64")
    same_device("linear_cross_entropy", hidden=h_ND, weight=w_VD, labels=labels_N)
    if chunk_tokens < 1 or chunk_vocab < 0:
        raise ValueError(f"chunk_tokens = {chunk_tokens} must be at least 1 and chunk_vocab = {chunk_vocab} at least 0")


@torch.library.custom_op("megastage::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    vocab_start: int,
    z_loss: float,
    chunk_tokens: int,
    chunk_vocab: int,
    group_name: str,
    with_grad: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(summed loss, its gradient by hidden, its gradient by weight, its part of each token [N]).

    Gradients are empty without `with_grad`.
    """
    N, V = hidden_ND.shape[0], weight_VD.shape[0]
    wide = _wide(hidden_ND.dtype)
    whole_rows = _whole_rows(V, chunk_vocab, group_name)
    tiles = _Tiles(weight_VD, vocab_start, z_loss, chunk_tokens, chunk_vocab or max(V, 1), group_name, triton)
    # with whole rows a token chunk is finished before the next one; with tiles all tokens are finished together
    together = chunk_tokens if whole_rows else max(N, 1)
    losses_N = torch.empty(N, dtype=wide, device=hidden_ND.device)
    if with_grad:
        # written by their first product; without tokens, or a vocabulary, there is none
        make = torch.empty_like if N and V else torch.zeros_like
        grad_hidden = make(hidden_ND, dtype=None if whole_rows else wide)
        grad_weight = make(weight_VD, dtype=None if together >= N else wide)
    else:
        grad_hidden, grad_weight = hidden_ND.new_empty(0), weight_VD.new_empty(0)
    with torch.autocast(hidden_ND.device.type, enabled=False):  # the inputs' types say how products are to be made
        for tokens in _slices(N, together):
            h_ND, labels = hidden_ND[tokens], labels_N[tokens]
            losses_N[tokens], rows, logits_CW = tiles.statistics(h_ND, labels)
            if with_grad:
                add = tokens.start > 0
                tiles.gradients(h_ND, labels, rows, logits_CW, grad_hidden[tokens], grad_weight, add)
    loss = losses_N.sum(dtype=torch.float64).to(wide)
    return loss, grad_hidden.to(hidden_ND.dtype), grad_weight.to(weight_VD.dtype), losses_N


@linear_cross_entropy_op.register_fake
def _(hidden_ND, weight_VD, labels_N, vocab_start, z_loss, chunk_tokens, chunk_vocab, group_name, with_grad, triton):
    loss = hidden_ND.new_empty((), dtype=_wide(hidden_ND.dtype))
    losses_N = hidden_ND.new_empty(hidden_ND.shape[0], dtype=loss.dtype)
    if not with_grad:
        return loss, hidden_ND.new_empty(0), weight_VD.new_empty(0), losses_N
    return loss, torch.empty_like(hidden_ND), torch.empty_like(weight_VD), losses_N


@torch.library.custom_op("megastage::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward_op(
    grad_loss: Tensor, grad_hidden: Tensor, grad_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of forward times the gradient of the loss, a scalar."""
    return _times(grad_hidden, grad_loss), _times(grad_weight, grad_loss)


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor, rounded once. As a scalar a GPU would round the factor to x's type first."""
    return torch.mul(x, factor.view(1), out=torch.empty_like(x))


@linear_cross_entropy_backward_op.register_fake
def _(grad_loss, grad_hidden, grad_weight):
    return torch.empty_like(grad_hidden), torch.empty_like(grad_weight)


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], output[2])


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 10
    kept = torch._C._autograd._get_current_graph_task_keep_graph()  # for another backward, or a second derivative
    if not kept and type(grad_loss) is Tensor and grad_loss.device.type == "cpu":
        # hand over what is there: new pages for a [V, D] tensor cost more than all arithmetic on a few tokens. (A GPU
        # would have to wait for the factor)
        grads = [x.detach() for x in ctx.saved_tensors]
        return *(grads if grad_loss == 1 else (x.mul_(grad_loss) for x in grads)), *(None,) * 8
    return *linear_cross_entropy_backward_op(grad_loss, *ctx.saved_tensors), *(None,) * 8


linear_cross_entropy_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.megastage.linear_cross_entropy)
def linear_cross_entropy_flop(hidden_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """2NDV for the logits, again if they are computed twice, and 4NDV for both gradients."""
    (N, D), V = hidden_shape, weight_shape[0]
    _, _, _, chunk_tokens, chunk_vocab, group_name, with_grad, *_ = args
    one_tile = chunk_tokens >= N and (chunk_vocab >= V or not chunk_vocab)
    twice = not one_tile and not _whole_rows(V, chunk_vocab, group_name)
    return 2 * N * D * V * (1 + with_grad * (2 + twice))


def _whole_rows(V: int, chunk_vocab: int, group_name: str) -> bool:
    """Whether token chunks are finished one by one. In a group the answer must not depend on V: ranks that hold parts
    of other sizes must make the same collective calls."""
    return not chunk_vocab or (chunk_vocab >= V and not group_name)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


class Rows(NamedTuple):
    """What the gradient of a row of logits x needs: p = exp(x - peak) * inverse are its probabilities and
    p - onehot + p * pull its gradient; pull is 2 * z_loss * lse. Apart, because 1 + pull would round pull off."""

    peak_N: Tensor
    inverse_N: Tensor
    pull_N: Tensor

    def of(self, tokens: slice) -> Rows:
        return Rows(*(x[tokens] for x in self))


class _Tiles:
    """The two passes over the tiles of a set of tokens: statistics of the rows, then gradients."""

    def __init__(
        self, weight_VD: Tensor, vocab_start: int, z_loss: float, chunk_tokens: int, chunk_vocab: int,
        group_name: str, triton: bool,
    ):  # fmt: skip
        self.weight_VD, self.vocab_start, self.z_loss = weight_VD, vocab_start, z_loss
        self.chunk_tokens, self.chunk_vocab = chunk_tokens, chunk_vocab
        name: Any = group_name  # operators take no process groups, so it crosses by the name torch knows it by
        self.group = dist.distributed_c10d._resolve_process_group(name) if group_name else None
        if triton:
            from megastage.kernels import cross_entropy_triton as back_end

            self.tile_statistics, self.tile_gradient = back_end.tile_statistics, back_end.tile_gradient
        else:
            self.tile_statistics, self.tile_gradient = tile_statistics, tile_gradient

    def statistics(self, h_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Rows, Tensor | None]:
        """(losses [N], what the gradient needs of each row, the logits if they are one tile)."""
        N, wide = h_ND.shape[0], _wide(h_ND.dtype)
        peak_N = h_ND.new_full((N,), float("-inf"), dtype=wide)
        sums_N3 = h_ND.new_zeros((N, 3), dtype=wide)
        logits_CW = None
        for tokens in _slices(N, self.chunk_tokens):
            for vocab in _slices(self.weight_VD.shape[0], self.chunk_vocab):
                logits_CW = matmul_wide(h_ND[tokens], self.weight_VD[vocab].mT)
                tile = self.tile_statistics(logits_CW, labels_N[tokens], self.vocab_start + vocab.start)
                _merge(peak_N[tokens], sums_N3[tokens], *tile)
        if self.group is not None:
            peak_all_N = peak_N.clone()
            dist.all_reduce(peak_all_N, dist.ReduceOp.MAX, group=self.group)
            sums_N3[:, 0] *= (peak_N - peak_all_N).exp()
            dist.all_reduce(sums_N3, dist.ReduceOp.SUM, group=self.group)
            peak_N = peak_all_N
        sum_N, target_N, found_N = sums_N3.unbind(1)
        log_sum_N, valid_N = sum_N.log(), labels_N != IGNORE
        lse_N = log_sum_N + peak_N
        # the maximum and the sum stay apart: x - maximum is exact where x - lse would lose the last digits
        loss_N = log_sum_N + (peak_N - target_N)
        if self.z_loss:  # without it the square of a huge lse must not overflow
            loss_N += self.z_loss * lse_N.square()
        loss_N = torch.where(found_N > 0, loss_N, float("nan"))
        rows = Rows(peak_N, valid_N / sum_N, 2 * self.z_loss * lse_N)
        one_tile = self.chunk_tokens >= N and self.chunk_vocab >= self.weight_VD.shape[0]
        return torch.where(valid_N, loss_N, 0), rows, logits_CW if one_tile else None

    def gradients(
        self, h_ND: Tensor, labels_N: Tensor, rows: Rows, logits_CW: Tensor | None,
        grad_hidden_ND: Tensor, grad_weight_VD: Tensor, add: bool,
    ) -> None:  # fmt: skip
        """Store both gradients (of the summed loss) that these tokens give; the weight's is added to what is there if
        `add` says so. `logits_CW` is overwritten."""
        exact = grad_weight_VD.dtype == rows.peak_N.dtype or self.chunk_tokens >= h_ND.shape[0]
        for vocab in _slices(self.weight_VD.shape[0], self.chunk_vocab):
            weight_WD, sum_WD = self.weight_VD[vocab], grad_weight_VD[vocab]
            if not exact:
                sum_WD = torch.empty_like(sum_WD, dtype=rows.peak_N.dtype)
            for tokens in _slices(h_ND.shape[0], self.chunk_tokens):
                if logits_CW is None:
                    logits_CW = matmul_wide(h_ND[tokens], weight_WD.mT)
                first = self.vocab_start + vocab.start
                grad_CW = self.tile_gradient(logits_CW, labels_N[tokens], first, rows.of(tokens), h_ND.dtype)
                logits_CW = None
                _put_product(grad_hidden_ND[tokens], grad_CW, weight_WD, add=vocab.start > 0)
                _put_product(sum_WD, grad_CW.mT, h_ND[tokens], add=add or tokens.start > 0)
            if not exact:
                grad_weight_VD[vocab] = sum_WD


def matmul_wide(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b with fp32 accumulation; for 16-bit inputs the result is fp32 on a GPU and rounded to them on a CPU."""
    if a_MK.is_cuda and a_MK.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a_MK, b_KN, out_dtype=torch.float32)
    return torch.mm(a_MK, b_KN)


def _put_product(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor, *, add: bool) -> None:
    """Store a @ b or add it, as a whole: in one chain with what is there each term would be rounded to the digits of
    the total. What is kept in 16 bit receives one product only."""
    if out_MN.dtype != a_MK.dtype and adds_wide(out_MN.device, a_MK.dtype):
        add_wide(out_MN if add else out_MN.zero_(), a_MK, b_KN)
    elif add:
        out_MN += matmul_wide(a_MK, b_KN)
    elif out_MN.dtype == a_MK.dtype:
        torch.mm(a_MK, b_KN, out=out_MN)
    else:
        out_MN.copy_(matmul_wide(a_MK, b_KN))


def add_wide(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """fp32 out += 16-bit a @ b inside the product: the matrix [V, D] of every chunk is not written, read and added."""
    torch.ops.aten.addmm.dtype_out(out_MN, a_MK, b_KN, out_MN.dtype, out=out_MN)


@cache
def adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch has `add_wide` for the device, tried once: not for CPUs, and older ones want one dtype."""
    eye = torch.eye(16, dtype=dtype, device=device)
    out = torch.full((16, 16), 1 / 3, device=device)
    try:
        add_wide(out, eye, eye)
    except RuntimeError:
        return False
    return torch.allclose(out, eye.float() + 1 / 3)


def _merge(peak_C: Tensor, sums_C3: Tensor, tile_peak_C: Tensor, tile_sums_C3: Tensor) -> None:
    """Fold a tile's row maxima and sums into the running ones, in place."""
    top_C = torch.maximum(peak_C, tile_peak_C)
    sums_C3[:, 0] *= (peak_C - top_C).exp()
    tile_sums_C3[:, 0] *= (tile_peak_C - top_C).exp()
    sums_C3 += tile_sums_C3
    peak_C.copy_(top_C)


def tile_statistics(logits_CW: Tensor, labels_C: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Per row of a tile whose columns are vocabulary ids from `first`: the maximum [C], and [C, 3]: the sum of
    exponentials below it, the target's logit (0 if elsewhere), and whether the target is here (1 or 0)."""
    wide, (C, W) = _wide(logits_CW.dtype), logits_CW.shape
    peak_C = logits_CW.new_empty(C, dtype=wide)
    sums_C3 = logits_CW.new_empty((C, 3), dtype=wide)
    for rows in _slices(C, max(1, CACHE_ELEMENTS // W)):
        x = logits_CW[rows].to(wide)
        peak = torch.amax(x, -1, keepdim=True, out=peak_C[rows, None])
        torch.sum((x.sub_(peak) if x.dtype != logits_CW.dtype else x - peak).exp_(), -1, out=sums_C3[rows, 0])
    column_C, here_C = _columns(labels_C, first, W)
    sums_C3[:, 1] = torch.where(here_C, logits_CW.gather(1, column_C)[:, 0].to(wide), 0)
    sums_C3[:, 2] = here_C
    return peak_C, sums_C3


def tile_gradient(logits_CW: Tensor, labels_C: Tensor, first: int, stats: Rows, dtype: torch.dtype) -> Tensor:
    """p - onehot + p * pull for a tile, in `dtype`; overwrites the logits where it can."""
    C, W = logits_CW.shape
    column_C, here_C = _columns(labels_C, first, W)
    grad_CW = logits_CW if logits_CW.dtype == dtype else torch.empty_like(logits_CW, dtype=dtype)
    peak_C, inverse_C, pull_C = (x[:, None] for x in stats)
    p_C = (logits_CW.gather(1, column_C).to(peak_C.dtype) - peak_C).exp_() * inverse_C
    target_C = (p_C - here_C[:, None].to(p_C.dtype)) + p_C * pull_C  # of column 0 where the label is in another tile
    factor_C = inverse_C * (1 + pull_C)
    for rows in _slices(C, max(1, CACHE_ELEMENTS // W)):
        x = logits_CW[rows].to(peak_C.dtype)
        x = (x - peak_C[rows] if x.dtype != dtype else x.sub_(peak_C[rows])).exp_()
        x *= factor_C[rows]
        grad_CW[rows] = x.scatter_(1, column_C[rows], target_C[rows])
    return grad_CW


def _columns(labels_C: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Column of each label in the tile [C, 1] (0 if it is elsewhere) and whether it is there [C]."""
    column_C = labels_C - first
    here_C = (labels_C != IGNORE) & (column_C >= 0) & (column_C < width)
    return torch.where(here_C, column_C, 0)[:, None], here_C
