"""Resolution of stages, the plan and transition blocks, look-up: against the documented texts and rules."""

from __future__ import annotations

import pytest
from quick_start import QUICK_START
from stage_texts import STAGES, resolve, table

from megastage.model.config import RopeScaling, RopeSpec
from megastage.stages import (
    Stage,
    changes,
    lookup,
    plan_text,
    transition_text,
)

# The block as documented, its elision written out by the same rules.
PLAN = """\
============================================================
DATA STAGE TRAINING PLAN
============================================================
Total stages: 3

Stage 1: general
  Steps: 0 -> 100,000 (100,000 steps)
  Estimated tokens: 409.60B tokens
  Dataset type: nanoset
  Dataset folders: 3 folders
  Weights: [0.800, 0.100, 0.100]
  Sequence length: 4096

Stage 2: reasoning
  Steps: 100,000 -> 130,000 (30,000 steps)
  Estimated tokens: 122.88B tokens
  Dataset type: nanoset
  Dataset folders: 3 folders
  Weights: [0.300, 0.350, 0.350]
  Sequence length: 4096

Stage 3: long_context
  Steps: 130,000 -> 150,000 (20,000 steps)
  Estimated tokens: 655.36B tokens
  Dataset type: nanoset
  Dataset folders: 3 folders
  Weights: [0.300, 0.350, 0.350]
  Sequence length: 32768
============================================================"""

TRANSITION = """\
============================================================
DATA STAGE TRANSITION
============================================================
Step 100000: 'general' -> 'reasoning'
Changes: dataset_weights
New weights: [0.300, 0.350, 0.350]
============================================================"""


QUICK_BATCH = ("--training.seq_len=4096", "--training.global_batch_size=1000")


def test_the_documented_plan(load) -> None:
    stages = resolve(load(QUICK_START, *QUICK_BATCH))
    assert plan_text(stages, lambda stage: []) == PLAN


def test_more_lines_follow_a_stages_own(load) -> None:
    stages = resolve(load(QUICK_START, *QUICK_BATCH))
    text = plan_text(stages, lambda stage: [f"Epochs: {stage.index}"])
    assert text == PLAN.replace("length: 4096\n\nStage 2", "length: 4096\n  Epochs: 0\n\nStage 2").replace(
        "length: 4096\n\nStage 3", "length: 4096\n  Epochs: 1\n\nStage 3"
    ).replace("length: 32768\n=", "length: 32768\n  Epochs: 2\n=")


def test_the_documented_transition(load) -> None:
    general, reasoning, long_context = resolve(load(QUICK_START, *QUICK_BATCH))
    assert transition_text(100_000, general, reasoning) == TRANSITION
    lines = transition_text(130_000, reasoning, long_context).splitlines()
    assert lines[3:6] == [
        "Step 130000: 'reasoning' -> 'long_context'",
        "Changes: seq_len",
        "New seq_len: 4096 -> 32768",
    ]


def test_a_transition_that_changes_nothing(load) -> None:
    text = '[training]\nsteps = 9\n[[training.data_stages]]\nname = "a"\nstart_step = 0\n'
    a, b = resolve(load(text + '[[training.data_stages]]\nname = "b"\nstart_step = 5\n'))
    assert transition_text(5, a, b).splitlines()[3:6] == ["Step 5: 'a' -> 'b'", "Changes: none", "=" * 60]


def test_changes_come_in_the_order_of_the_field_table(load) -> None:
    text = """
[training]
dataset_type = "nanoset"
dataset_folders = ["/a", "/b"]
steps = 100
[[training.data_stages]]
name = "a"
start_step = 0
[[training.data_stages]]
name = "b"
start_step = 10
weight_decay = 0.0
lr = 1e-4
document_mask = false
rope_theta = 2e6
global_batch_size = 4
local_batch_size = 2
seq_len = 4096
dataset_random_seed = 5
dataset_weights = [3, 1]
dataset_folders = ["/c", "/d"]
dataset_type = "packed_memmap"
recompute_mode = "full"
reset_optimizer = true
"""
    a, b = resolve(load(text))
    assert transition_text(10, a, b).splitlines()[4:-1] == [
        "Changes: dataset_type, dataset_folders, dataset_weights, dataset_random_seed, seq_len, local_batch_size, "
        "global_batch_size, rope_theta, document_mask, recompute_mode, recompute_option, lr, weight_decay, "
        "reset_optimizer",
        "New dataset_type: nanoset -> packed_memmap",
        'New dataset_folders: ["/c", "/d"]',
        "New weights: [0.750, 0.250]",
        "New dataset_random_seed: 1 -> 5",
        "New seq_len: 2048 -> 4096",
        "New local_batch_size: 8 -> 2",
        "New global_batch_size: 8 -> 4",
        "New rope_theta: 500000 -> 2000000",
        "New document_mask: true -> false",
        "New recompute_mode: selective -> full",
        "New recompute_option: 2 -> none",
        "New lr: 0.0001",
        "New weight_decay: 0",
        "New reset_optimizer: true",
    ]


