"""The head of the last pipeline part: final hidden states to the summed loss, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor, nn

from megastage.kernels.linear_cross_entropy import linear_cross_entropy
from megastage.model.decoder import Decoder
from megastage.parallel.collectives import gather_sequence


class ModelPart(nn.Module):
    """A decoder part as training runs it: hidden states between parts, the summed loss after the last one.

    forward(x, positions_BT, cu_seqlens_BC, labels_BT) returns hidden [B, T/tp, D], or on the last part the sum of the
    losses of all valid labels (fp32 scalar, equal on every rank of the tensor-parallel group).
    """

    __call__: Callable[..., Tensor]

    def __init__(self, decoder: Decoder, tp_group: dist.ProcessGroup | None, backend: str = "auto") -> None:
        super().__init__()
        self.decoder = decoder
        self.tp_group = tp_group
        self.backend = backend
        self.compiled_head: Callable[..., Tensor] | None = None

    def forward(self, x: Tensor, positions_BT: Tensor, cu_seqlens_BC: Tensor, labels_BT: Tensor) -> Tensor:
        hidden_BTD = self.decoder(x, positions_BT, cu_seqlens_BC)
        if not self.decoder.has_head:
            return hidden_BTD
        head = self.head if self.compiled_head is None else self.compiled_head
        return head(hidden_BTD, labels_BT)

    def head(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """The summed loss of final hidden states [B, T/tp, D]."""
        head = self.decoder.output if self.decoder.output is not None else self.decoder.tok_embeddings
        if self.tp_group is not None:
            hidden_BTD = gather_sequence(hidden_BTD, self.tp_group)
        return linear_cross_entropy(
            hidden_BTD.flatten(0, 1),
            self.decoder.head_weight(),
            labels_BT.flatten(),
            vocab_start=getattr(head, "vocab_start", 0),
            group=self.tp_group,
            backend=self.backend,
        )
