"""The engine's promises: one global order, whatever the number of ranks and workers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_runs import make_sources, run_stages, same, stages_of
from source_files import FakeStage, documents, write_nanoset

from megastage.data.engine import DataEngine
from megastage.data.index import DataError
from megastage.data.packed_memmap import PackedMemmapWriter, TokenizerFacts
from megastage.data.sources.base import SourceError, SourceOptions


@pytest.fixture
def data(tmp_path):
    return make_sources(tmp_path)


def test_batches_come_from_the_right_sources_in_the_right_shares(data):
    stages = stages_of(data)
    batches, _, _ = run_stages(stages)
    for step, batch in enumerate(batches[:6]):
        assert batch.ids_B.tolist() == list(range(8 * step, 8 * step + 8))
        thousands = (batch.tokens_BT // 1000).unique(dim=1)
        assert thousands.shape == (8, 1)
        assert thousands[:, 0].tolist() == (batch.source_B + 1).tolist()
    drawn = torch.cat([batch.source_B for batch in batches[:6]])
    for n in range(1, len(drawn) + 1):
        assert abs(int((drawn[:n] == 0).sum()) - 0.7 * n) <= 0.5 + 1e-9
    assert batches[6].tokens_BT.shape == (8, 64)
    assert (batches[10].tokens_BT[batches[10].tokens_BT > 0] // 1000 == 3).all()


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_slices_of_any_number_of_ranks_join_to_the_same_batches(data, ranks):
    stages = stages_of(data)
    whole, digests, states = run_stages(stages)
    parts = [run_stages(stages, ranks=ranks, rank=rank) for rank in range(ranks)]
    for step, batch in enumerate(whole):
        for name in ("tokens_BT", "labels_BT", "positions_BT", "source_B", "ids_B"):
            joined = torch.cat([getattr(part[0][step], name) for part in parts])
            assert torch.equal(joined, getattr(batch, name))
    assert all(part[1] == digests for part in parts)
    assert all(part[2] == states for part in parts)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(data, workers):
    stages = stages_of(data)
    plain, digests, states = run_stages(stages)
    threaded = run_stages(stages, workers=workers)
    assert all(same(a, b) for a, b in zip(plain, threaded[0], strict=True))
    assert threaded[1:] == (digests, states)


def test_no_token_is_read_twice_before_an_epoch_ends(data):
    """Every position of a source is an input at most once, over three stages of different lengths and mixtures."""
    tokens = np.random.default_rng(0).permutation(60_000).astype(np.uint32)  # each value names its position
    for name, part in (("big", tokens[:40_000]), ("small", tokens[40_000:])):
        folder = data / name
        folder.mkdir()
        part.tofile(folder / "x.ds")
        (folder / "x.ds.metadata").write_text(f"t|4\n{len(part)}\n")
    folders = (str(data / "big"), str(data / "small"))
    shape = [(16, (0.9, 0.1)), (94, (0.5, 0.5)), (128, (0.8, 0.2)), (16, (0.6, 0.4))]
    stages = [
        FakeStage(i, f"s{i}", 5 * i, 5 * i + 5, dataset_folders=folders, dataset_weights=weights, seq_len=length)
        for i, (length, weights) in enumerate(shape)
    ]
    batches, _, _ = run_stages(stages)
    seen = torch.cat([batch.tokens_BT.flatten() for batch in batches])
    assert len(seen.unique()) == len(seen)
    labels = torch.cat([batch.labels_BT[:, :-1].flatten() for batch in batches])
    inputs = torch.cat([batch.tokens_BT[:, 1:].flatten() for batch in batches])
    assert torch.equal(labels, inputs)


def test_a_new_seed_starts_afresh_and_an_old_one_goes_on(data):
    folder = (str(data / "a"),)
    base = FakeStage(0, "one", 0, 3, dataset_folders=folder)
    stages = [base, replace(base, index=1, name="two", start_step=3, end_step=6, dataset_random_seed=5)]
    stages.append(replace(base, index=2, name="three", start_step=6, end_step=9))
    batches, _, states = run_stages(stages)
    alone, _, _ = run_stages([replace(base, end_step=6)])
    fresh, _, _ = run_stages([replace(stages[1], index=0, start_step=0, end_step=3)])
    assert all(torch.equal(a.tokens_BT, b.tokens_BT) for a, b in zip(batches[:3] + batches[6:], alone, strict=True))
    assert all(torch.equal(a.tokens_BT, b.tokens_BT) for a, b in zip(batches[3:6], fresh, strict=True))
    assert len(states[-1]["orders"]) == 2


def test_a_boundary_that_changes_only_the_mixture_is_seamless_for_each_source(data):
    """Packed rows too: the rows of a source are those of one stage that reads on."""
    base = FakeStage(0, "one", 0, 4, dataset_type="preprocessed", dataset_path=str(data / "c"), seq_len=24)
    whole, _, _ = run_stages([replace(base, end_step=8)])
    cut = [base, replace(base, index=1, name="two", start_step=4, end_step=8)]
    assert all(torch.equal(a.tokens_BT, b.tokens_BT) for a, b in zip(whole, run_stages(cut)[0], strict=True))


def test_state_does_not_see_what_was_read_ahead(data):
    stages = stages_of(data)
    engine = DataEngine.build(stages, num_workers=4, prefetch_batches=6)
    engine.enter(0, data_rank=0, data_ranks=1)
    assert engine.state()["stages"][0]["samples"] == 0
    engine.next()
    assert engine.state()["stages"][0]["samples"] == 8
    assert engine.samples == 8
    assert engine.wait_s >= 0
    engine.close()
    engine.close()


def test_all_problems_of_all_stages_come_at_once(data):
    write_nanoset(data / "short", "x", [[1, 2, 3]])
    write_nanoset(data / "odd", "x", [[1, 2, 3]])
    (data / "odd" / "x.ds").write_bytes(b"123")
    folder = str(data / "a")
    stages = [
        FakeStage(0, "first", dataset_folders=(folder, str(data / "gone"))),
        FakeStage(1, "second", dataset_folders=(str(data / "short"), str(data / "odd")), seq_len=512),
        FakeStage(2, "third", dataset_folders=(folder, folder)),
        FakeStage(3, "fourth", dataset_path=str(data / "short"), seq_len=512),
        FakeStage(4, "fifth"),
        FakeStage(5, "sixth", dataset_folders=(folder,), dataset_weights=(1, 2)),
        FakeStage(6, "seventh", dataset_path="/never/there", never_runs=True),
    ]
    with pytest.raises(DataError) as error:
        DataEngine.build(stages)
    problems = error.value.problems
    assert len(problems) == 6
    for words in (
        "stage 1 'first', dataset_folders[1]: ",
        "stage 2 'second', dataset_folders[1]: ",
        "hold the same content; name it once and give it the sum",
        "3 tokens are too few for one row of seq_len 512",
        "stage 5 'fifth': dataset_type 'nanoset' needs dataset_path or dataset_folders",
        "stage 6 'sixth': dataset_weights has 2 values for 1 sources",
    ):
        assert sum(words in problem for problem in problems) == 1, words


def test_a_length_that_cannot_go_on_is_an_error_at_the_start(data):
    short = FakeStage(0, "one", 0, 4, dataset_path=str(data / "a"))
    state = run_stages([short], steps=2)[2][-1]
    long = replace(short, index=1, name="long", start_step=4, end_step=6, seq_len=4096)
    with pytest.raises(DataError, match=r"stage 2 'long': .* seq_len 4096 does not fit .*new dataset_random_seed"):
        DataEngine.build([short, long], state=state)
    DataEngine.build([short, replace(long, dataset_random_seed=2)], state=state)


def test_a_source_too_short_for_one_stage_is_the_matter_of_that_stage(tmp_path):
    write_nanoset(tmp_path / "a", "x", documents(1, 20))
    stages = [
        FakeStage(0, "base", 0, 5, dataset_folders=(str(tmp_path / "a"),)),
        FakeStage(1, "long", 5, dataset_folders=(str(tmp_path / "a"),), seq_len=100_000),
    ]
    with pytest.raises(DataError) as error:
        DataEngine.build(stages)
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith("stage 2 'long': ")
    assert "too few for one row of seq_len 100000" in error.value.problems[0]


def test_vocabulary_is_checked_at_the_start_where_it_is_recorded_and_per_batch_elsewhere(data):
    stages = stages_of(data)
    engine = DataEngine.build(stages, vocab_size=2500, num_workers=2)
    engine.enter(0, data_rank=0, data_ranks=1)
    with pytest.raises(SourceError, match=r"a2: token \d+ at position \d+ of its stream is outside .* of 2500"):
        list(iter(engine.next, None))
    with pytest.raises(SourceError):
        engine.next()
    engine.close()
    text = FakeStage(0, "one", 0, 4, dataset="c4_test", dataset_type="huggingface")
    with pytest.raises(
        DataError, match="c4_test: made with a tokenizer of 257 ids, but the model's vocabulary has 100"
    ):
        DataEngine.build([text], vocab_size=100, options=SourceOptions(cache_folder=data / "cache"))


def test_stages_go_forward_only(data):
    stages = stages_of(data)
    engine = DataEngine.build(stages)
    engine.enter(1, data_rank=0, data_ranks=1)
    with pytest.raises(ValueError, match="stage 1 comes before stage 2, which has been read from"):
        engine.enter(0, data_rank=0, data_ranks=1)
    with pytest.raises(ValueError, match="global_batch_size 8 is smaller than the number of data ranks 9"):
        engine.enter(1, data_rank=0, data_ranks=9)


def test_plan_lines_say_what_is_read(data):
    stages = stages_of(data)
    engine = DataEngine.build(stages)
    lines = engine.plan_lines(stages[1])
    assert len(lines) == 2
    total = 4 * 8 * 64
    assert f"{0.4 * total / 1e9:.2f}B of" in lines[0]
    n = engine.index.stages[1].sources[0].n_tokens
    before = round(0.7 * 48) * 16 / n
    after = before + round(0.4 * 32) * 64 / n
    shown = [float(x) for x in lines[0].split("(")[1].split(")")[0].split(" -> ")]
    assert shown == pytest.approx([before, after], rel=0.25)
    assert "skipped: " in lines[0]
    rounded = replace(stages[1], dataset_weights=(1 / 3, 2 / 3 + 1e-7))
    assert "Note: weights are rounded to" in DataEngine.build([rounded]).plan_lines(rounded)[-1]


def test_sources_of_two_tokenizers_are_refused(data):
    for name, sha in (("p", "ab" * 32), ("q", "cd" * 32)):
        with PackedMemmapWriter(data / name, "uint16", tokenizer=TokenizerFacts(name, sha, 100)) as writer:
            writer.append(np.arange(50))
    one = FakeStage(0, "one", dataset_type="packed_memmap", dataset_path=str(data / "p"))
    two = FakeStage(1, "two", dataset_type="packed_memmap", dataset_path=str(data / "q"))
    DataEngine.build([one])
    with pytest.raises(DataError, match=r"q: made with another tokenizer \(sha256 cdcd.* than .*p \(abab"):
        DataEngine.build([one, two])


def test_the_default_configuration_reads_its_data(data):
    from megastage.config.layout import resolve_layout
    from megastage.config.load import load_config
    from megastage.stages import resolve_stages

    config = load_config([])
    stages = resolve_stages(config, resolve_layout(config, 1), seed=1)
    engine = DataEngine.build(stages, options=SourceOptions(cache_folder=data / "cache"), vocab_size=2048)
    engine.enter(0, data_rank=0, data_ranks=1)
    batch = engine.next()
    assert batch.tokens_BT.shape == (8, 2048)
    assert (batch.labels_BT != -100).float().mean() > 0.99
    assert len(engine.plan_lines(stages[0])) == 1
