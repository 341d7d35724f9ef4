"""What may be edited between a checkpoint and the run that goes on from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megastage.config.layout import resolve_layout
from megastage.config.load import load_config
from megastage.stages import Stage, compare, fingerprint, record, resolve_stages

TEXT = """
[training]
dataset_type = "nanoset"
dataset_folders = ["/a", "/b"]
dataset_weights = [0.5, 0.5]
steps = 300
[[training.data_stages]]
name = "one"
start_step = 0
end_step = 100
[[training.data_stages]]
name = "two"
start_step = 100
end_step = 200
seq_len = 4096
[[training.data_stages]]
name = "three"
start_step = 200
"""


@pytest.fixture
def stages(tmp_path: Path):
    def stages(*arguments: str, text: str = TEXT, world_size: int = 1) -> tuple[Stage, ...]:
        file = tmp_path / "c.toml"
        file.write_text(text)
        cfg = load_config(["--config", str(file), *arguments])
        return resolve_stages(cfg, resolve_layout(cfg, world_size), seed=1, global_batch_size=8)

    return stages


def edit(number: int, key: str, value: str) -> str:
    return f"--training.data_stages.{number}.{key}={value}"


def saved(stages: tuple[Stage, ...]) -> list[dict]:
    return json.loads(json.dumps([record(stage) for stage in stages]))


def test_nothing_edited(stages) -> None:
    for step in (0, 1, 99, 100, 150, 300):
        assert compare(saved(stages()), stages(), step) == ([], [])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataset_weights", "0.6,0.4"),
        ("dataset_random_seed", "9"),
        ("seq_len", "1024"),
        ("global_batch_size", "16"),
        ("document_mask", "false"),
        ("rope_theta", "1e6"),
        ("dataset_type", "packed_memmap"),
    ],
)
def test_the_past_is_frozen_and_the_future_is_free(stages, key: str, value: str) -> None:
    old = saved(stages())
    edited = stages(edit(1, key, value))
    field = key.replace("rope_theta", "rope")
    for step in (101, 150, 200, 250):
        problems, _ = compare(old, edited, step)
        (problem,) = problems
        assert problem.startswith(f"stage 'two': {field} was ")
        assert "end the stage at step" in problem
    for step in (50, 100):
        problems, diffs = compare(old, edited, step)
        assert problems == []
        (diff,) = diffs
        assert diff.startswith(f"stage 'two': {field} ")
        assert " -> " in diff


def test_a_stage_that_has_begun_keeps_its_name(stages) -> None:
    old, edited = saved(stages()), stages(edit(1, "name", "zwei"))
    assert compare(old, edited, 150)[0] == [
        'stage \'two\': name was "two" and is "zwei", but the stage has begun; '
        "set it back, or end the stage at step 150 and put the change in a new one"
    ]
    problems, diffs = compare(old, edited, 100)
    assert problems == []
    assert diffs == ["stage 'zwei': new, from step 100", "stage 'two': gone"]


def test_both_values_are_named(stages) -> None:
    problems, _ = compare(saved(stages()), stages(edit(1, "seq_len", "1024")), 150)
    assert "seq_len was 4096 and is 1024" in problems[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("local_batch_size", "4"), ("dataset_folders", "/copy/a,/copy/b"), ("recompute_mode", "full"),
        ("lr", "1e-5"), ("weight_decay", "0.0"),
    ],
)  # fmt: skip
def test_what_does_not_touch_the_samples_is_shown_alone(stages, key: str, value: str) -> None:
    problems, diffs = compare(saved(stages()), stages(edit(1, key, value)), 150)
    assert problems == []
    assert len(diffs) == 1


def test_a_longer_run(stages) -> None:
    problems, diffs = compare(saved(stages()), stages("--training.steps=500"), 300)
    assert problems == []
    assert diffs == ["stage 'three': end_step 300 -> 500"]


def test_a_run_cut_short_and_taken_up_again(stages) -> None:
    problems, diffs = compare(saved(stages("--training.steps=150")), stages(), 150)
    assert problems == []
    assert diffs[0] == "stage 'two': end_step 150 -> 200"


def test_the_present_stage_may_end_now_but_not_before(stages) -> None:
    def ending(step: int) -> tuple[Stage, ...]:
        return stages(edit(1, "end_step", str(step)), edit(2, "start_step", str(step)))

    assert compare(saved(stages()), ending(150), 150)[0] == []
    (problem,) = compare(saved(stages()), ending(160), 170)[0][:1]
    assert "end_step = 160, but 170 steps are done" in problem
    (problem,) = compare(saved(stages()), ending(250), 210)[0][:1]
    assert "is gone" in problem or "end_step was 200 and is 250" in problem


def test_a_past_stage_removed_or_put_in(stages) -> None:
    without_second = TEXT.replace("end_step = 100\n", "end_step = 200\n").replace(
        '[[training.data_stages]]\nname = "two"\nstart_step = 100\nend_step = 200\nseq_len = 4096\n', ""
    )
    problems, _ = compare(saved(stages()), stages(text=without_second), 150)
    assert any("stage 'two' (from step 100) was trained on and is gone" in problem for problem in problems)
    more = [
        edit(1, "end_step", "120"),
        edit(3, "name", "new"),
        edit(3, "start_step", "120"),
        edit(3, "end_step", "200"),
    ]
    problems, _ = compare(saved(stages()), stages(*more), 150)
    assert any("stage 'new': start_step = 120 lies in the past" in problem for problem in problems)
    problems, diffs = compare(saved(stages()), stages(*more), 110)
    assert problems == []
    assert "stage 'new': new, from step 120" in diffs


def test_a_future_stage_removed(stages) -> None:
    shorter = TEXT[: TEXT.index('[[training.data_stages]]\nname = "three"')].replace("end_step = 200\n", "")
    problems, diffs = compare(saved(stages()), stages(text=shorter), 150)
    assert problems == []
    assert diffs == ["stage 'two': end_step 200 -> 300", "stage 'three': gone"]


def test_the_number_of_folders_is_frozen(stages) -> None:
    more = [edit(1, "dataset_folders", "/a,/b,/c"), edit(1, "dataset_weights", "0.5,0.5,0")]
    problems, _ = compare(saved(stages()), stages(*more), 150)
    assert any("dataset_folders had 2 folders and has 3" in problem for problem in problems)


def test_the_fingerprint_is_of_the_samples_alone(stages) -> None:
    one = fingerprint(stages()[1])
    assert len(one) == 64
    assert fingerprint(stages("--parallelism.tensor_parallel_degree=2", world_size=2)[1]) == one
    assert fingerprint(stages("--training.local_batch_size=2", world_size=4)[1]) == one
    assert fingerprint(stages("--training.dataset_folders=/x/a,/x/b")[1]) == one
    assert fingerprint(stages("--training.dataset_weights=2,2")[1]) == one
    assert fingerprint(stages(edit(1, "end_step", "150"), edit(2, "start_step", "150"))[1]) == one
    others = [
        edit(1, "seq_len", "64"), edit(1, "dataset_weights", "1,2"), edit(1, "dataset_random_seed", "2"),
        edit(1, "global_batch_size", "16"), edit(1, "document_mask", "false"),
    ]  # fmt: skip
    prints = {fingerprint(stages(other)[1]) for other in others}
    assert len(prints | {one}) == len(others) + 1


def test_a_record_is_json(stages) -> None:
    entry = record(stages()[1])
    assert json.loads(json.dumps(entry)) == entry
    assert entry["fingerprint"] == fingerprint(stages()[1])
    assert (entry["name"], entry["seq_len"], entry["dataset_weights"]) == ("two", 4096, [0.5, 0.5])
