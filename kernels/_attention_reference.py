"""Attention in plain PyTorch: the meaning of the Triton kernels, and what runs without a GPU.

Two paths. On CPUs each document is one call of PyTorch's own tiled kernel, so cost follows the documents and no [T, S]
tensor is made. With a window, a softcap or a sink, or on another device, blocks of queries meet just the keys that they
can see.
Shapes: queries B T H D, keys and values B S K D; K key/value heads serve G = H / K query heads each; lse B H T.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK = 256


class Geometry(NamedTuple):
    """Which pairs attend, and how scores are formed. window 0: none; softcap 0.0: none."""

    causal: bool
    scale: float
    q_offset: int
    window: int
    softcap: float


class Segment(NamedTuple):
    """Queries [first, last) against keys [start, stop) of one row; causal: query i sees keys up to i of the segment.

    merge: an earlier segment has the same queries.
    """

    first: int
    last: int
    start: int
    stop: int
    causal: bool
    merge: bool = False


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, sink: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, D], lse [B, H, T]); lse is fp32, or fp64 for fp64 input."""
    B, T, H, _ = q.shape
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((B, H, T), -math.inf, dtype=_lse_dtype(q), device=q.device)
    if q.numel() == 0 or k.shape[1] == 0:
        return out, lse
    tiled = _tiled(q, geometry, sink)
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    for b in range(B):
        row = None if bounds is None else bounds[b]
        if not tiled:
            _blocks_forward(q[b], k[b], v[b], row, sink, geometry, out[b], lse[b])
            continue
        for segment in _segments(row, T, k.shape[1], geometry):
            _tiled_forward(q[b], k[b], v[b], segment, geometry.scale, out[b], lse[b])
    return out, lse


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, sink: Tensor | None, geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dsink); dsink is empty without a sink."""
    T, S = q.shape[1], k.shape[1]
    dq, dk, dv = (torch.zeros(x.shape, dtype=_lse_dtype(q), device=q.device) for x in (q, k, v))
    dsink = q.new_zeros(0 if sink is None else q.shape[2], dtype=lse.dtype)
    if q.numel() and S:
        bounds = None if cu_seqlens is None else cu_seqlens.tolist()
        for b in range(q.shape[0]):
            row = None if bounds is None else bounds[b]
            dlse_row = None if dlse is None else dlse[b]
            grads = (dq[b], dk[b], dv[b])
            if not _tiled(q, geometry, sink):
                _blocks_backward(dout[b], dlse_row, q[b], k[b], v[b], row, sink, geometry, grads, dsink)
                continue
            dout_row = _without_lone(dout[b], row, geometry, dv[b])
            for segment in _segments(row, T, S, geometry):
                tensors = (dout_row, dlse_row, q[b], k[b], v[b], out[b], lse[b])
                _tiled_backward(*tensors, segment, geometry.scale, grads)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsink if sink is None else dsink.to(sink.dtype)


def _without_lone(dout: Tensor, bounds: list[int] | None, geometry: Geometry, dv: Tensor) -> Tensor:
    """dout [T, H, D] with 0 for queries that see a single key, whose part of dv [S, K, D] is added here.

    Their output is that key's value whatever the scores are. dout * v - dout * out would say so only
    up to rounding, and documents of one token would get noise where their gradients are 0.
    """
    low, high = key_intervals(bounds, dout.shape[0], dv.shape[0], geometry)
    lone = (high - low == 1).nonzero()[:, 0].to(dout.device)
    if not len(lone):
        return dout
    values = dout[lone].unflatten(1, (dv.shape[1], -1)).sum(2, dtype=dv.dtype)
    dv.index_put_((low.to(dout.device)[lone],), values, accumulate=True)
    return dout.index_fill(0, lone, 0.0)


def _lse_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _tiled(q: Tensor, geometry: Geometry, sink: Tensor | None) -> bool:
    return q.device.type == "cpu" and not geometry.window and not geometry.softcap and sink is None


def _segments(bounds: list[int] | None, T: int, S: int, geometry: Geometry) -> Iterator[Segment]:
    """Rectangles and triangles that cover the mask of one row; a query may meet one of each, merged by their lse."""
    offset = geometry.q_offset
    documents = [(min(0, offset), max(S, offset + T))] if bounds is None else pairwise(bounds)
    for begin, end in documents:
        first, last = max(begin - offset, 0), min(end - offset, T)
        start, stop = max(begin, 0), min(end, S)
        if not geometry.causal:
            if first < last and start < stop:
                yield Segment(first, last, start, stop, False)
            continue
        first = max(first, start - offset)
        stop = min(stop, last + offset)
        if first >= last or start >= stop:
            continue
        diagonal = min(first + offset, stop)  # keys before it are seen by every query of the segment
        if start < diagonal:
            yield Segment(first, last, start, diagonal, False)
        if diagonal < stop:
            yield Segment(first, last, diagonal, stop, True, start < diagonal)


def _heads(q: Tensor, k: Tensor, v: Tensor, segment: Segment) -> tuple[Tensor, Tensor, Tensor]:
    """Views [K, G, rows, D]: key/value heads become the batch, so that grouped queries share them without a copy."""
    q_KGTD = q[segment.first : segment.last].unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)
    size = (k.shape[1], q_KGTD.shape[1], segment.stop - segment.start, k.shape[2])
    k_KGSD, v_KGSD = (x[segment.start : segment.stop].transpose(0, 1)[:, None].expand(size) for x in (k, v))
    return q_KGTD, k_KGSD, v_KGSD


def _tiled_forward(q: Tensor, k: Tensor, v: Tensor, segment: Segment, scale: float, out: Tensor, lse: Tensor) -> None:
    """Attend one segment and merge it into out [T, H, D], lse [H, T]."""
    tensors = _heads(q, k, v, segment)
    part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *tensors, 0.0, segment.causal, scale=scale
    )
    part, part_lse = part.flatten(0, 1).transpose(0, 1), part_lse.flatten(0, 1).to(lse.dtype)
    rows = slice(segment.first, segment.last)
    if not segment.merge:
        out[rows], lse[:, rows] = part, part_lse
        return
    before = lse[:, rows]
    total = torch.logaddexp(before, part_lse)
    old, new = ((x - total).exp().T[..., None] for x in (before, part_lse))
    out[rows] = (out[rows] * old + part * new).to(out.dtype)
    lse[:, rows] = total


def _tiled_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    segment: Segment, scale: float, grads: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Add one segment's gradients, from the merged out and lse of its queries.

    The built-in backward knows no gradient of lse. One more column carries it: with dout' = [dout, 1],
    out' = [out, -dlse] and zeros beside q, k and v, its sum(out' * dout') is sum(out * dout) - dlse.
    """
    rows, keys = slice(segment.first, segment.last), slice(segment.start, segment.stop)
    width = q.shape[-1]
    if dlse is not None:
        dout, out, q, k, v = (F.pad(x.to(lse.dtype), (0, 1)) for x in (dout, out, q, k, v))
        dout[..., -1], out[..., -1] = 1.0, -dlse.T
    q_KGTD, k_KGSD, v_KGSD = _heads(q, k, v, segment)
    shape = (k.shape[1], -1)
    dout, out = (x[rows].unflatten(1, shape).permute(1, 2, 0, 3) for x in (dout, out))
    lse_KGT = lse[:, rows].unflatten(0, shape)
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q_KGTD, k_KGSD, v_KGSD, out, lse_KGT, 0.0, segment.causal, scale=scale
    )
    dq, dk, dv = (x[..., :width] for x in found)
    grads[0][rows] += dq.permute(2, 0, 1, 3).flatten(1, 2)
    grads[1][keys] += dk.sum(1, dtype=grads[1].dtype).transpose(0, 1)
    grads[2][keys] += dv.sum(1, dtype=grads[2].dtype).transpose(0, 1)


