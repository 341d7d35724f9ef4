"""The head of the last pipeline part: final hidden states to the summed loss, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor, nn

from megastage.kernels.linear_cross_entropy import linear_cross_entropy_by_token
from megastage.model.decoder import Decoder
from megastage.parallel.collectives import gather_sequence, sum_over


class ModelPart(nn.Module):
    """A decoder part as training runs it: hidden states between parts, the summed loss after the last one.

    forward(x, positions_BT, cu_seqlens_BC, labels_BT) returns hidden [B, T/tp, D], or on the last part the sum of the
    losses of all valid labels (fp32 scalar, equal on every rank of the tensor-parallel group).

    row_losses: None, or a list that receives each forward pass's sums by row, fp32 [B], in the order of the calls;
    with `split_positions` a tensor-parallel rank's are of its own positions.
    """

    __call__: Callable[..., Tensor]

    def __init__(
        self, decoder: Decoder, tp_group: dist.ProcessGroup | None, backend: str = "auto", loss_parallel: bool = True
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.tp_group = tp_group
        self.backend = backend
        self.split_vocabulary = loss_parallel and tp_group is not None and tp_group.size() > 1
        self.split_positions = not loss_parallel and tp_group is not None and tp_group.size() > 1
        self.compiled_head: Callable[..., tuple[Tensor, Tensor]] | None = None
        self.row_losses: list[Tensor] | None = None

    def forward(self, x: Tensor, positions_BT: Tensor, cu_seqlens_BC: Tensor, labels_BT: Tensor) -> Tensor:
        hidden_BTD = self.decoder(x, positions_BT, cu_seqlens_BC)
        if not self.decoder.has_head:
            return hidden_BTD
        head = self.head if self.compiled_head is None else self.compiled_head
        loss, losses_B = head(hidden_BTD, labels_BT)
        if self.row_losses is not None:  # beside the result: a pipeline passes on one tensor of a known shape
            self.row_losses.append(losses_B)
        return loss

    def head(self, hidden_BTD: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The summed loss of final hidden states [B, T/tp, D], and the sums of the rows, fp32 [B], without a gradient.

        Tensor-parallel ranks share the work by vocabulary: all positions, a slice of the head each; or, without loss
        parallelism, by positions: their own, with the whole head gathered.
        """
        head = self.decoder.output if self.decoder.output is not None else self.decoder.tok_embeddings
        weight_VD, group = self.decoder.head_weight(), self.tp_group
        if self.split_positions:
            assert group is not None
            weight_VD = gather_sequence(weight_VD[None], group)[0]
            labels_BT = labels_BT.chunk(group.size(), dim=1)[group.rank()]
        elif self.split_vocabulary:
            assert group is not None
            hidden_BTD = gather_sequence(hidden_BTD, group)
        loss, losses_N = linear_cross_entropy_by_token(
            hidden_BTD.flatten(0, 1),
            weight_VD,
            labels_BT.flatten(),
            vocab_start=getattr(head, "vocab_start", 0) if self.split_vocabulary else 0,
            group=group if self.split_vocabulary else None,
            backend=self.backend,
        )
        losses_B = losses_N.view(labels_BT.shape).sum(1)
        return sum_over(loss, group) if self.split_positions and group is not None else loss, losses_B
