"""The data engine over text that is tokenized while it is read: layouts, workers, resume, errors."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_runs import run_stages, same
from live_texts import Bytes, make_texts, write_texts
from source_files import FakeStage, documents, write_nanoset

from megastage.data.engine import DataEngine
from megastage.data.index import DataError
from megastage.data.sources import chunks
from megastage.data.sources.base import SourceError, SourceOptions
from megastage.data.sources.live import LiveText


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "MIN_CHARACTERS", 4000)
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("live")
    write_texts(root / "text", "mixed", make_texts(250, seed=1))
    write_texts(root / "prose", "jsonl", make_texts(150, seed=2))
    write_nanoset(root / "nano", "x", [[t % 290 for t in doc] for doc in documents(3, 200)])
    return root


def stages_of(root):
    """Two texts in two mixtures at two lengths, one of them alone without document mask, and back to the first."""
    both = (str(root / "text"), str(root / "prose"))
    one = FakeStage(0, "one", 0, 8, dataset_type="huggingface", dataset_folders=both, dataset_weights=(0.7, 0.3))
    two = replace(one, index=1, name="two", start_step=8, end_step=14, dataset_weights=(0.2, 0.8), seq_len=70)
    three = FakeStage(2, "three", 14, 18, dataset_path=str(root / "nano"))
    four = FakeStage(
        3, "four", 18, 24, dataset_type="huggingface", dataset_path=both[0], seq_len=45, document_mask=False
    )
    return [one, two, three, four, replace(one, index=4, name="five", start_step=24, end_step=60)]


def settings(cache, live):
    return {
        "options": SourceOptions(tokenizer=Bytes(), cache_folder=cache, live_bytes=0 if live else None),
        "vocab_size": 300,
    }


def engine_of(stages, cache, *, live=True, state=None, workers=0):
    return DataEngine.build(stages, state=state, num_workers=workers, **settings(cache, live))


def run(stages, cache, *, live=True, **how):
    """(batches, digests, states) of the steps that a state leaves."""
    return run_stages(stages, **how, **settings(cache, live))


def read_steps(engine, steps):
    for _ in range(steps):
        engine.next()


@pytest.fixture(scope="module")
def uncut(data, tmp_path_factory):
    """One rank's whole run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "MIN_CHARACTERS", 4000)
        return run(stages_of(data), tmp_path_factory.mktemp("cache"))


def test_batches_are_those_of_text_tokenized_before(data, uncut, tmp_path):
    batches, _, _ = run(stages_of(data), tmp_path, live=False)
    assert all(same(one, other) for one, other in zip(batches, uncut[0], strict=True))