def key_intervals(bounds: list[int] | None, T: int, S: int, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """int64 [T] each: query t of a row sees the keys [low, high)."""
    position = torch.arange(T) + geometry.q_offset
    low, high = torch.zeros_like(position), torch.full_like(position, S)
    if bounds is not None:
        cu = torch.tensor(bounds)
        after = torch.searchsorted(cu, position, right=True)
        known = (after > 0) & (after < len(bounds))
        low, high = cu[(after - 1).clamp(min=0)], cu[after.clamp(max=len(bounds) - 1)]
        high = torch.where(known, high, low)
    if geometry.causal:
        high = torch.minimum(high, position + 1)
    if geometry.window:
        low = torch.maximum(low, position - geometry.window + 1)
        if not geometry.causal:
            high = torch.minimum(high, position + geometry.window)
    low = low.clamp(0, S)
    return low, torch.maximum(high.clamp(0, S), low)


def _blocks(bounds: list[int] | None, T: int, S: int, geometry: Geometry) -> Iterator[tuple[slice, slice, Tensor]]:
    """(queries, keys, seen [queries, keys]) of each block of queries that sees any key."""
    low, high = key_intervals(bounds, T, S, geometry)
    for first in range(0, T, QUERY_BLOCK):
        rows = slice(first, min(first + QUERY_BLOCK, T))
        filled = (low[rows] < high[rows]).nonzero()
        if not len(filled):
            continue
        # queries that see no key lie before or behind all others: a padding tail is not read
        rows = slice(first + int(filled[0]), first + int(filled[-1]) + 1)
        start, stop = int(low[rows].min()), int(high[rows].max())
        keys = torch.arange(start, stop)
        yield rows, slice(start, stop), (keys >= low[rows, None]) & (keys < high[rows, None])


def _scores(q: Tensor, k: Tensor, seen: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor | None]:
    """(scores [K, G, queries, keys], -inf where unseen; tanh of the capped score or None)."""
    scores = torch.einsum("tkgd,skd->kgts", q, k) * geometry.scale
    capped = None
    if geometry.softcap:
        capped = (scores / geometry.softcap).tanh()
        scores = capped * geometry.softcap
    return scores.masked_fill(~seen.to(scores.device), -math.inf), capped


def _probabilities(scores: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(p, log-sum-exp, p of the sink) of scores [K, G, queries, keys], each query with a key it sees.

    A sink [H] takes its share; without one the last is 0.
    """
    peak_KGT = scores.amax(-1)
    if sink is None:
        sink_KGT = torch.zeros_like(peak_KGT)
    else:
        sink = sink.to(scores.dtype).unflatten(0, scores.shape[:2])[..., None]
        peak_KGT = torch.maximum(peak_KGT, sink)
        sink_KGT = (sink - peak_KGT).exp()
    p = (scores - peak_KGT[..., None]).exp_()
    total_KGT = p.sum(-1) + sink_KGT
    return p.div_(total_KGT[..., None]), peak_KGT + total_KGT.log(), sink_KGT / total_KGT


def _blocks_forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: list[int] | None, sink: Tensor | None, geometry: Geometry,
    out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    heads = (k.shape[1], -1)
    for rows, keys, seen in _blocks(bounds, q.shape[0], k.shape[0], geometry):
        wide_q, wide_k, wide_v = (x.to(lse.dtype) for x in (q[rows].unflatten(1, heads), k[keys], v[keys]))
        p, lse_KGT, _ = _probabilities(_scores(wide_q, wide_k, seen, geometry)[0], sink)
        out[rows] = torch.einsum("kgts,skd->tkgd", p, wide_v).flatten(1, 2).to(out.dtype)
        lse[:, rows] = lse_KGT.flatten(0, 1)


def _blocks_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bounds: list[int] | None, sink: Tensor | None,
    geometry: Geometry, grads: tuple[Tensor, Tensor, Tensor], dsink: Tensor,
) -> None:  # fmt: skip
    """All keys of a query are at hand, so its sum(p * dp) is formed from them and not from out: fewer digits cancel."""
    heads, dtype = (k.shape[1], -1), grads[0].dtype
    for rows, keys, seen in _blocks(bounds, q.shape[0], k.shape[0], geometry):
        q_TKGD, do_TKGD = (x[rows].unflatten(1, heads).to(dtype) for x in (q, dout))
        k_SKD, v_SKD = k[keys].to(dtype), v[keys].to(dtype)
        scores, capped = _scores(q_TKGD, k_SKD, seen, geometry)
        p, _, sink_KGT = _probabilities(scores, sink)
        dp = torch.einsum("tkgd,skd->kgts", do_TKGD, v_SKD)
        delta = (p * dp).sum(-1)
        ds = p * (dp - delta[..., None])
        if dlse is not None:
            dlse_KGT = dlse[:, rows].unflatten(0, heads)
            ds += p * dlse_KGT[..., None]
            delta = delta - dlse_KGT
        if sink is not None:
            dsink -= (sink_KGT * delta).sum(-1).flatten()
        if capped is not None:
            ds = ds * (1 - capped.square())
        ds = ds * geometry.scale
        grads[0][rows] += torch.einsum("kgts,skd->tkgd", ds, k_SKD).flatten(1, 2)
        grads[1][keys] += torch.einsum("kgts,tkgd->gskd", ds, q_TKGD).sum(0)
        grads[2][keys] += torch.einsum("kgts,tkgd->gskd", p, do_TKGD).sum(0)
