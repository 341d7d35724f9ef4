"""Learning rate and weight decay, against figures worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megastage.config.layout import resolve_layout
from megastage.config.load import load_config
from megastage.schedule import Schedule
from megastage.stages import resolve_stages


@pytest.fixture
def schedule(tmp_path: Path):
    def schedule(text: str, *arguments: str) -> Schedule:
        file = tmp_path / "c.toml"
        file.write_text(text)
        cfg = load_config(["--config", str(file), *arguments])
        return Schedule(cfg, resolve_stages(cfg, resolve_layout(cfg, 1), seed=1))

    return schedule


RUN = "[optimizer]\nlr = 1.0\n[training]\nsteps = 10\n[lr_scheduler]\nwarmup_steps = 2\n"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        # decays over the 8 steps after warm-up, the last update one eighth above the floor
        ("", [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("min_lr_factor = 0.2\n", [0.5, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]),
        ("decay_ratio = 0.4\n", [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ("decay_ratio = 0.0\n", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("decay_ratio = 1.0\n", [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ('decay_ratio = 0.4\ndecay_type = "sqrt"\n', [
            0.5, 1, 1, 1, 1, 1, 1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)]),
        ('decay_ratio = 0.4\ndecay_type = "cosine"\n', [
            0.5, 1, 1, 1, 1, 1, 1, 0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4]),
        ("total_steps = 18\n", [0.5, 1, 1, 15 / 16, 14 / 16, 13 / 16, 12 / 16, 11 / 16, 10 / 16, 9 / 16]),
    ],
)  # fmt: skip
def test_warmup_stable_decay(schedule, more: str, expected: list[float]) -> None:
    made = schedule(RUN + more)
    assert [made.lr(step) for step in range(10)] == pytest.approx(expected, abs=1e-12)


def test_the_defaults(schedule) -> None:
    made = schedule("")
    assert made.lr(0) == pytest.approx(8e-4 / 200)
    assert made.lr(199) == pytest.approx(8e-4)
    assert made.lr(200) == pytest.approx(8e-4)
    assert made.lr(9_999) == pytest.approx(8e-4 / 9_800)
    assert made.weight_decay(0) == made.weight_decay(9_999) == 0.1


def test_warmup_longer_than_the_run(schedule) -> None:
    made = schedule("[optimizer]\nlr = 1.0\n[training]\nsteps = 4\n")
    assert [made.lr(step) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_no_warmup(schedule) -> None:
    made = schedule("[optimizer]\nlr = 1.0\n[training]\nsteps = 4\n[lr_scheduler]\nwarmup_steps = 0\n")
    assert [made.lr(step) for step in range(4)] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def staged(*stages: str, decay: str = "decay_ratio = 0.0\n") -> str:
    tables = "".join(f'[[training.data_stages]]\nname = "s{index}"\n{stage}\n' for index, stage in enumerate(stages))
    return "[optimizer]\nlr = 1.0\n[training]\nsteps = 20\n" + tables + "[lr_scheduler]\nwarmup_steps = 2\n" + decay


def test_silent_stages_touch_nothing(schedule) -> None:
    for decay in ("", "decay_ratio = 0.5\n"):
        plain, cut = schedule(staged("start_step = 0", decay=decay)), schedule(
            staged("start_step = 0", "start_step = 7", "start_step = 13", decay=decay)
        )  # fmt: skip
        assert [plain.lr(step) for step in range(20)] == [cut.lr(step) for step in range(20)]
        assert {cut.weight_decay(step) for step in range(20)} == {0.1}


def test_a_new_level_holds_until_a_later_stage_says_otherwise(schedule) -> None:
    made = schedule(
        staged("start_step = 0", "start_step = 5\nlr = 0.5", "start_step = 10", "start_step = 15\nlr = 0.1")
    )
    assert [made.lr(step) for step in (4, 5, 9, 10, 14, 15, 19)] == [1.0, 0.5, 0.5, 0.5, 0.5, 0.1, 0.1]


def test_a_decay_reaches_its_end_at_the_last_update_and_stays(schedule) -> None:
    made = schedule(staged("start_step = 0", "start_step = 10\nend_step = 14\nlr_end = 0.2", "start_step = 14"))
    expected = [1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2]
    assert [made.lr(step) for step in (9, 10, 11, 12, 13, 14, 19)] == pytest.approx(expected)


def test_level_and_decay_and_warmup(schedule) -> None:
    stage = 'start_step = 10\nlr = 0.5\nlr_warmup_steps = 2\nlr_end = 0.1\nlr_decay_type = "cosine"'
    made = schedule(staged("start_step = 0", stage))
    middle = 0.1 + 0.4 * 0.5
    assert [made.lr(step) for step in (9, 10, 11)] == pytest.approx([1.0, 0.75, 0.5])
    assert made.lr(15) == pytest.approx(middle)
    assert made.lr(19) == pytest.approx(0.1)


def test_warmup_starts_from_zero_with_a_fresh_optimizer(schedule) -> None:
    made = schedule(staged("start_step = 0", "start_step = 10\nlr = 0.5\nlr_warmup_steps = 5\nreset_optimizer = true"))
    assert [made.lr(step) for step in range(9, 16)] == pytest.approx([1.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5])


def test_the_first_stage_may_have_its_own(schedule) -> None:
    made = schedule(staged("start_step = 0\nlr = 2.0\nlr_warmup_steps = 4\nlr_end = 0.0", "start_step = 12"))
    assert [made.lr(step) for step in (0, 3, 7, 11, 12)] == pytest.approx([0.5, 2.0, 1.0, 0.0, 0.0])
    made = schedule(staged("start_step = 0\nlr_end = 0.5", "start_step = 10"))
    assert [made.lr(step) for step in (0, 9, 10)] == pytest.approx([0.95, 0.5, 0.5])


def test_decay_after_the_runs_own_decay_has_begun(schedule) -> None:
    """lr_end alone goes on from the learning rate of the update before."""
    made = schedule(staged("start_step = 0", "start_step = 15\nlr_end = 0.0", decay="decay_ratio = 0.5\n"))
    before = 1 - 4 / 10
    assert made.lr(14) == pytest.approx(before)
    assert made.lr(15) == pytest.approx(before * 0.8)
    assert made.lr(19) == pytest.approx(0.0)


def test_a_run_cut_short_keeps_its_shape_under_total_steps(schedule) -> None:
    text = staged("start_step = 0", "start_step = 10\nlr = 1.0\nlr_end = 0.0") + "total_steps = 20\n"
    whole, short = schedule(text), schedule(text, "--training.steps=15")
    assert [whole.lr(step) for step in range(15)] == [short.lr(step) for step in range(15)]
    bounded = text.replace("start_step = 10\n", "start_step = 10\nend_step = 20\n")
    short = schedule(bounded, "--training.steps=15")
    assert [whole.lr(step) for step in range(15)] == [short.lr(step) for step in range(15)]
    without = schedule(text.replace("total_steps = 20\n", ""), "--training.steps=15")
    assert without.lr(14) == pytest.approx(0.0)


def test_stages_that_never_run_say_nothing(schedule) -> None:
    made = schedule(staged("start_step = 0", "start_step = 30\nlr = 9.0\nweight_decay = 9.0"))
    assert max(made.lr(step) for step in range(40)) == 1.0
    assert made.weight_decay(35) == 0.1


def test_weight_decay_holds(schedule) -> None:
    made = schedule(staged("start_step = 0", "start_step = 5\nweight_decay = 0.0", "start_step = 9"))
    assert [made.weight_decay(step) for step in (0, 4, 5, 9, 19)] == [0.1, 0.1, 0.0, 0.0, 0.0]
