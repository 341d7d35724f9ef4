"""Loss on held-out data, forward only: every source read once from its first token, in rows of validation.seq_len.

The rows are a function of the data alone, so with validation.steps = -1 every layout computes the same mean over valid
labels. Training's data position, random state and gradients are left alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from megastage.build import Model
from megastage.config.schema import Config
from megastage.data.batch import Batch, assemble
from megastage.data.index import DataIndex, build_index
from megastage.data.loader import Prefetcher
from megastage.data.order import Rows
from megastage.data.sources.base import IGNORED, SourceOptions, TokenSource
from megastage.parallel.context import ContextGroup
from megastage.parallel.data import DTYPES
from megastage.parallel.mesh import Mesh
from megastage.runtime import Runtime
from megastage.stages import Stage


class Validator:
    """The opened sources of [validation]. Building it is collective; ValueError for data that can't be used."""

    def __init__(
        self, cfg: Config, rt: Runtime, stages: tuple[Stage, ...], options: SourceOptions, vocab_size: int
    ) -> None:
        self.cfg, self.rt, self.vocab_size = cfg, rt, vocab_size
        self.names, index = _open(cfg, rt, stages, options, vocab_size)
        self.sources = index.stages[0].sources

    def due(self, step: int, stage: Stage) -> bool:
        """After every validation.freq updates, at the end of a stage and of the run."""
        return step % self.cfg.validation.freq == 0 or step in (stage.end_step, self.cfg.training.steps)

    @torch.no_grad()
    def run(self, model: Model, mesh: Mesh, context: ContextGroup) -> dict[str, Any]:
        """Loss (mean over valid labels), perplexity and number of labels, of all sources and of each. Collective."""
        began = time.perf_counter()
        table = self.cfg.validation
        ranks = mesh.layout.data_ranks(context.degree)
        rank = mesh.data_rank // context.degree
        sums = torch.zeros(len(self.sources), 2, dtype=torch.float64, device=self.rt.device)
        counts = mesh.tp_rank == 0 and mesh.pp_rank == mesh.layout.pp - 1
        for number, source in enumerate(self.sources):
            rows = table.local_batch_size * ranks
            total = -(-count_rows(source, table.seq_len, None if table.steps == -1 else table.steps * rows) // rows)
            batches = total if table.steps == -1 else min(table.steps, total)
            for batch in self._batches(number, batches, rank, ranks):
                local = context.shard(batch.to(self.rt.device))
                loss = self._forward(model, mesh, local)
                if counts:
                    sums[number, 0] += loss
                    sums[number, 1] += (local.labels_BT != IGNORED).sum()
        for module in model.part.modules():  # without a backward pass FSDP would keep the whole root gathered
            if isinstance(module, FSDPModule):
                module.reshard()
        dist.all_reduce(sums)
        each = sums.tolist()
        return {
            **_result(sum(loss for loss, _ in each), sum(valid for _, valid in each)),
            "sources": {name: _result(*pair) for name, pair in zip(self.names, each)},
            "seconds": time.perf_counter() - began,
        }

    def _batches(self, number: int, batches: int, rank: int, ranks: int) -> Iterator[Batch]:
        """This data rank's rows of each batch; rows beyond the last one are empty of labels."""
        table = self.cfg.validation
        rows, loader = table.local_batch_size, table.dataloader
        pin = loader.pin_memory or self.rt.device.type == "cuda"

        def make(at: int) -> Batch:
            first = (at % batches * ranks + rank) * rows
            batch = read_rows(
                self.sources[number], first, rows, table.seq_len,
                document_mask=self.cfg.training.document_mask, vocab_size=self.vocab_size,
            )  # fmt: skip
            return batch.pin_memory() if pin and torch.cuda.is_available() else batch

        depth = (loader.prefetch_factor or 2) * max(loader.num_workers, 1)
        prefetcher: Prefetcher[int, Batch] = Prefetcher(
            lambda at: at, make, workers=loader.num_workers, depth=min(depth, batches)
        )
        try:
            for _ in range(batches):
                yield prefetcher.next()[1]
        finally:
            prefetcher.close()

    def _forward(self, model: Model, mesh: Mesh, batch: Batch) -> Tensor:
        """The summed loss of the rows of `batch` (0 on pipeline parts without the head)."""
        pp, at = mesh.layout.pp, mesh.pp_rank
        if pp == 1:
            return model.part(batch.tokens_BT, batch.positions_BT, batch.cu_seqlens_BC, batch.labels_BT).double()
        group = mesh.group("pp")
        total = torch.zeros((), dtype=torch.float64, device=batch.tokens_BT.device)
        for micro in batch.split(self.cfg.parallelism.pipeline_parallel_microbatch_size):
            x = micro.tokens_BT
            if at > 0:
                shape = (x.shape[0], x.shape[1] // mesh.layout.tp, model.cfg.dim)
                x = torch.empty(shape, dtype=DTYPES[self.cfg.training.mixed_precision_param], device=x.device)
                dist.recv(x, group=group, group_src=at - 1)
            out = model.part(x, micro.positions_BT, micro.cu_seqlens_BC, micro.labels_BT)
            if at < pp - 1:
                dist.send(out.contiguous(), group=group, group_dst=at + 1)
            else:
                total += out
        return total


def count_rows(source: TokenSource, seq_len: int, wanted: int | None = None) -> int:
    """Rows that the source fills, the last one perhaps in part; its very last token is a label only.

    wanted: no more need be counted where that means tokenizing text.
    """
    return -(-(source.reach(None if wanted is None else wanted * seq_len + 1) - 1) // seq_len)


def read_rows(
    source: TokenSource, first: int, rows: int, seq_len: int, *, document_mask: bool, vocab_size: int | None
) -> Batch:
    """Rows first .. first+rows-1 of the source in reading order; rows past its end have no valid label."""
    n_tokens = source.reach((first + rows) * seq_len + 1)
    total = count_rows(source, seq_len, first + rows)
    numbers = np.arange(first, first + rows)
    starts, lengths, offsets = [], [], [0]
    for row in np.where(numbers < total, numbers, 0).tolist():
        start, stop = row * seq_len, min((row + 1) * seq_len, n_tokens - 1)
        bounds = np.array([start, stop])
        if source.kind == "documents":
            bounds = np.union1d(bounds, source.units_within(start, stop))
        starts.append(bounds[:-1])
        lengths.append(np.diff(bounds))
        offsets.append(offsets[-1] + len(bounds) - 1)
    pieces = Rows(np.array(offsets), np.concatenate(starts), np.concatenate(lengths))
    batch = assemble(
        [source], np.zeros(rows, np.int64), numbers, pieces,
        seq_len=seq_len, document_mask=document_mask, vocab_size=vocab_size,
    )  # fmt: skip
    batch.labels_BT[torch.from_numpy(numbers >= total)] = IGNORED
    return batch


def _open(
    cfg: Config, rt: Runtime, stages: tuple[Stage, ...], options: SourceOptions, vocab_size: int
) -> tuple[list[str], DataIndex]:
    table = cfg.validation
    kind = table.dataset_type or cfg.training.dataset_type
    named = kind == "huggingface" and not table.dataset_folders and table.dataset_path is None
    asked = replace(
        stages[0],
        index=0,
        name="validation",
        start_step=0,
        end_step=1,
        never_runs=False,
        dataset=table.dataset if named else None,
        dataset_path=table.dataset_path,
        dataset_type=kind,
        dataset_folders=table.dataset_folders,
        dataset_weights=(1.0,) * max(1, len(table.dataset_folders)),
        seq_len=1,  # rows are read in sequence, no sample order has to fit
        inherited=frozenset(),
        min_doc_len=0,
        long_doc_len=0,
        long_doc_share=None,
    )
    index = build_index(
        [asked], group=rt.control, options=options, vocab_size=vocab_size, node_leader=rt.local_rank == 0
    )
    return list(asked.sources), index


def _result(loss_sum: float, valid: float) -> dict[str, Any]:
    loss = loss_sum / valid if valid else None
    return {
        "loss": loss,
        "perplexity": None if loss is None else math.exp(min(loss, 700.0)),
        "valid_labels": int(valid),
    }


def line(step: int, steps: int, result: dict[str, Any]) -> str:
    """What a person sees of a validation."""

    def loss(of: dict[str, Any]) -> str:
        return "no valid labels" if of["loss"] is None else f"{of['loss']:.4f} (perplexity {of['perplexity']:.2f})"

    parts = [f"validation {step}/{steps}", f"loss {loss(result)}"]
    if len(result["sources"]) > 1:
        parts += [f"{name} {loss(of)}" for name, of in result["sources"].items()]
    return "  ".join([*parts, f"{result['valid_labels']:,} labels in {result['seconds']:.1f}s"])
