"""Rules on the length of documents in whole stages: the same samples on any layout, after any resume, or an error."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_runs import run_stages, same
from source_files import FakeStage, documents, write_megatron, write_saved_dataset

from megastage.data.engine import DataEngine
from megastage.data.index import DataError
from megastage.data.packed_memmap import PackedMemmapWriter

OFF = {"min_doc_len": 0, "long_doc_len": 0, "long_doc_share": None}


@pytest.fixture
def stages(tmp_path):
    """Six stages of two sources; a token says which document of its source it is from, in the low bits its length."""
    for name, count, seed in (("web", 700, 1), ("books", 150, 2)):
        lengths = np.maximum(2, np.random.default_rng(seed).lognormal(4 + seed / 2, 1, count)).astype(np.int64)
        with PackedMemmapWriter(tmp_path / name, "uint32") as writer:
            for number, length in enumerate(lengths.tolist()):
                writer.append(np.full(length, number * 8192 + min(length, 8191), np.uint32))
    both = (str(tmp_path / "web"), str(tmp_path / "books"))
    base = FakeStage(dataset_type="packed_memmap", dataset_folders=both, dataset_weights=(0.7, 0.3), seq_len=64)
    changes = [
        {},
        {"min_doc_len": 40},
        {"min_doc_len": 30, "long_doc_len": 128, "long_doc_share": 0.75, "seq_len": 128},
        {"min_doc_len": 30, "long_doc_len": 128, "long_doc_share": 0.75, "seq_len": 128, "dataset_weights": (1, 1)},
        {"long_doc_len": 200, "long_doc_share": 0.4, "seq_len": 256},
        {"seq_len": 256},
    ]
    return [
        replace(base, index=i, name=f"s{i}", start_step=4 * i, end_step=4 * i + 4, **change)
        for i, change in enumerate(changes)
    ]


def test_rows_are_of_the_documents_asked_for(stages):
    batches, _, _ = run_stages(stages)
    for step, batch in enumerate(batches):
        stage, long = stages[step // 4], []
        for tokens in batch.tokens_BT.numpy():
            lengths = tokens[tokens > 0] % 8192
            assert lengths.min() >= stage.min_doc_len
            long.append(lengths.min() >= stage.long_doc_len)
            if stage.long_doc_share is not None:
                assert long[-1] or lengths.max() < stage.long_doc_len
        if stage.long_doc_share is not None:
            assert sum(long) > 0
    rows = [b.tokens_BT.numpy() for b in batches[8:16]]  # 64 rows at 0.75
    share = np.mean([r[r > 0].min() % 8192 >= 128 for batch in rows for r in batch])
    assert share == pytest.approx(0.75, abs=0.15)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_same_samples_on_any_layout_and_after_any_resume(stages, ranks):
    whole, digests, states = run_stages(stages)
    parts = [run_stages(stages, ranks=ranks, rank=rank, workers=rank) for rank in range(ranks)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[0][step].tokens_BT for part in parts]), batch.tokens_BT)
    assert all(part[1:] == (digests, states) for part in parts)
    for at in (1, 4, 6, 9, 13, 16, 18, 21, 23):
        later, later_digests, later_states = run_stages(stages, state=states[at - 1])
        assert (later_digests, later_states) == (digests[at:], states[at:])
        assert all(same(a, b) for a, b in zip(whole[at:], later, strict=True))


def test_a_boundary_within_one_rule_is_seamless(stages):
    one = replace(
        stages[2], start_step=0, end_step=4, dataset_folders=stages[2].dataset_folders[:1], dataset_weights=()
    )
    cut = [replace(one, index=0), replace(one, index=1, name="next", start_step=4, end_step=8)]
    whole = run_stages([replace(one, index=0, end_step=8)])[0]
    assert all(torch.equal(a.tokens_BT, b.tokens_BT) for a, b in zip(whole, run_stages(cut)[0], strict=True))


def test_later_stages_may_be_edited_and_the_past_may_not(stages):
    _, digests, states = run_stages(stages, steps=14)
    edited = [*stages[:4], replace(stages[4], **OFF), replace(stages[5], min_doc_len=100)]
    assert run_stages(edited, state=states[9], steps=14)[1] == digests[10:]
    with pytest.raises(ValueError) as error:
        DataEngine.build([stages[0], replace(stages[1], min_doc_len=50), *stages[2:]], state=states[9])
    assert "stage 2 's1': min_doc_len was 40 in the checkpoint and is 50 now" in str(error.value)
    with pytest.raises(ValueError, match=r"stage 3 's2': long_doc_share was 0.75 in the checkpoint and is None now"):
        DataEngine.build([*stages[:2], replace(stages[2], **OFF), *stages[3:]], state=states[9])


def test_states_say_nothing_of_rules_where_there_are_none(stages):
    """So that checkpoints of before are read, and theirs by them."""
    states = run_stages(stages, steps=6)[2]
    assert set(states[3]["stages"][0]).isdisjoint(OFF)
    assert states[5]["stages"][1]["min_doc_len"] == 40
    assert run_stages(stages, state=states[3], steps=6)[2] == states[4:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"min_doc_len": 90_000}, r"stage 1 's0': \S+/web: min_doc_len = 90000: no document is that long, the longest"),
        (
            {"long_doc_len": 90_000, "long_doc_share": 0.5},
            r"stage 1 's0': \S+/books: long_doc_len = 90000: no document is that long \(the longest document has",
        ),
    ],
)
def test_a_source_without_such_documents_is_an_error_at_the_start(stages, change, words):
    with pytest.raises(DataError, match=words):
        DataEngine.build([replace(stages[0], **change), *stages[1:]])
    never_drawn = replace(stages[0], **{**change, "dataset_weights": (0, 0)}, never_runs=True)
    DataEngine.build([never_drawn, *stages[1:]])


def test_packed_rows_and_token_streams_take_no_rule(tmp_path):
    rows = [[*range(1, 17)] for _ in range(40)]
    positions = [[*range(8), *range(8)] for _ in range(40)]
    write_saved_dataset(tmp_path / "rows", {"input_ids": rows, "position_ids": positions})
    write_saved_dataset(tmp_path / "docs", {"input_ids": documents(1, 90)})
    (tmp_path / "m").mkdir()
    write_megatron(tmp_path / "m" / "d", documents(3, 80))
    base = FakeStage(dataset_type="preprocessed", min_doc_len=12, dataset_path=str(tmp_path / "docs"))
    batches, _, _ = run_stages([base])
    assert len(batches) == 10
    with pytest.raises(DataError, match=r"rows: min_doc_len = 12: its rows hold several documents and are kept whole"):
        DataEngine.build([replace(base, dataset_path=str(tmp_path / "rows"))])
    with pytest.raises(DataError, match=r"m: min_doc_len = 12: the source is not read document by document"):
        DataEngine.build([replace(base, dataset_type="megatron", dataset_path=str(tmp_path / "m"))])


def test_the_plan_counts_what_is_skipped(stages):
    engine = DataEngine.build(stages)
    lengths = [np.diff(source.doc_ends.astype(np.int64), prepend=0) for source in engine.index.stages[0].sources]
    for source, line in zip(lengths, engine.plan_lines(stages[1]), strict=True):
        assert f"skipped: {int(source[source < 40].sum()):,} tokens an epoch (min_doc_len = 40)" in line
    before, after = (line.split("epochs (")[1].split(")")[0].split(" -> ") for line in
                     (engine.plan_lines(stages[1])[1], engine.plan_lines(stages[2])[1]))  # fmt: skip
    assert after[0] == before[1]
    assert float(after[1]) > float(after[0])
    assert (
        "tokens an epoch (min_doc_len = 30, long_doc_len = 128, long_doc_share = 0.75)"
        in (engine.plan_lines(stages[2])[0])
    )
    assert all("skipped" not in line for line in engine.plan_lines(stages[0]))