def test_weights_are_shares(load) -> None:
    base = '[training]\ndataset_type = "nanoset"\ndataset_folders = ["/a", "/b", "/c"]\nsteps = 9\n'
    (stage,) = resolve(load(base + "dataset_weights = [8, 1, 1]\n"))
    assert stage.shares == (0.8, 0.1, 0.1)
    assert stage.dataset_weights == (8.0, 1.0, 1.0)
    assert any("sum to 10" in note for note in stage.notes)
    (stage,) = resolve(load(base + "dataset_weights = [0.3, 0.35, 0.35]\n"))
    assert stage.notes == ()
    (stage,) = resolve(load(base))
    assert "Weights: [0.333, 0.333, 0.333]" in plan_text((stage,))
    assert "  Note: no dataset_weights are set: equal shares" in plan_text((stage,))
    (stage,) = resolve(load(base + "dataset_weights = [1, 0, 0]\n"))
    assert stage.shares == (1.0, 0.0, 0.0)


def test_the_same_shares_written_otherwise_are_no_change(load) -> None:
    text = '[training]\ndataset_type = "nanoset"\ndataset_folders = ["/a", "/b"]\nsteps = 9\n'
    text += '[[training.data_stages]]\nname = "a"\nstart_step = 0\ndataset_weights = [0.3, 0.7]\n'
    text += '[[training.data_stages]]\nname = "b"\nstart_step = 5\ndataset_weights = [3, 7]\n'
    a, b = resolve(load(text))
    assert changes(a, b) == []


HUGGINGFACE_PLAN = """\
Stage 1: default
  Steps: 0 -> 10,000 (10,000 steps)
  Estimated tokens: 0.16B tokens
  Dataset type: huggingface
  Sequence length: 2048
  Dataset: c4_test
============================================================"""


def test_a_single_stage_run(load) -> None:
    stages = resolve(load(""))
    assert len(stages) == 1
    assert (stages[0].name, stages[0].start_step, stages[0].end_step) == ("default", 0, 10_000)
    assert plan_text(stages, lambda stage: []).endswith("Total stages: 1\n\n" + HUGGINGFACE_PLAN)
    assert plan_text(resolve(load("[training]\ndata_stages = []\n")), lambda stage: []).endswith(HUGGINGFACE_PLAN)


def test_lines_of_a_path_and_of_one_folder(load) -> None:
    text = '[training]\ndataset_type = "packed_memmap"\nsteps = 1\n'
    (stage,) = resolve(load(text + 'dataset_path = "/x"\n'))
    lines = plan_text((stage,), lambda stage: []).splitlines()[6:-1]
    assert lines == [
        "  Steps: 0 -> 1 (1 steps)", "  Estimated tokens: 0.00B tokens", "  Dataset type: packed_memmap",
        "  Sequence length: 2048", "  Dataset path: /x",
    ]  # fmt: skip
    assert stage.sources == ("/x",)
    (stage,) = resolve(load(text + 'dataset_folders = ["/x"]\n'))
    assert "  Dataset folders: 1 folders\n  Weights: [1.000]\n" in plan_text((stage,))


def spans(stages: tuple[Stage, ...]) -> list[tuple[str, int, int, bool]]:
    return [(stage.name, stage.start_step, stage.end_step, stage.never_runs) for stage in stages]


def test_stages_are_sorted_and_ends_filled_in(load) -> None:
    stages = resolve(load(STAGES + table("b", 40) + table("a", 0) + table("c", 60, "end_step = 100")))
    assert spans(stages) == [("a", 0, 40, False), ("b", 40, 60, False), ("c", 60, 100, False)]
    assert [stage.index for stage in stages] == [0, 1, 2]


def test_a_late_end_is_cut_with_a_note(load) -> None:
    (stage,) = resolve(load(STAGES + table("a", 0, "end_step = 500")))
    assert (stage.end_step, stage.declared_end_step) == (100, 500)
    assert stage.notes[0] == "end_step 500 is cut to training.steps = 100"


