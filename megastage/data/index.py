"""The data index of a run: rank 0 opens, checks and describes every source of every stage; all others prove theirs.

What is broadcast is small whatever the data: fingerprints, counts, integer weights, table checksums, order settings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from megastage.data.blend import BlendTable, integer_weights
from megastage.data.blend_tables import broadcast_tables, long_tables, tables_made
from megastage.data.collective import Group, broadcast_bytes, gather_bytes, rank_of
from megastage.data.data_stage import DataStage
from megastage.data.doc_rule import DocRule, rule_of
from megastage.data.lanes import LaneOrder
from megastage.data.live_streams import LiveOrder
from megastage.data.order import Order, make_order
from megastage.data.packing import check_rule
from megastage.data.sources.base import (
    SourceError,
    SourceOptions,
    TokenSource,
    is_cached,
    open_source,
    without_building,
)
from megastage.data.sources.live import LiveText, shared

Spec = tuple[str, str]  # (dataset_type, path)
Settings = Mapping[str, Mapping[str, Any]]  # by order key


@dataclass(frozen=True)
class StageIndex:
    """The sources of one stage, in the config's order, and which is drawn when."""

    specs: tuple[Spec, ...]
    sources: tuple[TokenSource, ...]
    weights: np.ndarray
    table: BlendTable
    seed: int

    def order_key(self, number: int) -> str:
        """Names the history of source `number` under this stage's seed."""
        return order_key(self.sources[number], self.seed)


@dataclass(frozen=True)
class DataIndex:
    """All stages' indexes by stage number (stages that never run have none), and the sample orders by key."""

    stages: Mapping[int, StageIndex]
    orders: Mapping[str, Order]
    sources: Mapping[str, TokenSource]  # by fingerprint, in hex

    def tables(self) -> list[BlendTable]:
        """Every stage's table, in the order of the stages."""
        return [stage.table for stage in self.stages.values()]


