"""Device memory of each pipeline rank, from the configuration alone (pure Python).

Counted: FSDP shards of parameters, gradients and optimizer states; gathered parameters and their gradients; saved
activations with tiled attention and fused norm and SwiGLU (12h + 4h_kv + 6f + 4a bytes per token and layer in bf16,
Korthikanti et al. 2022 without the attention matrix), divided by tensor parallelism with sequence parallelism; the
micro-batches that the pipeline schedule holds; one layer's backward; the chunked loss. Not counted: the driver's and
NCCL's own memory (0.5 to 2 GiB), allocator fragmentation, data batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Protocol

from megastage.model.config import ModelConfig
from megastage.model.parameters import layer_shapes
from megastage.model.recompute_plan import recomputes

GIB = 1 << 30


class Degrees(Protocol):
    """Parallel degrees; `megastage.config.layout.Layout` is one."""

    @property
    def pp(self) -> int: ...
    @property
    def dp_shard(self) -> int: ...
    @property
    def cp(self) -> int: ...
    @property
    def tp(self) -> int: ...


@dataclass(frozen=True)
class Bytes:
    """Bytes per element. master: parameter shards as kept by the optimizer, and gradient shards; compute: gathered
    parameters and activations; reduce: gradients on their way; optimizer: all states of one parameter together."""

    master: int = 4
    compute: int = 2
    reduce: int = 4
    optimizer: int = 8


@dataclass(frozen=True)
class Breakdown:
    """Bytes on each device of one pipeline rank at the peak of a step."""

    parameters: int  # this rank's shards
    gradients: int  # shards
    optimizer: int  # shards
    gathered_parameters: int
    gathered_gradients: int
    activations: int  # saved for backward, all micro-batches in flight
    workspace: int  # one layer's backward (with its recomputation) or the loss, whichever is larger

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def saved_bytes(
    cfg: ModelConfig,
    tp: int = 1,
    cp: int = 1,
    *,
    recompute: tuple[str, str] = ("none", "2"),
    position: int = 0,
    compute: int = 2,
    keep_gathered: bool = False,
) -> int:
    """Bytes that one layer saves for backward, per token of this rank (one of its T / cp positions).

    recompute: mode and option of [activation_checkpoint]; position: the layer's place in its part. keep_gathered:
    whether tensor parallelism saves the gathered inputs of `attention` and `feed_forward`, rather than gathering them
    again in backward. Keys and values are saved for the whole row, hence times cp.
    """
    q_dim, kv_dim = cfg.n_heads * cfg.head_dim / tp, max(cfg.n_kv_heads / tp, 1) * cfg.head_dim
    ffn, share = cfg.ffn_dim / tp, cfg.dim / tp
    lse = 4 * cfg.n_heads / tp  # fp32, whatever the rest
    if not recomputes(position, *recompute):
        elements = 2 * share  # the two residual sums, inputs of the norms
        elements += 2 * (cfg.dim if keep_gathered else share)  # the normed inputs
        elements += 2 * q_dim + 2 * kv_dim * cp  # rotated q, k, v and the output
        elements += q_dim if cp > 1 else 0  # the output is joined from two slices, and both forms are saved
        elements += q_dim + kv_dim if cfg.qk_norm else 0
        elements += 3 * ffn  # gate, up, their product
        return round(compute * elements + lse)
    if recompute == ("selective", "op"):  # the input, attention, every second product: wq, wv, w1, w2
        scattered = 2 * share if tp > 1 else 0
        return round(compute * (share + 2 * q_dim + kv_dim + ffn + cfg.dim + scattered) + lse)
    return round(compute * share)


def in_flight(schedule: str, pp: int, rank: int, micro_batches: int, chunks: int = 1) -> float:
    """Micro-batches whose activations pipeline rank `rank` holds at its peak, in units of all its layers.

    schedule: the names of `torch.distributed.pipelining`; chunks: model parts per rank. Zero-bubble schedules count as
    their plain kin, except ZBVZeroBubble, which levels all ranks at `pp`. Raises ValueError for an unknown name.
    """
    if pp == 1:
        return 1.0
    name = schedule.lower()
    if name in ("gpipe", "loopedbfs"):
        return float(micro_batches)
    if name == "1f1b":
        return float(min(micro_batches, pp - rank))
    if name in ("interleaved1f1b", "interleavedzerobubble"):
        return min(micro_batches * chunks, 2 * (pp - 1 - rank) + (chunks - 1) * pp + 1) / chunks
    if name in ("zbvzerobubble", "dualpipev"):
        return float(min(micro_batches, pp))
    raise ValueError(
        f'parallelism.pipeline_parallel_schedule = "{schedule}": use GPipe, 1F1B, Interleaved1F1B, LoopedBFS, '
        "InterleavedZeroBubble, ZBVZeroBubble or DualPipeV"
    )


def split_layers(n_layers: int, pp: int) -> list[range]:
    """Contiguous layers of each pipeline rank, the first ranks taking one more where they do not divide."""
    size, more = divmod(n_layers, pp)
    starts = [i * size + min(i, more) for i in range(pp + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def estimate(
    cfg: ModelConfig,
    layout: Degrees,
    *,
    seq_len: int,
    rows: int,
    micro_batches: int = 1,
    schedule: str = "1F1B",
    chunks: int = 1,
    layers: Sequence[Sequence[int]] | None = None,
    recompute: tuple[str, str] = ("none", "2"),
    reshard: bool | None = None,
    loss_chunk_tokens: int = 1024,
    keep_gathered: bool = False,
    sizes: Bytes = Bytes(),
) -> tuple[Breakdown, ...]:
    """Peak memory of every pipeline rank.

    rows: sequences per micro-batch (without a pipeline: per accumulation step) of one data rank. micro_batches: per
    optimizer step. layers: layer indices of each rank, default `split_layers`. recompute, keep_gathered: see
    `saved_bytes`. reshard: free gathered layers after forward; None: only without a pipeline. With a pipeline,
    gradients are accumulated unsharded until the last micro-batch.
    """
    tokens = rows * seq_len // layout.cp
    reshard = layout.pp == 1 if reshard is None else reshard
    out = []
    for rank, held in enumerate(split_layers(cfg.n_layers, layout.pp) if layers is None else layers):
        first, last = rank == 0, rank == layout.pp - 1
        groups = _group_elements(cfg, layout.tp, len(held), first, last)
        elements = sum(groups)
        shard = -(-elements // (layout.dp_shard * layout.cp))
        live = in_flight(schedule, layout.pp, rank, micro_batches, chunks)
        saved = [
            saved_bytes(
                cfg, layout.tp, layout.cp, recompute=recompute, position=i, compute=sizes.compute,
                keep_gathered=keep_gathered,
            )
            for i in range(len(held))
        ]  # fmt: skip
        whole = saved_bytes(cfg, layout.tp, layout.cp, compute=sizes.compute, keep_gathered=keep_gathered)
        head = 2 * cfg.dim // layout.tp * sizes.compute if last else 0  # the final norm's input and output
        out.append(
            Breakdown(
                parameters=shard * sizes.master,
                gradients=shard * sizes.master,
                optimizer=shard * sizes.optimizer,
                gathered_parameters=sizes.compute * (groups[0] + sum(groups[1:3]) if reshard else elements),
                gathered_gradients=max(groups) * (sizes.compute + (sizes.reduce if layout.pp == 1 else 0))
                + (elements * sizes.reduce if layout.pp > 1 else 0),
                activations=round(live * tokens * sum(saved)) + tokens * head,
                workspace=max(
                    tokens
                    * (_layer_gradients(cfg, layout.tp, sizes) + max((whole - kept for kept in saved), default=0)),
                    _loss_workspace(cfg, layout.tp, tokens, loss_chunk_tokens, sizes) if last else 0,
                ),
            )
        )
    return tuple(out)


def _group_elements(cfg: ModelConfig, tp: int, n_layers: int, first: bool, last: bool) -> list[int]:
    """Elements per tensor-parallel rank of each FSDP group: the root (embedding, final norm, head), then the layers."""
    table = -(-cfg.vocab_size // tp) * cfg.dim
    tables = first + last - (first and last and cfg.tied_embeddings)
    whole = ("wk", "wv") if tp > cfg.n_kv_heads else ()  # then every rank holds all of them, as it does the norms
    layer = sum(
        math.prod(shape) // (1 if len(shape) == 1 or name.split(".")[-2] in whole else tp)
        for name, shape in layer_shapes(cfg).items()
    )
    return [tables * table + (cfg.dim if last else 0)] + [layer] * n_layers


def _layer_gradients(cfg: ModelConfig, tp: int, sizes: Bytes) -> int:
    """Bytes per token of activation gradients in the backward of one feed-forward."""
    return sizes.compute * (3 * cfg.ffn_dim // tp + 2 * cfg.dim)


def _loss_workspace(cfg: ModelConfig, tp: int, tokens: int, chunk_tokens: int, sizes: Bytes) -> int:
    """A chunk's logits and exponentials in fp32 and their gradient, the head's gradient as summed (fp32) and as kept,
    the gathered hidden states with their gradient."""
    vocab = -(-cfg.vocab_size // tp)
    chunk = min(chunk_tokens, tokens) * vocab * (4 + 4 + sizes.compute)
    return chunk + vocab * cfg.dim * (4 + sizes.compute) + 2 * tokens * cfg.dim * sizes.compute


def report(breakdowns: Sequence[Breakdown]) -> list[str]:
    """One line per pipeline rank, in GiB."""
    lines = []
    for rank, parts in enumerate(breakdowns):
        shown = ", ".join(
            f"{field.name.replace('_', ' ')} {getattr(parts, field.name) / GIB:.2f}" for field in fields(parts)
        )
        lines.append(f"pipeline rank {rank}: {parts.total / GIB:.2f} GiB ({shown})")
    return lines
