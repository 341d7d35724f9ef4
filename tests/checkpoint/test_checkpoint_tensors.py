"""What is collected of a model and its optimizers, and that a run resumed from it goes on bit for bit."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from megastage.checkpoint.manager import CheckpointManager
from megastage.checkpoint.tensors import collect, optimizer_settings, restore_optimizer_step


class Tied(nn.Module):
    """An embedding whose weight is the head's too, a persistent and a computed buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.inner = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("table", torch.ones(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.embed(x)))


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.roll(1, 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def fresh(seed: int, **options: object) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    return model, AdamW(model.parameters(), lr=1e-2, **options)


class ApexLike(Optimizer):
    """The state layout of Apex's FusedAdam: fp32 moments, one step count in each group."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p.float()), torch.zeros_like(p.float())
                state["exp_avg"].lerp_(p.grad, 0.1)
                state["exp_avg_sq"].lerp_(p.grad**2, 0.05)
                scale = 1 - 0.9 ** group["step"]
                p -= group["lr"] * state["exp_avg"] / scale / (state["exp_avg_sq"].sqrt() + group["eps"])


def test_keys() -> None:
    model, optimizer = fresh(0)
    assert sorted(collect([model], [optimizer])) == [
        "model.embed.weight", "model.inner.weight", "model.kept",
        "optimizer.exp_avg.embed.weight", "optimizer.exp_avg.inner.weight",
        "optimizer.exp_avg_sq.embed.weight", "optimizer.exp_avg_sq.inner.weight",
    ]  # fmt: skip
    outer = nn.Module()
    outer.decoder = torch.compile(model, backend="eager")
    assert collect([outer], [optimizer], strip="decoder.").keys() == collect([model], [optimizer]).keys()


def test_the_tensors_are_the_live_ones() -> None:
    model, optimizer = fresh(0)
    tensors = collect([model], [optimizer])
    train(model, optimizer, range(1))
    assert tensors["model.inner.weight"] is model.inner.weight
    assert tensors["optimizer.exp_avg.inner.weight"].abs().sum() > 0


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"apex": True}])
def test_resume_is_bit_exact_into_a_fresh_process_state(tmp_path: Path, options: dict) -> None:
    def make(seed: int) -> tuple[nn.Module, Optimizer]:
        if not options.get("apex"):
            return fresh(seed, **options)
        torch.manual_seed(seed)
        model = Tied()
        return model, ApexLike(model.parameters())

    model, optimizer = make(1)
    straight = train(model, optimizer, range(8))
    model, optimizer = make(1)
    first = train(model, optimizer, range(4))
    manager = CheckpointManager(tmp_path)
    manager.save(4, collect([model], [optimizer]), {"optimizer": optimizer_settings([optimizer])})
    model, optimizer = make(2)
    state = manager.load(4, collect([model], [optimizer]))
    restore_optimizer_step([optimizer], state["optimizer"]["step"])
    assert state["optimizer"]["step"] == 4
    assert first + train(model, optimizer, range(4, 8)) == straight


def test_materialised_state_is_what_the_first_step_would_make() -> None:
    """Collecting before the first step changes nothing of the steps after it."""
    for options in ({}, {"fused": True}, {"capturable": False, "foreach": False}):
        a, b = fresh(3, **options), fresh(3, **options)
        collect([b[0]], [b[1]])
        assert optimizer_settings([b[1]])["step"] == 0
        assert train(*a, range(3)) == train(*b, range(3))
        for p, q in zip(a[0].parameters(), b[0].parameters()):
            for key, value in a[1].state[p].items():
                other = b[1].state[q][key]
                assert torch.equal(value, other), key
                assert value.dtype == other.dtype, key


def test_settings_are_json_and_one_count() -> None:
    model, optimizer = fresh(0)
    train(model, optimizer, range(3))
    settings = optimizer_settings([optimizer])
    assert settings["step"] == 3
    assert settings["groups"][0]["lr"] == 1e-2
    assert settings["groups"][0]["betas"] == [0.9, 0.999]
    assert "params" not in settings["groups"][0]
    optimizer.state[model.inner.weight]["step"].fill_(2)
    with pytest.raises(ValueError, match=r"different numbers of updates: \[2, 3\]"):
        optimizer_settings([optimizer])


def test_frozen_parameters_have_no_moments() -> None:
    model, _ = fresh(0)
    model.inner.weight.requires_grad_(False)
    tensors = collect([model], [AdamW(model.parameters())])
    assert "model.inner.weight" in tensors
    assert "optimizer.exp_avg.inner.weight" not in tensors


def test_errors_name_the_key() -> None:
    model, optimizer = fresh(0)
    with pytest.raises(ValueError, match=r"model.kept: two model parts of this rank"):
        collect([model, copy.deepcopy(model)], [])
    with pytest.raises(ValueError, match=r"shape \(11, 4\) that no part owns"):
        collect([nn.Linear(2, 2)], [optimizer])
    sgd = SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, sgd, range(1))
    with pytest.raises(ValueError, match=r"embed.weight: SGD keeps no exp_avg and exp_avg_sq"):
        collect([model], [sgd])
