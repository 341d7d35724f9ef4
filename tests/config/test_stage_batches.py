"""Rows of a step: global batch, data ranks, micro-batches, and what the plan says of them."""

from __future__ import annotations

import pytest
from stage_texts import STAGES, resolve, table

from megastage.stages import plan_text, stage_notes


@pytest.mark.parametrize(
    ("world_size", "arguments", "expected"),
    [
        (1, (), (8, 1, 8, 1)),
        (4, (), (32, 4, 8, 1)),
        (4, ("--training.global_batch_size=64",), (64, 4, 8, 2)),
        (4, ("--parallelism.tensor_parallel_degree=2",), (16, 2, 8, 1)),
        (4, ("--parallelism.data_parallel_replicate_degree=2",), (32, 4, 8, 1)),
        (4, ("--parallelism.pipeline_parallel_degree=2",), (16, 2, 1, 8)),
        (4, ("--parallelism.pipeline_parallel_degree=2", "--training.global_batch_size=12",
             "--parallelism.pipeline_parallel_microbatch_size=2"), (12, 2, 2, 3)),
    ],
)  # fmt: skip
def test_batches(load, world_size: int, arguments: tuple[str, ...], expected: tuple[int, ...]) -> None:
    (stage,) = resolve(load("", *arguments), world_size)
    batch = (stage.global_batch_size, stage.data_ranks, stage.micro_batch_size, stage.micro_batches)
    assert batch == expected
    assert stage.data_ranks * stage.micro_batch_size * stage.micro_batches == stage.global_batch_size


def test_the_first_stage_decides_what_minus_one_means(load) -> None:
    text = STAGES + table("a", 0, "local_batch_size = 4") + table("b", 50, "local_batch_size = 2")
    assert [stage.global_batch_size for stage in resolve(load(text), 2)] == [8, 8]
    assert [stage.micro_batches for stage in resolve(load(text), 2)] == [1, 2]
    assert [stage.global_batch_size for stage in resolve(load(text), 2, global_batch_size=16)] == [16, 16]
    cfg = load(text, "--training.global_batch_size=32")
    assert [stage.global_batch_size for stage in resolve(cfg, 2, global_batch_size=16)] == [32, 32]


def test_tokens_per_step_are_shown_after_a_stages_lines(load) -> None:
    (stage,) = resolve(load("", "--training.global_batch_size=64"), 4)
    assert stage_notes(stage) == [
        "Tokens per step: 131,072 (64 rows = 4 data ranks x 2 micro-batches of 8)",
        "Attention: within documents, where positions restart (document_mask = true; older trainers have false)",
    ]
    assert plan_text((stage,)).splitlines()[-3:-1] == [f"  {note}" for note in stage_notes(stage)]
    (stage,) = resolve(load("", "--training.no-document_mask"))
    assert stage_notes(stage)[1] == "Attention: over whole rows (document_mask = false)"


def test_a_pipeline_says_where_it_makes_no_use_of_local_batch_size(load) -> None:
    """It has micro-batches of its own; local_batch_size only says what a global batch of -1 is."""

    def notes(text: str, *arguments: str) -> list[bool]:
        stages = resolve(load(text, "--parallelism.pipeline_parallel_degree=2", *arguments), 2)
        return [any("local_batch_size is not used by a pipeline" in note for note in stage.notes) for stage in stages]

    own, whole = table("a", 0) + table("b", 50, "local_batch_size = 4"), "--training.global_batch_size=8"
    assert notes(STAGES + table("a", 0, "local_batch_size = 4")) == [False]
    assert notes(STAGES + table("a", 0, "local_batch_size = 4"), whole) == [True]
    assert notes(STAGES + own) == [False, True]
    assert notes(STAGES, "--training.local_batch_size=4") == [False]
    assert notes(STAGES, "--training.local_batch_size=4", whole) == [True]
    assert notes(STAGES, whole) == [False]
