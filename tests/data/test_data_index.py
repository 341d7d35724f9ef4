"""Index over real gloo ranks: each has a private working directory with its own copy of the data."""

import json
import multiprocessing
import os
import shutil

import numpy as np
import pytest
import torch.distributed as dist
from source_files import FakeStage, documents, write_megatron, write_nanoset

from megastage.data.collective import broadcast_bytes, gather_bytes
from megastage.data.engine import DataEngine
from megastage.data.sources.base import SourceOptions

RANKS = 4


def _rank(work, rank, folder, queue):
    try:
        os.chdir(folder / f"rank{rank}")
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
        queue.put((rank, work(rank)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException as error:
        queue.put((rank, error))
        raise


def on_ranks(folder, work):
    """Results of `work(rank)` by rank, in forked processes with their own folders."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    (folder / "store").unlink(missing_ok=True)
    for rank in range(RANKS):
        (folder / f"rank{rank}").mkdir(exist_ok=True)
    processes = [context.Process(target=_rank, args=(work, rank, folder, queue)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    try:
        results = dict(queue.get(timeout=60) for _ in processes)
    finally:
        for process in processes:
            process.join(20)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(RANKS)]


@pytest.fixture
def copies(tmp_path):
    """Relative folders a, b, m in each rank's own working directory, with the same content."""
    for rank in range(RANKS):
        folder = tmp_path / f"rank{rank}"
        write_nanoset(folder / "a", "x", documents(1, 120))
        write_nanoset(folder / "b", "x", documents(2, 90))
        (folder / "m").mkdir()
        write_megatron(folder / "m" / "d", documents(3, 80))
    return tmp_path


def plan():
    one = FakeStage(0, "one", 0, 4, dataset_folders=("a", "b"), dataset_weights=(0.75, 0.25))
    two = FakeStage(1, "two", 4, 8, dataset_type="megatron", dataset_path="m", seq_len=32)
    return [one, two]


def attempt(stages, rank, *, options=None, leader=None):
    """A few batches' ids and digests of this rank, or the message of what went wrong."""
    try:
        engine = DataEngine.build(stages, group=dist.group.WORLD, options=options, node_leader=leader)
    except ValueError as error:
        return str(error)
    out = []
    for stage in stages:
        engine.enter(stage.index, data_rank=rank, data_ranks=RANKS)
        for _ in range(2):
            batch = engine.next()
            out.append((batch.ids_B.tolist(), engine.sample_digest(), batch.tokens_BT.tolist()))
    return out, json.dumps(engine.state())


@pytest.mark.dist
def test_every_rank_reads_its_slice_of_one_order(copies, monkeypatch):
    results = on_ranks(copies, lambda rank: attempt(plan(), rank))
    assert not any(isinstance(result, BaseException | str) for result in results), results
    monkeypatch.chdir(copies / "rank0")
    engine = DataEngine.build(plan())
    step = 0
    for stage in plan():
        engine.enter(stage.index, data_rank=0, data_ranks=1)
        for _ in range(2):
            batch = engine.next()
            steps = [result[0][step] for result in results]
            assert [i for ids, _, _ in steps for i in ids] == batch.ids_B.tolist()
            assert [row for _, _, tokens in steps for row in tokens] == batch.tokens_BT.tolist()
            assert {digest for _, digest, _ in steps} == {engine.sample_digest()}
            step += 1
    assert {state for _, state in results} == {json.dumps(engine.state())}


def _damage(folder, what):
    if what == "token":
        tokens = np.fromfile(folder / "rank2" / "b" / "x.ds", "<u2")
        tokens[5] += 1
        tokens.tofile(folder / "rank2" / "b" / "x.ds")
    elif what == "truncated":
        file = folder / "rank2" / "b" / "x.ds"
        file.write_bytes(file.read_bytes()[:-2])
    elif what == "missing":
        shutil.rmtree(folder / "rank2" / "b")
    else:
        shutil.rmtree(folder / "rank0" / "b")


@pytest.mark.dist
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("token", "rank 2: b: its content differs from rank 0's (digest here "),
        ("truncated", "rank 2: b/x.ds: holds "),
        ("missing", "rank 2: b: no such file or folder"),
        ("missing on rank 0", "stage 1 'one', dataset_folders[1]: b: no such file or folder"),
    ],
)
def test_one_bad_copy_fails_on_every_rank_with_one_message(copies, what, words):
    _damage(copies, what)
    results = on_ranks(copies, lambda rank: attempt(plan(), rank))
    assert isinstance(results[0], str), results
    assert words in results[0]
    assert results == [results[0]] * RANKS


@pytest.mark.dist
def test_an_unexpected_error_on_one_rank_reaches_all(copies):
    def work(rank):
        if rank == 1:
            import megastage.data.index as index

            def fails(*_):
                raise RuntimeError("the disk is on fire")

            index.open_source = fails
        return attempt(plan(), rank)

    results = on_ranks(copies, work)
    assert results == ["rank 1: the disk is on fire"] * RANKS


@pytest.mark.dist
def test_text_is_tokenized_once_a_node(tmp_path):
    """Ranks 0, 1 are one node and 2, 3 another, each with its own cache."""
    stages = [FakeStage(0, "one", 0, 4, dataset="c4_validation", dataset_type="huggingface", seq_len=64)]

    def work(rank):
        cache = tmp_path / f"node{rank // 2}"
        before = len(list(cache.glob("text-*")))
        result = attempt(stages, rank, options=SourceOptions(cache_folder=cache), leader=rank % 2 == 0)
        return result, before, len(list(cache.iterdir()))

    results = on_ranks(tmp_path, work)
    assert not any(isinstance(result, BaseException) for result in results), results
    assert len({state for (_, state), _, _ in results}) == 1
    assert [after for _, _, after in results] == [1] * RANKS


@pytest.mark.dist
def test_bytes_travel_unchanged(tmp_path):
    def work(rank):
        sent = bytes(range(256)) * 1000 + b"\0\0"
        got = broadcast_bytes(sent if rank == 0 else b"", dist.group.WORLD)
        empty = broadcast_bytes(b"", dist.group.WORLD)
        gathered = gather_bytes(b"x\0" * rank, dist.group.WORLD)
        nothing = gather_bytes(b"", dist.group.WORLD)
        return got == sent and empty == b"" and gathered == [b"x\0" * r for r in range(RANKS)] and nothing == [b""] * 4

    assert on_ranks(tmp_path, work) == [True] * RANKS
