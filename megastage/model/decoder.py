"""Decoder-only transformer (Llama 3, Qwen3) in plain PyTorch; it knows nothing of parallelism.

Shapes: B rows, T positions, D model width, H query heads, K key/value heads, E head dimension, V vocabulary, C columns
of cu_seqlens. Under sequence parallelism `x_BTD` between the sub-layers holds this rank's share of T: norms and
residuals work on the share, `attention` and `feed_forward` see all of T (parallel code gathers it in `project` and
scatters their result), and head counts follow from the local weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from megastage.model.config import ModelConfig, RopeSpec
from megastage.model.layers import Embedding, Linear, RMSNorm
from megastage.model.ops import Ops
from megastage.model.rope import rope_table


class _Projecting(nn.Module):
    """A sub-layer that begins with several linear maps of its input; tensor parallelism replaces `project`."""

    def __init__(self) -> None:
        super().__init__()
        self.project: Callable[..., Sequence[Tensor]] = project


def project(x: Tensor, *linears: Linear) -> Sequence[Tensor]:
    """The outputs of all `linears` for the same input."""
    return [linear(x) for linear in linears]


class Attention(_Projecting):
    """Causal self-attention within documents, with grouped key/value heads and optional QK-norm."""

    rope_cos: Tensor | None
    rope_sin: Tensor | None

    def __init__(self, cfg: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.head_dim = cfg.head_dim
        self.ops = ops
        self.wq = Linear(cfg.dim, cfg.n_heads * cfg.head_dim)
        self.wk = Linear(cfg.dim, cfg.n_kv_heads * cfg.head_dim)
        self.wv = Linear(cfg.dim, cfg.n_kv_heads * cfg.head_dim)
        self.wo = Linear(cfg.n_heads * cfg.head_dim, cfg.dim)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps, ops) if cfg.qk_norm else None
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps, ops) if cfg.qk_norm else None
        self.register_buffer("rope_cos", None, persistent=False)
        self.register_buffer("rope_sin", None, persistent=False)

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, cu_seqlens_BC: Tensor | None) -> Tensor:
        q_BTHE, k_BTKE, v_BTKE = (
            projected.unflatten(-1, (-1, self.head_dim)) for projected in self.project(x_BTD, self.wq, self.wk, self.wv)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHE, k_BTKE = self.q_norm(q_BTHE), self.k_norm(k_BTKE)
        assert self.rope_cos is not None, "call set_rope before the first forward"
        assert self.rope_sin is not None
        q_BTHE, k_BTKE = self.ops.rope_qk(q_BTHE, k_BTKE, self.rope_cos, self.rope_sin, positions_BT)
        out_BTHE = self.ops.attention(q_BTHE, k_BTKE, v_BTKE, cu_seqlens_BC)
        return self.wo(out_BTHE.flatten(-2))


class FeedForward(_Projecting):
    """SwiGLU feed-forward: w2(silu(w1 x) * w3 x)."""

    def __init__(self, cfg: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.w1 = Linear(cfg.dim, cfg.ffn_dim)
        self.w3 = Linear(cfg.dim, cfg.ffn_dim)
        self.w2 = Linear(cfg.ffn_dim, cfg.dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate, up = self.project(x_BTD, self.w1, self.w3)
        return self.w2(self.ops.swiglu(gate, up))


class DecoderLayer(nn.Module):
    """Pre-norm transformer layer.

    `recompute`, when set, runs the body in place of a plain call: `recompute(body, x, positions, cu_seqlens)`, for
    example `functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)`. It sits inside the layer, so
    that no parameter changes its name and hooks on the layer stay outside of the recomputed part. `body` is what is
    run or recomputed: `plain_body`, or a compiled form of it.
    """

    __call__: Callable[..., Tensor]

    def __init__(self, cfg: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(cfg.dim, cfg.norm_eps, ops)
        self.attention = Attention(cfg, ops)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps, ops)
        self.feed_forward = FeedForward(cfg, ops)
        self.recompute: Callable[..., Tensor] | None = None
        self.body: Callable[..., Tensor] | None = None

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, cu_seqlens_BC: Tensor | None) -> Tensor:
        body = self.plain_body if self.body is None else self.body
        if self.recompute is not None and torch.is_grad_enabled():
            return self.recompute(body, x_BTD, positions_BT, cu_seqlens_BC)
        return body(x_BTD, positions_BT, cu_seqlens_BC)

    def plain_body(self, x_BTD: Tensor, positions_BT: Tensor, cu_seqlens_BC: Tensor | None) -> Tensor:
        """The layer's computation, run as it stands."""
        attended_BTD = self.attention(self.attention_norm(x_BTD), positions_BT, cu_seqlens_BC)
        normed_BTD, x_BTD = self.ffn_norm.add(attended_BTD, x_BTD)
        return x_BTD + self.feed_forward(normed_BTD)


