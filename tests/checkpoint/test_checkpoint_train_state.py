"""The train state as JSON: exact, and strict about what it reads."""

import json

import pytest

from megastage.checkpoint.train_state import TrainState


def example() -> TrainState:
    return TrainState(
        step=100_000, stage_idx=1, stage_name="reasoning", seed=2**63, global_batch_size=256,
        dataloader_state={"stages": [{"rows": 25_600_000, "order": {"kind": "lanes", "S": 1 << 20}}]},
        consumed_samples={"general": {"web": 20_480_000, "math": 5_120_000}},
        consumed_tokens={"general": {"web": 83_886_080_000, "math": 20_971_520_000}},
        optimizer={"step": 100_000, "groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.95)}]},
        stages=[{"name": "general"}], pinned={"model": {"dim": 64}}, layout={"world_size": 8, "tp": 2},
    )  # fmt: skip


def test_round_trip_through_json_text() -> None:
    state = example()
    text = json.dumps(state.to_json(), allow_nan=False)
    back = TrainState.from_json(json.loads(text))
    assert json.dumps(back.to_json()) == text
    assert back.optimizer["groups"][0]["lr"] == 0.1 + 0.2
    assert back.seed == 2**63


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("stage_name"), "missing field 'stage_name'"),
        (lambda d: d.update(colour=1), "unknown field 'colour'"),
        (lambda d: d.update(step="7"), "field 'step': int was expected, not '7'"),
        (lambda d: d.update(step=True), "field 'step': int was expected, not True"),
        (lambda d: d.update(layout={"tp": 1.5}), "field 'layout': tp: int was expected, not 1.5"),
        (lambda d: d.update(stages=[1]), "field 'stages': an object was expected, not 1"),
        (lambda d: d.update(stage_name=None), "field 'stage_name': str was expected"),
        (lambda d: d.update(dataloader_state=3), "field 'dataloader_state': an object was expected"),
        (lambda d: d.update(version=2), r"version 2 of megastage .* reads version 1"),
        (lambda d: d.pop("version"), r"version None"),
    ],
)
def test_a_state_that_is_not_one_is_refused(change, message: str) -> None:
    data = example().to_json()
    change(data)
    with pytest.raises(ValueError, match=message):
        TrainState.from_json(data)


def test_all_problems_come_at_once() -> None:
    data = example().to_json()
    del data["seed"]
    data["extra"] = 0
    with pytest.raises(ValueError, match=r"unknown field 'extra'; missing field 'seed'"):
        TrainState.from_json(data)