def test_a_short_run_shows_what_never_runs(load) -> None:
    stages = resolve(load(QUICK_START, *QUICK_BATCH, "--training.steps", "100000"))
    assert spans(stages)[1:] == [("reasoning", 100_000, 100_000, True), ("long_context", 130_000, 130_000, True)]
    text = plan_text(stages, lambda stage: [])
    assert "  Steps: 100,000 -> 130,000 (never runs)\n  Estimated tokens: 0.00B tokens\n" in text
    assert "  Steps: 130,000 -> end (never runs)\n" in text
    assert lookup(stages, 99_999).name == "general"
    assert lookup(stages, 100_000).name == "general"


def test_a_front_stage_fills_the_steps_before_the_first(load) -> None:
    stages = resolve(load(STAGES + table("late", 30, "seq_len = 64")))
    assert spans(stages) == [("default", 0, 30, False), ("late", 30, 100, False)]
    assert (stages[0].seq_len, stages[1].seq_len) == (2048, 64)
    assert spans(resolve(load(STAGES + table("late", 300)))) == [("default", 0, 100, False), ("late", 300, 300, True)]


def test_lookup_start_inclusive_end_exclusive(load) -> None:
    stages = resolve(load(QUICK_START))
    found = [lookup(stages, step).name for step in (0, 99_999, 100_000, 129_999, 130_000, 149_999, 150_000, 10**9)]
    assert found == ["general"] * 2 + ["reasoning"] * 2 + ["long_context"] * 4
    with pytest.raises(ValueError, match="step -1"):
        lookup(stages, -1)


@pytest.mark.parametrize("world_size", [1, 2])
def test_documented_patterns(load, world_size: int) -> None:
    mixture = STAGES.replace('["/a", "/b"]', '["/web", "/books", "/code"]').replace("100", "150000")
    a, b = resolve(
        load(
            mixture
            + table("pretrain", 0, "end_step = 100000", "dataset_weights = [0.7, 0.2, 0.1]")
            + table("annealing", 100000, "dataset_weights = [0.4, 0.3, 0.3]")
        ),
        world_size,
    )
    assert (a.dataset_weights, b.dataset_weights) == ((0.7, 0.2, 0.1), (0.4, 0.3, 0.3))
    assert (b.start_step, b.end_step) == (100_000, 150_000)
    a, b = resolve(
        load(mixture + table("base", 0, "end_step = 90000", "seq_len = 4096") + table("long", 90000, "seq_len = 32768"))
    )
    assert (a.seq_len, b.seq_len) == (4096, 32_768)
    assert any("8-fold (4,096 -> 32,768 tokens a row at an equal batch)" in note for note in b.notes)
    a, b = resolve(
        load(
            mixture
            + table("epoch1", 0, "end_step = 50000", "dataset_random_seed = 1234")
            + table("epoch2", 50000, "dataset_random_seed = 5678")
        )
    )
    assert (a.dataset_random_seed, b.dataset_random_seed) == (1234, 5678)
    assert [change.field for change in changes(a, b)] == ["dataset_random_seed"]


def test_seeds_inherit_from_training_then_from_the_run(load) -> None:
    text = STAGES + table("a", 0, "dataset_random_seed = 3") + table("b", 50)
    assert [stage.dataset_random_seed for stage in resolve(load(text), seed=42)] == [3, 42]
    cfg = load(text, "--training.dataset_random_seed", "7")
    assert [stage.dataset_random_seed for stage in resolve(cfg, seed=42)] == [3, 7]


def test_an_empty_list_inherits(load) -> None:
    weights = STAGES + "dataset_weights = [0.9, 0.1]\n"
    (stage,) = resolve(load(weights + table("a", 0, "dataset_folders = []", "dataset_weights = []")))
    assert stage.dataset_folders == ("/a", "/b")
    assert stage.dataset_weights == (0.9, 0.1)
    assert {"dataset_folders", "dataset_weights", "seq_len"} <= stage.inherited


def test_new_folders_with_inherited_weights_are_marked(load) -> None:
    weights = STAGES + "dataset_weights = [0.9, 0.1]\n"
    (stage,) = resolve(load(weights + table("a", 0, 'dataset_folders = ["/c", "/d"]')))
    assert "  Note: dataset_weights inherited from [training]" in plan_text((stage,))
    assert "dataset_weights" in stage.inherited
    assert "dataset_folders" not in stage.inherited