def test_compiled_loops_give_the_same_batches(data, uncut, tmp_path, monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr("megastage.data.fetch.COMPILE_FROM", 1)
    batches, _, _ = run(stages_of(data), tmp_path)
    assert all(same(one, other) for one, other in zip(batches, uncut[0], strict=True))


@pytest.mark.parametrize("ranks", [2, 4])
def test_data_ranks_share_the_rows_of_one_order(data, uncut, tmp_path, ranks):
    runs = [run(stages_of(data), tmp_path, ranks=ranks, rank=rank, steps=30) for rank in range(ranks)]
    assert all(digests == uncut[1][:30] for _, digests, _ in runs)
    assert all(states == uncut[2][:30] for _, _, states in runs)
    for step in range(30):
        parts = [batches[step] for batches, _, _ in runs]
        assert torch.equal(torch.cat([part.tokens_BT for part in parts]), uncut[0][step].tokens_BT)
        assert torch.equal(torch.cat([part.labels_BT for part in parts]), uncut[0][step].labels_BT)


@pytest.mark.parametrize("cut", [0, 3, 7, 8, 13, 17, 20, 23, 41])
def test_a_resume_goes_on_bit_for_bit_with_any_number_of_workers_and_no_cache(data, uncut, tmp_path, cut):
    batches, digests, states = run(stages_of(data), tmp_path, state=uncut[2][cut], workers=cut % 3, steps=cut + 8)
    assert digests == uncut[1][cut + 1 : cut + 8]
    assert all(same(one, other) for one, other in zip(batches, uncut[0][cut + 1 :]))
    assert states == uncut[2][cut + 1 : cut + 8]


def test_the_saved_state_is_a_few_integers(uncut):
    for state in uncut[2]:
        assert len(json.dumps(state)) < 40_000
    marks = uncut[2][-1]["stages"][-1]["marks"]
    assert {len(mark) % 7 for mark in marks.values()} == {(2 + 3 * 64) % 7}


def test_tokenized_text_and_text_tokenized_before_are_two_contents(data, uncut, tmp_path):
    with pytest.raises(ValueError, match=r"source 1 \(.*text\) had the content .* and has .* now.*live_text_mb"):
        engine_of(stages_of(data), tmp_path, live=False, state=uncut[2][5])


def test_a_bad_row_is_an_error_when_it_is_reached_and_names_its_line(data, tmp_path):
    texts = make_texts(250, seed=1)
    folder = write_texts(tmp_path / "text", "jsonl", texts)
    file = folder / "part-002.jsonl"
    lines = file.read_bytes().split(b"\n")
    bad = next(i for i in range(60, len(lines)) if lines[i].strip())
    lines[bad] = b'{"text": "no end'
    file.write_bytes(b"\n".join(lines))
    stage = replace(stages_of(data)[0], dataset_folders=(str(folder),), dataset_weights=(), end_step=2000)
    for workers in (0, 2):
        engine = engine_of([stage], tmp_path / f"cache{workers}", workers=workers)
        engine.enter(0, data_rank=0, data_ranks=1)
        with pytest.raises(SourceError, match=rf"part-002\.jsonl, line {bad + 1}: no JSON"):
            read_steps(engine, 2000)
        assert engine.samples > 800
        with pytest.raises(SourceError, match="no JSON"):
            engine.next()
        engine.close()


def test_text_that_changes_while_it_is_read_is_an_error(data, tmp_path):
    folder = write_texts(tmp_path / "text", "jsonl", make_texts(250, seed=1))
    stage = replace(stages_of(data)[0], dataset_folders=(str(folder),), dataset_weights=(), end_step=2000)
    engine = engine_of([stage], tmp_path / "cache")
    engine.enter(0, data_rank=0, data_ranks=1)
    engine.next()
    with open(folder / "part-002.jsonl", "ab") as file:
        file.write(b"\n")
    with pytest.raises(SourceError, match=r"part-002\.jsonl: has changed since the run began"):
        read_steps(engine, 2000)
    engine.close()


def test_bad_text_at_the_start_is_reported_with_all_else(data, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text('{"body": "x"}\n')
    stage = replace(stages_of(data)[0], dataset_folders=(str(tmp_path / "text"), "/nowhere"))
    with pytest.raises(DataError, match=r"(?s)a\.jsonl, line 1: no text under 'text'.*/nowhere: no such file"):
        engine_of([stage], tmp_path / "cache")


def test_a_copy_of_a_text_in_another_stage_goes_on_with_it(data, tmp_path):
    for name in ("a", "b"):
        write_texts(tmp_path / name, "jsonl", make_texts(200, seed=3))
    one = replace(stages_of(data)[0], dataset_folders=(), dataset_path=str(tmp_path / "a"), dataset_weights=())
    two = replace(one, index=1, name="two", start_step=8, end_step=60, dataset_path=str(tmp_path / "b"))
    twice = run([one, two], tmp_path / "cache")
    once = run([one, replace(two, dataset_path=one.dataset_path)], tmp_path / "cache")
    assert twice[1] == once[1]
    assert all(same(a, b) for a, b in zip(twice[0], once[0]))


def test_closing_stops_what_works_ahead(data, tmp_path):
    engine = engine_of(stages_of(data), tmp_path)
    engine.enter(0, data_rank=0, data_ranks=1)
    engine.next()
    engine.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "text-ahead"]
    assert not list(tmp_path.rglob(".chunk-*"))


def test_the_plan_tells_epochs_by_an_estimate(data, tmp_path):
    stages = stages_of(data)
    engine = engine_of(stages, tmp_path)
    live = next(s for s in engine.index.sources.values() if isinstance(s, LiveText))
    exact = engine_of(stages, tmp_path, live=False).index.sources
    assert any(0.3 < live.n_tokens / source.n_tokens < 3 for source in exact.values())
    assert any("of about" in line for line in engine.plan_lines(stages[0]))
    assert np.isfinite(engine.index.orders[next(iter(engine.index.orders))].planned_epochs([]))