class DataError(SourceError):
    """Everything that is wrong with the data of all stages; `problems` holds one message each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__(self.problems[0] if len(problems) == 1 else "\n  - ".join(["data:", *problems]))


def order_key(source: TokenSource, seed: int) -> str:
    """`FINGERPRINT:SEED`: one history of reading a content."""
    return f"{source.fingerprint.hex()}:{seed}"


def specs_of(stage: DataStage) -> tuple[Spec, ...]:
    """The sources of a stage: its folders, else its path, else (text only) its dataset name. Raises ValueError."""
    if stage.dataset_folders:
        return tuple((stage.dataset_type, str(folder)) for folder in stage.dataset_folders)
    if stage.dataset_path:
        return ((stage.dataset_type, str(stage.dataset_path)),)
    if stage.dataset_type == "huggingface" and stage.dataset:
        return ((stage.dataset_type, stage.dataset),)
    raise SourceError(f"dataset_type {stage.dataset_type!r} needs dataset_path or dataset_folders")


def build_index(
    stages: Sequence[DataStage],
    *,
    group: Group,
    options: SourceOptions,
    vocab_size: int | None = None,
    settings: Settings | None = None,
    node_leader: bool | None = None,
    superblock_tokens: int | None = None,
) -> DataIndex:
    """Open and prove every source on every rank of the CPU `group`. A collective call.

    options: for the readers; settings: order settings of a checkpoint, by key; node_leader: whether this process writes
    its node's cache of tokenized text (default: LOCAL_RANK is 0 or unset); superblock_tokens: of token streams.
    Raises DataError with the same text on every rank: first all that rank 0 finds, then what differs elsewhere.
    """
    leader = os.environ.get("LOCAL_RANK", "0") == "0" if node_leader is None else node_leader
    opened: dict[Spec, TokenSource] = {}
    built: DataIndex | None = None
    report: dict[str, Any] = {}
    if rank_of(group) == 0:
        problems: list[str] = []
        try:
            with tables_made(stage.dataset_weights for stage in _running(stages)) as ahead:
                opened = _open_all(stages, options, problems)
            problems.extend(_tokenizer_problems(opened.values(), options))
            built = _index(stages, opened, vocab_size, settings or {}, problems, superblock_tokens, ahead)
            report = {"problems": problems} if problems else _describe(built)
        except Exception as error:  # whatever it is, the others must not wait for it
            report = {"problems": [*problems, f"{type(error).__name__}: {error}"]}
    elif group is not None:
        opened = _open_ahead(stages, options)
    report = json.loads(broadcast_bytes(json.dumps(report).encode(), group))
    if "problems" in report:
        raise DataError(report["problems"])
    if group is None:
        assert built is not None
        return built
    tables = broadcast_tables(None if built is None else built.tables(), report["blends"], group)
    cached = any(is_cached(kind, path) for kind, path in report["sources"])
    for turn in (True, False) if cached else (None,):  # leaders write the cache of their node, then the rest read it
        message = ""
        if built is None and turn in (leader, None):
            try:
                mine = options if leader else without_building(options)
                built = _prove(stages, mine, vocab_size, report, opened, tables)
            except Exception as error:
                message = f"rank {rank_of(group)}: {error}"
        found = [content.decode() for content in gather_bytes(message.encode(), group) if content]
        if found:
            raise DataError(found)
    assert built is not None
    return built


def _open_all(stages: Sequence[DataStage], options: SourceOptions, problems: list[str]) -> dict[Spec, TokenSource]:
    """Every source of every stage that runs, each opened once."""
    opened: dict[Spec, TokenSource] = {}
    failed: set[Spec] = set()
    for stage in _running(stages):
        try:
            specs = specs_of(stage)
        except SourceError as error:
            problems.append(f"{_title(stage)}: {error}")
            continue
        for number, spec in enumerate(specs):
            if spec in opened or spec in failed:
                continue
            try:
                opened[spec] = open_source(*spec, options)
            except ValueError as error:
                failed.add(spec)
                one = "dataset_path" if stage.dataset_path else "dataset"
                where = f"dataset_folders[{number}]" if stage.dataset_folders else one
                problems.append(f"{_title(stage)}, {where}: {error}")
    return opened


def _open_ahead(stages: Sequence[DataStage], options: SourceOptions) -> dict[Spec, TokenSource]:
    """What can be opened while rank 0 does the same; what cannot is left to be reported after its report."""
    opened: dict[Spec, TokenSource] = {}
    for stage in _running(stages):
        with suppress(SourceError):
            for kind, path in specs_of(stage):
                if not is_cached(kind, path) and (kind, path) not in opened:
                    with suppress(Exception):  # it comes again when the source is proven
                        source = open_source(kind, path, options)
                        assert source.fingerprint
                        opened[kind, path] = source
    return opened


def _index(
    stages: Sequence[DataStage],
    opened: Mapping[Spec, TokenSource],
    vocab_size: int | None,
    settings: Settings,
    problems: list[str],
    superblock: int | None = None,
    tables: Mapping[bytes, BlendTable] | None = None,
) -> DataIndex:
    indexes: dict[int, StageIndex] = {}
    opened = shared(opened)
    tables = dict(tables or {})
    for stage in _running(stages):
        try:
            sources = [opened[spec] for spec in specs_of(stage)]
        except (KeyError, SourceError):
            continue  # reported when it was opened
        problems.extend(f"{_title(stage)}: {problem}" for problem in _stage_problems(stage, sources, vocab_size))
        try:
            weights = _weights(stage, sources)
        except ValueError as error:
            problems.append(f"{_title(stage)}: {error}")
            continue
        if weights.tobytes() not in tables:
            tables[weights.tobytes()] = BlendTable.build(weights)
        table = tables[weights.tobytes()]
        indexes[stage.index] = StageIndex(specs_of(stage), tuple(sources), weights, table, stage.dataset_random_seed)
    orders = _make_orders(stages, indexes, settings, problems, superblock)
    by_hash = {source.fingerprint.hex(): source for index in indexes.values() for source in index.sources}
    return DataIndex(indexes, orders, by_hash)


def _stage_problems(stage: DataStage, sources: Sequence[TokenSource], vocab_size: int | None) -> list[str]:
    problems: list[str] = []
    seen: dict[bytes, str] = {}
    for source in sources:
        if source.fingerprint in seen:
            problems.append(
                f"{source.path} and {seen[source.fingerprint]} hold the same content; "
                "name it once and give it the sum of their weights"
            )
        seen[source.fingerprint] = source.path
        if vocab_size is not None and source.vocab_size is not None and source.vocab_size > vocab_size:
            problems.append(
                f"{source.path}: made with a tokenizer of {source.vocab_size} ids, but the model's vocabulary has "
                f"{vocab_size}; choose a larger model vocabulary or tokenize again"
            )
    return problems


def _tokenizer_problems(sources: Iterable[TokenSource], options: SourceOptions) -> list[str]:
    """All sources that record their tokenizer must agree, with the model's too where it is known."""
    known = None if options.tokenizer is None else ("the model's tokenizer", options.tokenizer.sha256)
    problems = []
    for source in sources:
        if source.tokenizer_hash is None:
            continue
        known = known or (source.path, source.tokenizer_hash)
        if source.tokenizer_hash != known[1]:
            problems.append(
                f"{source.path}: made with another tokenizer (sha256 {source.tokenizer_hash[:16]}...) than "
                f"{known[0]} ({known[1][:16]}...); tokenize again with one tokenizer"
            )
    return problems


def _weights(stage: DataStage, sources: Sequence[TokenSource]) -> np.ndarray:
    """Integer weights; without any in the config equal ones."""
    if len(stage.dataset_weights) not in (0, len(sources)):
        raise SourceError(f"dataset_weights has {len(stage.dataset_weights)} values for {len(sources)} sources")
    return integer_weights(stage.dataset_weights or [1] * len(sources))


