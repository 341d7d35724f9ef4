"""What the manager says while it looks for a checkpoint to resume from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megastage.checkpoint.manager import CheckpointManager


def test_a_checkpoint_of_the_model_alone_is_mentioned_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {"model.w": torch.ones(3), "optimizer.exp_avg.w": torch.zeros(3)}
    manager = CheckpointManager(tmp_path)
    manager.save(1, tensors, {"step": 1})
    manager.save(2, tensors, {"step": 2}, model_only=True)
    manager.close()
    with caplog.at_level("WARNING"):
        resumed = CheckpointManager(tmp_path)
        assert resumed.latest_good() == 1
        assert resumed.load_newest(tensors)[0] == 1
    assert [record.message for record in caplog.records if "model only" in record.message] == [
        "step-2 holds the model only: not a checkpoint to resume from"
    ]
