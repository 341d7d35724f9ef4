"""Exact attention over packed documents (Dao et al. 2022 for the tiled method): shapes are B T H D for queries, B S K D
for keys and values, K key/value heads shared by H/K query heads each (Ainslie et al. 2023).

`cu_seqlens_BC` (int32) lists, per row, 0 and the document ends in ascending order; the last end is repeated as padding.
A query at row position p attends only to keys of its own document; positions beyond the last end give 0 and lse -inf.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_reference(
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    cu_seqlens_BC: Tensor | None,
    *,
    causal: bool,
    scale: float,
    q_offset: int,
) -> Tensor:
    """One scaled-dot-product call per document: cost follows the documents, never [T, S] for a whole row."""
    groups = q_BTHD.shape[2] // k_BSKD.shape[2]
    T, S = q_BTHD.shape[1], k_BSKD.shape[1]
    rows = []
    for b in range(q_BTHD.shape[0]):
        ends = [0, S] if cu_seqlens_BC is None else cu_seqlens_BC[b].tolist()
        q_HTD = q_BTHD[b].transpose(0, 1)
        k_HSD = k_BSKD[b].transpose(0, 1).repeat_interleave(groups, 0)
        v_HSD = v_BSKD[b].transpose(0, 1).repeat_interleave(groups, 0)
        parts, done = [], 0
        for start, end in pairwise(ends):
            first, last = max(start - q_offset, 0), min(end - q_offset, T)
            if first >= last:
                continue
            stop = min(end, q_offset + last) if causal else end
            parts.append(_attend(q_HTD[:, first:last], k_HSD[:, start:stop], v_HSD[:, start:stop], causal, scale))
            done = last
        if done < T:
            parts.append(q_HTD.new_zeros(q_HTD.shape[0], T - done, v_BSKD.shape[3]))
        rows.append(torch.cat(parts, 1).transpose(0, 1))
    return torch.stack(rows)


def _attend(q_HTD: Tensor, k_HSD: Tensor, v_HSD: Tensor, causal: bool, scale: float) -> Tensor:
    """Attention within one document; with fewer queries than keys, the queries are the document's last ones."""
    missing = k_HSD.shape[1] - q_HTD.shape[1]
    if causal and missing:  # the built-in causal mask is aligned to the first key, so give it the missing queries
        q_HTD = F.pad(q_HTD, (0, 0, missing, 0))
    out = F.scaled_dot_product_attention(q_HTD[None], k_HSD[None], v_HSD[None], is_causal=causal, scale=scale)[0]
    return out[:, missing:] if causal and missing else out


def attention(
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    cu_seqlens_BC: Tensor | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    q_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Attention output [B, T, H, D] in the dtype of q.

    scale: default D^-0.5. q_offset: row position of the first query, when the queries are a slice of the row
    (context parallelism); keys and values always cover the whole row.
    """
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else scale
    return attention_reference(q_BTHD, k_BSKD, v_BSKD, cu_seqlens_BC, causal=causal, scale=scale, q_offset=q_offset)
