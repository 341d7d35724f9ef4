"""The plan against what is read then: epochs, skipped tokens and padding of every source in every stage."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_runs import make_sources, run_stages, stages_of
from source_files import FakeStage, documents, write_nanoset, write_saved_dataset

from megastage.data.engine import DataEngine


def numbers(line):
    """(epochs before, epochs after, tokens skipped at entry, tokens skipped an epoch) of a source's line."""
    epochs = re.search(r"epochs \(([\d.]+) -> ([\d.]+)\)", line)
    skipped = re.search(r"skipped: ([\d,]+) tokens at entry, ([\d,]+) an epoch", line)
    return *map(float, epochs.groups()), *(int(n.replace(",", "")) for n in (skipped.groups() if skipped else ()))


def test_epochs_and_skipped_tokens_of_a_stream_are_those_that_were_read(tmp_path):
    """Tokens that name their place, over six stages of five lengths, some of which divide nothing, with wraps."""
    n_tokens = 30_000
    write_nanoset(tmp_path, "x", [list(range(n_tokens))], size=4)
    lengths = [16, 94, 128, 37, 512, 16]
    stages = [
        FakeStage(i, f"s{i}", 12 * i, 12 * i + 12, dataset_path=str(tmp_path), seq_len=length,
                  global_batch_size=4000 // length)
        for i, length in enumerate(lengths)
    ]  # fmt: skip
    engine = DataEngine.build(stages)
    lines = [numbers(engine.plan_lines(stage)[0]) for stage in stages]
    batches, _, states = run_stages(stages)
    (order,) = engine.index.orders.values()
    counts = np.zeros(n_tokens, np.int64)
    for batch in batches:
        np.add.at(counts, batch.tokens_BT.numpy().ravel(), 1)
    last = states[-1]["stages"]
    assert [before for before, *_ in lines[1:]] == [after for _, after, *_ in lines[:-1]]
    assert lines[-1][1] > 6  # it wraps in every stage
    assert last[-1]["epochs"][0] == pytest.approx(lines[-1][1], abs=1e-2)
    assert counts[:-1].max() <= np.ceil(last[-1]["epochs"][0] + 0.01)  # boundaries skip a little more than is planned
    lanes, most = order.lanes, 0
    for stage, line, record in zip(stages, lines, last, strict=True):
        _, _, entry, an_epoch = line
        assert [entry] == record["skipped_tokens"]
        assert entry <= lanes * (stage.seq_len - 1)
        per_superblock = order.superblock % stage.seq_len
        assert an_epoch == order.n_superblocks * per_superblock + (n_tokens - 1) % order.superblock
        most = max(most, an_epoch)
    skipped = sum(entry for *_, entry, _ in lines) + most * np.ceil(lines[-1][1])
    assert counts.sum() + skipped >= (n_tokens - 1) * np.floor(last[-1]["epochs"][0])


@pytest.mark.parametrize("seq_len", [31, 32, 48, 64, 100])
def test_rows_that_stay_whole_leave_positions_empty_and_the_plan_says_so(tmp_path, seq_len):
    rows = np.random.default_rng(0).integers(1, 99, (300, 32)).tolist()
    write_saved_dataset(tmp_path, {"input_ids": rows})
    stage = FakeStage(dataset_type="preprocessed", dataset_path=str(tmp_path), seq_len=seq_len)
    engine = DataEngine.build([stage])
    (line,) = engine.plan_lines(stage)
    batches, _, states = run_stages([stage])
    filled = int(torch.cat([batch.cu_seqlens_BC[:, -1] for batch in batches]).sum())
    empty = 1 - filled / (80 * seq_len)
    assert (f"padding: about {empty:.1%} of the positions" in line) == (seq_len in (48, 100))
    assert empty == pytest.approx({31: 0, 32: 0, 48: 1 / 3, 64: 0, 100: 0.04}[seq_len], abs=0.006)
    before, after = numbers(line)
    assert before == 0
    assert after == pytest.approx(filled / (300 * 32), abs=0.02)
    assert states[-1]["stages"][0]["epochs"] == [pytest.approx(after, abs=0.02)]


def test_documents_that_are_packed_well_need_no_word(tmp_path):
    write_saved_dataset(tmp_path, {"input_ids": documents(4, 900, low=2, high=60)})
    stage = FakeStage(dataset_type="preprocessed", dataset_path=str(tmp_path), seq_len=128)
    assert "padding" not in DataEngine.build([stage]).plan_lines(stage)[0]


def test_progress_is_saved_and_the_same_after_a_resume(tmp_path):
    stages = stages_of(make_sources(tmp_path))
    _, _, states = run_stages(stages, steps=9)
    for record in states[-1]["stages"]:
        assert len(record["epochs"]) == len(record["skipped_tokens"]) == len(record["sources"])
        assert all(0 < epochs < 50 for epochs in record["epochs"])
    assert run_stages(stages, state=states[6], steps=9, workers=2)[2][-1] == states[-1]
    unused = replace(stages[0], dataset_weights=(1.0, 0.0))
    (record,) = run_stages([unused], steps=2)[2][-1]["stages"]
    assert record["epochs"][1] is record["skipped_tokens"][1] is None