class Decoder(nn.Module):
    """A whole model, or a pipeline part of one: some layers, with or without the embedding and the head.

    Parameter names are those of the whole model: layers are keyed by their global index, and the head of a model with
    tied embeddings is `tok_embeddings.weight` wherever it stands (a last part holds its own copy under that name, which
    the caller keeps equal to the first part's). Build under `torch.device("meta")`, then `to_empty`, then `set_rope`.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        ops: Ops | None = None,
        layers: Iterable[int] | None = None,
        has_embedding: bool = True,
        has_head: bool = True,
    ) -> None:
        super().__init__()
        ops = Ops() if ops is None else ops
        self.cfg = cfg
        self.has_embedding = has_embedding
        self.has_head = has_head
        owns_table = has_embedding or (has_head and cfg.tied_embeddings)
        self.tok_embeddings = Embedding(cfg.vocab_size, cfg.dim) if owns_table else None
        indices = range(cfg.n_layers) if layers is None else layers
        self.layers = nn.ModuleDict({str(i): DecoderLayer(cfg, ops) for i in indices})
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps, ops) if has_head else None
        self.output = Linear(cfg.dim, cfg.vocab_size) if has_head and not cfg.tied_embeddings else None

    def set_rope(self, spec: RopeSpec, max_positions: int, device: torch.device | str | None = None) -> None:
        """Give every layer the table of `spec` for positions below `max_positions` (one table, shared by all layers).

        Call after `to_empty`, and again at a stage that changes the sequence length or RoPE. device: default that of
        the parameters.
        """
        device = next(self.parameters()).device if device is None else device
        cos_PF, sin_PF = rope_table(self.cfg.head_dim, spec, max_positions, device)
        for module in self.modules():
            if isinstance(module, Attention):
                module.rope_cos, module.rope_sin = cos_PF, sin_PF

    def set_ops(self, ops: Ops) -> None:
        """Replace the operations of every module, for example attention when the context-parallel degree changes."""
        for module in self.modules():
            if isinstance(module, Attention | FeedForward | RMSNorm):
                module.ops = ops

    def forward(self, x: Tensor, positions_BT: Tensor, cu_seqlens_BC: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D]; after the final norm when this part has the head.

        x: int64 token ids [B, T] when this part has the embedding, else hidden states [B, T, D].
        positions_BT: int64, restarting with every document. cu_seqlens_BC: see `megastage.kernels.flash_attention`;
        None means that every row is one document.
        """
        if self.has_embedding:
            assert self.tok_embeddings is not None
            x = self.tok_embeddings(x)
        for layer in self.layers.values():
            x = layer(x, positions_BT, cu_seqlens_BC)
        return x if self.norm is None else self.norm(x)

    def head_weight(self) -> Tensor:
        """The output projection [V, D]: `output.weight`, or the embedding's when tied."""
        head = self.tok_embeddings if self.output is None else self.output
        assert self.has_head, "this part has no head"
        assert head is not None
        return head.local_weight()

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] of final hidden states. Training uses the fused loss instead, which never holds them all."""
        return hidden_BTD @ self.head_weight().mT