def _make_orders(
    stages: Sequence[DataStage],
    indexes: Mapping[int, StageIndex],
    settings: Settings,
    problems: list[str],
    superblock: int | None,
) -> dict[str, Order]:
    """One order per (content, seed), sized for all lengths at which the plan reads it."""
    lengths: dict[str, list[int]] = {}
    rules: dict[str, list[DocRule]] = {}
    for stage in stages:
        rule = rule_of(stage)
        for key, _, length in _uses(stage, indexes):
            lengths.setdefault(key, []).append(length)
            rules.setdefault(key, []).extend([] if rule is None else [rule])
    orders: dict[str, Order] = {}
    longest: dict[str, int] = {}
    for stage in _running(stages):
        for key, _, length in _uses(stage, indexes):
            longest[key] = max(length, longest.get(key, 0))
    for stage in _running(stages):
        rule = rule_of(stage)
        for key, source, length in _uses(stage, indexes):
            try:
                if key not in orders:
                    seed = int(key.partition(":")[2])
                    orders[key] = order_of(source, seed, lengths[key], settings.get(key), superblock, rules[key])
                orders[key].enter([], length)  # a length that cannot be read is found now, not at the boundary
                if rule is not None:
                    check_rule(rule, orders[key], length, source.n_documents)
            except ValueError as error:
                if (
                    key in orders or length == longest[key]
                ):  # a source too small for all lengths is the longest's matter
                    problems.append(f"{_title(stage)}: {error}")
    if superblock is not None and orders and not any(isinstance(order, LaneOrder) for order in orders.values()):
        problems.append(f"training.superblock_tokens = {superblock}: no source is a token stream; leave it out")
    return orders


def _uses(stage: DataStage, indexes: Mapping[int, StageIndex]) -> list[tuple[str, TokenSource, int]]:
    """(order key, source, seq_len) of a stage's sources that are drawn.

    A stage that never runs counts with sources that others opened: the run may be extended to it later.
    """
    if stage.index in indexes:
        index = indexes[stage.index]
        drawn = [number for number in range(len(index.sources)) if index.weights[number] > 0]
        return [(index.order_key(number), index.sources[number], stage.seq_len) for number in drawn]
    try:
        wanted = set(specs_of(stage))
    except SourceError:
        return []
    known = {spec: source for index in indexes.values() for spec, source in zip(index.specs, index.sources)}
    seed = stage.dataset_random_seed
    return [
        (order_key(source, seed), source, stage.seq_len)
        for spec, source in known.items()
        if spec in wanted and source.n_tokens > stage.seq_len
    ]


def order_of(
    source: TokenSource,
    seed: int,
    lengths: Sequence[int],
    settings: Mapping[str, Any] | None,
    superblock: int | None = None,
    rules: Sequence[DocRule] = (),
) -> Order:
    """The sample order that fits a source: text by virtual streams, documents packed, token streams in lanes."""
    if isinstance(source, LiveText):
        return LiveOrder.make(source, settings)
    kind = "streams" if source.dataset_type == "huggingface" else "packed" if source.kind == "documents" else "lanes"
    return make_order(
        kind,
        seed=seed,
        fingerprint=source.fingerprint,
        lengths=lengths,
        n_tokens=source.n_tokens,
        doc_ends=None if kind == "lanes" else source.doc_ends,
        settings=settings,
        superblock=superblock,
        rules=rules,
        name=source.path,
    )


def _describe(index: DataIndex) -> dict[str, Any]:
    """JSON that another rank needs to make the same index from its own copies."""
    sources = {
        spec: source.fingerprint.hex()
        for stage in index.stages.values()
        for spec, source in zip(stage.specs, stage.sources)
    }
    return {
        "sources": [list(spec) for spec in sources],
        "fingerprints": list(sources.values()),
        "tables": {str(number): stage.table.crc32 for number, stage in index.stages.items()},
        "blends": [table.weights.tolist() for table in long_tables(index.tables())],
        "orders": {key: order.settings() for key, order in index.orders.items()},
    }


def _prove(
    stages: Sequence[DataStage],
    options: SourceOptions,
    vocab_size: int | None,
    report: Mapping[str, Any],
    ahead: Mapping[Spec, TokenSource],
    tables: Mapping[bytes, BlendTable],
) -> DataIndex:
    """This rank's own index; raises SourceError where it is not that of rank 0. ahead: sources opened before."""
    opened: dict[Spec, TokenSource] = {}
    problems: list[str] = []
    for (kind, path), expected in zip(report["sources"], report["fingerprints"]):
        try:
            source = opened[kind, path] = ahead.get((kind, path)) or open_source(kind, path, options)
        except ValueError as error:
            problems.append(str(error))
            continue
        if source.fingerprint.hex() != expected:
            problems.append(
                f"{path}: its content differs from rank 0's (digest here {source.fingerprint.hex()}, "
                f"there {expected}); copy the data to this node again"
            )
    if problems:
        raise SourceError("; ".join(problems))
    index = _index(stages, opened, vocab_size, report["orders"], problems, tables=tables)
    if not problems and json.loads(json.dumps(_describe(index))) != report:
        problems.append("its blend tables or sample orders differ from rank 0's; run the same version on all nodes")
    if problems:
        raise SourceError("; ".join(problems))
    return index


def _running(stages: Sequence[DataStage]) -> list[DataStage]:
    return [stage for stage in stages if not stage.never_runs]


def _title(stage: DataStage) -> str:
    return f"stage {stage.index + 1} {stage.name!r}"
