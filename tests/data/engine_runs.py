"""Runs of the data engine over three small sources of different kinds."""

import json
from dataclasses import replace

import torch
from source_files import FakeStage, documents, write_megatron, write_nanoset, write_saved_dataset

from megastage.data.engine import DataEngine


def make_sources(tmp_path):
    """Three sources of different kinds with distinct tokens: thousands 1, 2 and 3 tell them apart."""

    def numbered(seed, base, count):
        return [[base + t for t in doc] for doc in documents(seed, count, low=2, high=60, vocab=900)]

    write_nanoset(tmp_path / "a", "x", numbered(1, 1000, 150))
    write_nanoset(tmp_path / "a", "y", numbered(2, 1000, 150))
    write_megatron(tmp_path / "b", numbered(3, 2000, 200))
    write_saved_dataset(tmp_path / "c", {"input_ids": numbered(4, 3000, 250)})
    return tmp_path


def stages_of(data, **changes):
    """Two mixtures of nanosets at two lengths, a packed stage, and a return to the first mixture."""
    both = (str(data / "a"), str(data / "a2"))
    write_nanoset(data / "a2", "z", [[2000 + t for t in doc] for doc in documents(9, 200, low=2, vocab=900)])
    one = FakeStage(0, "one", 0, 6, dataset_folders=both, dataset_weights=(0.7, 0.3))
    two = FakeStage(1, "two", 6, 10, dataset_folders=both, dataset_weights=(0.4, 0.6), seq_len=64)
    three = FakeStage(2, "three", 10, 14, dataset_type="preprocessed", dataset_path=str(data / "c"), seq_len=24)
    four = replace(one, index=3, name="four", start_step=14, end_step=20)
    return [replace(stage, **changes) for stage in (one, two, three, four)]


def run_stages(stages, *, ranks=1, rank=0, state=None, workers=0, steps=None, **settings):
    """(batches, digests, state after each step) of a run through the stages from `state` on; settings: the engine's."""
    engine = DataEngine.build(stages, state=state, num_workers=workers, **settings)
    done = sum(record["samples"] // 8 for record in state["stages"]) if state else 0
    batches, digests, states = [], [], []
    entered = None
    for step in range(done, steps if steps is not None else stages[-1].end_step):
        stage = next(s for s in stages if s.start_step <= step < s.end_step)
        if stage.index != entered:
            engine.enter(stage.index, data_rank=rank, data_ranks=ranks)
            entered = stage.index
        batches.append(engine.next())
        digests.append(engine.sample_digest())
        states.append(json.loads(json.dumps(engine.state())))
    engine.close()
    return batches, digests, states


def same(one, other):
    names = ("tokens_BT", "labels_BT", "positions_BT", "cu_seqlens_BC", "source_B", "ids_B")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)
