"""Going on: from any step, on any layout, with the past frozen and the future free."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_runs import make_sources, run_stages, same, stages_of
from source_files import FakeStage, documents, write_nanoset

from megastage.data.engine import DataEngine
from megastage.data.packed_memmap import PackedMemmapWriter
from megastage.data.packing import PackedOrder
from megastage.data.sources.base import SourceOptions


@pytest.fixture
def data(tmp_path):
    return make_sources(tmp_path)


@pytest.mark.parametrize("at", [1, 3, 6, 7, 10, 12, 14, 15])
def test_resume_anywhere_equals_going_on(data, at):
    stages = stages_of(data)
    whole, digests, states = run_stages(stages)
    first = run_stages(stages, steps=at, workers=2, ranks=2)[2][-1]
    assert first == states[at - 1]
    later, later_digests, later_states = run_stages(stages, state=first, workers=1)
    assert later_digests == digests[at:]
    assert later_states == states[at:]
    assert all(same(a, b) for a, b in zip(whole[at:], later, strict=True))


def test_future_stages_may_be_edited(data):
    stages = stages_of(data)
    _, _, states = run_stages(stages, steps=8)
    edited = [*stages[:3], replace(stages[3], dataset_weights=(0.1, 0.9), seq_len=48, name="other")]
    later = run_stages(edited, state=states[7], steps=14)[1]
    assert later == run_stages(stages, state=states[7], steps=14)[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seq_len": 32}, "stage 1 'one': seq_len was 16 in the checkpoint and is 32 now"),
        ({"dataset_random_seed": 6}, "stage 1 'one': dataset_random_seed was 1234 in the checkpoint and is 6 now"),
        ({"name": "uno"}, "stage 1 'one': name was 'one' in the checkpoint and is 'uno' now"),
        ({"document_mask": False}, "stage 1 'one': document_mask was True in the checkpoint and is False now"),
        (
            {"dataset_weights": (0.5, 0.5)},
            "dataset_weights (as integers) was [7, 3] in the checkpoint and is [1, 1] now",
        ),
        ({"never_runs": True}, "stage 1 'one': has been read from, but is no longer among the stages that run"),
    ],
)
def test_the_past_is_frozen(data, change, words):
    stages = stages_of(data)
    state = run_stages(stages, steps=7)[2][-1]
    with pytest.raises(ValueError) as error:
        DataEngine.build([replace(stages[0], **change), *stages[1:]], state=state)
    assert words in str(error.value)


def test_changed_content_is_found_on_resume_and_a_copy_is_not(data):
    stages = stages_of(data)
    state = run_stages(stages, steps=3)[2][-1]
    write_nanoset(data / "copy", "renamed", [[2000 + t for t in doc] for doc in documents(9, 200, low=2, vocab=900)])
    moved = [
        replace(s, dataset_folders=(s.dataset_folders[0], str(data / "copy"))) if s.dataset_folders else s
        for s in stages
    ]
    assert run_stages(moved, state=state)[1] == run_stages(stages, state=state)[1]
    write_nanoset(data / "copy", "renamed", [[2001 + t for t in doc] for doc in documents(9, 200, low=2, vocab=900)])
    with pytest.raises(ValueError, match=r"source 2 \(.*copy\) had the content [0-9a-f]{64} in the checkpoint"):
        DataEngine.build(moved, state=state)


def test_damaged_states_are_refused(data):
    stages = stages_of(data)
    for state, words in (({}, "version None"), ({"version": 1, "stages": [{}], "orders": {}}, "not readable")):
        with pytest.raises(ValueError, match=words):
            DataEngine.build(stages, state=state)


def test_resume_takes_no_longer_after_a_billion_samples(data):
    """Weights of a full-size table, six stages, 64 sources: entering is closed forms and look-ups."""
    folders = []
    for number in range(64):
        folder = data / f"s{number}"
        folder.mkdir()
        (np.arange(40_000) % 5_000 + number).astype(np.uint16).tofile(folder / "x.ds")
        (folder / "x.ds.metadata").write_text("t|2\n40000\n")
        folders.append(str(folder))
    weights = tuple(1 / (i + 1.01) for i in range(64))
    lengths = [512, 1024, 512, 2048, 4096, 512]
    stages = [
        FakeStage(i, f"s{i}", 10**6 * i, 10**6 * (i + 1), dataset_folders=tuple(folders), dataset_weights=weights,
                  seq_len=length, global_batch_size=1000)
        for i, length in enumerate(lengths)
    ]  # fmt: skip
    engine = DataEngine.build(stages)
    for stage in stages:
        engine.enter(stage.index, data_rank=0, data_ranks=1)
        engine._records[-1].samples = 10**9
    state = engine.state()
    assert len(json.dumps(state)) < 200_000
    resumed = DataEngine.build(stages, state=state)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        resumed.enter(5, data_rank=0, data_ranks=125)
        batch = resumed.next()
        seconds.append(time.perf_counter() - started)
    assert batch.ids_B[0] == 10**9 + 2000  # the third batch
    assert min(seconds) < 0.5  # a few tens of milliseconds on a quiet machine


def test_packed_rows_resume_deep_in_an_epoch_without_packing_it_again(data, monkeypatch):
    rng = np.random.default_rng(0)
    with PackedMemmapWriter(data / "p", "uint16") as writer:
        for _ in range(15_000):
            writer.append(rng.integers(1, 900, rng.integers(2, 9)))
    one = FakeStage(
        0, "one", 0, 12, dataset_type="packed_memmap", dataset_path=str(data / "p"), seq_len=64, global_batch_size=100
    )
    two = replace(one, index=1, name="two", start_step=12, end_step=16, seq_len=96)
    engine = DataEngine.build([one, two])
    states, digests = [], []
    for step in range(16):
        if step in (0, 12):
            engine.enter(step // 12, data_rank=0, data_ranks=1)
        engine.next()
        states.append(json.loads(json.dumps(engine.state())))
        digests.append(engine.sample_digest())
    packed = []
    make = PackedOrder._make_block
    monkeypatch.setattr(PackedOrder, "_make_block", lambda self, *a: packed.append(a) or make(self, *a))
    for at in (9, 11, 13, 14):
        packed.clear()
        other = DataEngine.build([one, two], state=states[at])
        step = at + 1
        other.enter(step // 12, data_rank=0, data_ranks=1)
        other.next()
        assert other.sample_digest() == digests[step]
        assert len(packed) <= 3, at  # of the four that the epoch has: the open one, and what comes next
        assert all(number >= 2 for number, *_ in packed)


@pytest.mark.parametrize("ranks", [1, 3])
def test_text_by_virtual_streams_resumes_on_any_layout(data, ranks):
    base = FakeStage(0, "one", 0, 4, dataset="c4_validation", dataset_type="huggingface", seq_len=128)
    stages = [base, replace(base, index=1, name="long", start_step=4, end_step=8, seq_len=512)]
    options = SourceOptions(cache_folder=data / "cache")

    def go(state, first, last, rank=0, ranks=1):
        engine = DataEngine.build(stages, state=state, options=options)
        out = []
        for step in range(first, last):
            if step in (first, 4):
                engine.enter(step // 4, data_rank=rank, data_ranks=ranks)
            out.append((engine.next().tokens_BT, engine.sample_digest()))
        return out, engine.state()

    whole, _ = go(None, 0, 8)
    _, state = go(None, 0, 3)
    parts = [go(state, 3, 8, rank, ranks)[0] for rank in range(ranks)]
    for step in range(3, 8):
        joined = torch.cat([part[step - 3][0] for part in parts])
        assert torch.equal(joined, whole[step][0])
        assert {part[step - 3][1] for part in parts} == {whole[step][1]}


def test_batch_size_may_change_within_a_stage(data):
    stages = stages_of(data)
    engine = DataEngine.build(stages)
    engine.enter(0, data_rank=0, data_ranks=1)
    first = engine.next()
    other = DataEngine.build(stages, state=engine.state())
    other.enter(0, data_rank=0, data_ranks=1, global_batch_size=5)
    second = other.next()
    assert second.ids_B.tolist() == [8, 9, 10, 11, 12]
    assert torch.equal(second.tokens_BT, engine.next().tokens_BT[:5])
    assert first.ids_B.tolist() == list(range(8))