def test_inherited_keys_without_use_are_shown(load) -> None:
    text = STAGES + 'dataset = "c4"\ndataset_weights = [0.9, 0.1]\n'
    path, plain = resolve(load(text + table("a", 0, 'dataset_path = "/x"') + table("b", 50)))
    assert (path.dataset_path, path.dataset_folders, path.dataset_weights) == ("/x", (), (1.0,))
    assert (plain.dataset_path, plain.dataset_folders) == (None, ("/a", "/b"))
    assert path.dataset is None
    assert "training.dataset_folders is not used: the stage has a dataset_path" in path.notes
    assert "training.dataset_weights is not used: the stage reads one source" in path.notes
    assert 'training.dataset = "c4" is not used by dataset_type "nanoset"' in plain.notes


def test_base_with_path_and_folders_for_stages_of_several_types(load) -> None:
    text = STAGES + 'dataset_path = "/hub"\n'
    nanoset, other = resolve(load(text + table("a", 0) + table("b", 50, 'dataset_type = "preprocessed"')))
    assert (nanoset.dataset_path, nanoset.dataset_folders) == (None, ("/a", "/b"))
    assert (other.dataset_path, other.dataset_folders) == ("/hub", ())
    assert any("training.dataset_path is not used" in note for note in nanoset.notes)
    assert any("training.dataset_folders is not used" in note for note in other.notes)


def test_a_stage_that_names_a_dataset_reads_that(load) -> None:
    """Not the folders or the path that [training] has for another."""
    name = table("b", 50, 'dataset_type = "huggingface"', 'dataset = "c4_test"')
    _, named = resolve(load(STAGES + "dataset_weights = [0.9, 0.1]\n" + table("a", 0) + name))
    assert (named.dataset, named.dataset_path, named.dataset_folders) == ("c4_test", None, ())
    assert named.sources == ("c4_test",)
    assert "training.dataset_folders is not used: the stage names a dataset" in named.notes
    assert "training.dataset_weights is not used: the stage reads one source" in named.notes
    text = '[training]\ndataset = "c4"\ndataset_path = "/c4"\nsteps = 9\n'
    same, other = resolve(load(text + table("a", 0, 'dataset = "c4"') + table("b", 5, 'dataset = "pile"')))
    assert (same.dataset, same.dataset_path) == ("c4", "/c4")
    assert (other.dataset, other.dataset_path) == ("pile", None)
    assert "training.dataset_path is not used: the stage names a dataset" in other.notes


def test_folders_of_text_have_no_dataset_name(load) -> None:
    text = '[training]\ndataset_folders = ["/a"]\nsteps = 9\n'
    (stage,) = resolve(load(text))
    assert (stage.dataset, stage.sources, stage.notes) == (None, ("/a",), ())
    (stage,) = resolve(load(text + 'dataset = "c4"\n'))
    assert stage.notes == ('training.dataset = "c4" is not used: the stage reads dataset_folders',)


def test_rope_inherits_stage_training_model(load) -> None:
    scaling = '[training.data_stages.rope_scaling]\nkind = "yarn"\nfactor = 4\n'
    text = STAGES + table("a", 0) + table("b", 30, "rope_theta = 1e6") + table("c", 60) + scaling
    a, b, c = resolve(load(text))
    assert a.rope == RopeSpec(500_000.0)
    assert b.rope == RopeSpec(1e6)
    assert c.rope == RopeSpec(500_000.0, RopeScaling("yarn", 4.0))
    a, b, c = resolve(load(text, "--training.rope_theta", "1e4", "--model.rope_theta", "2e4"))
    assert [stage.rope.theta for stage in (a, b, c)] == [1e4, 1e6, 1e4]
    assert resolve(load(text, "--model.rope_theta", "2e4"))[0].rope.theta == 2e4
    base = '[model.rope_scaling]\nkind = "linear"\nfactor = 2.0\n'
    none = '[training.data_stages.rope_scaling]\nkind = "none"\n'
    a, b = resolve(load(base + STAGES + table("a", 0) + table("b", 50) + none))
    assert (a.rope.scaling, b.rope.scaling) == (RopeScaling("linear", 2.0), None)


def test_recomputation_inherits(load) -> None:
    text = (
        STAGES + table("a", 0) + table("b", 50, 'recompute_mode = "full"') + table("c", 70, 'recompute_option = "op"')
    )
    assert [stage.recompute for stage in resolve(load(text))] == [
        ("selective", "2"), ("full", "2"), ("selective", "op"),
    ]  # fmt: skip


def test_resolution_leaves_the_configuration_alone(load) -> None:
    cfg = load(QUICK_START)
    before = cfg.model_dump_json()
    resolve(cfg, 4)
    assert cfg.model_dump_json() == before
    assert cfg.training.global_batch_size == -1
