"""The optimizer over local shards: plain tensors, so that any fused implementation serves; DTensors for checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from megastage.parallel.mesh import Mesh

MOMENTS = ("exp_avg", "exp_avg_sq")


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(local: Tensor, parameter: Tensor) -> Tensor:
    """A state tensor with the sharding of its parameter."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


class Optimizer:
    """Adam or AdamW (Loshchilov & Hutter 2019) over this rank's shards of `parameters`.

    parameters: checkpoint name -> parameter. implementation: "fused", "foreach", "for-loop" (torch) or "apex".
    As in the trainers whose configs are read unchanged, weight decay applies to every parameter.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, name: str, lr: float, betas: tuple[float, float], eps: float,
        weight_decay: float, implementation: str,
    ) -> None:  # fmt: skip
        self.parameters = dict(parameters)
        with torch.no_grad():
            self.shards = {key: nn.Parameter(_local(p).detach()) for key, p in self.parameters.items()}
        nonempty = [shard for shard in self.shards.values() if shard.numel()]
        settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.engine = _engine(name, implementation, nonempty or [nn.Parameter(torch.zeros(1))], settings)
        self.steps = 0

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float) -> None:
        """One update from the parameters' gradients, which are freed."""
        for key, parameter in self.parameters.items():
            shard = self.shards[key]
            shard.data = _local(parameter)  # FSDP may have moved a padded shard since the last step
            shard.grad = None if parameter.grad is None else _local(parameter.grad).to(shard.dtype)
        for group in self.engine.param_groups:
            group["lr"], group["weight_decay"] = lr, weight_decay
        self.engine.step()
        self.steps += 1
        for key, parameter in self.parameters.items():
            parameter.grad = self.shards[key].grad = None

    def reset(self) -> None:
        """Forget the moments and the step count (a stage may ask for a fresh optimizer)."""
        self.engine.state.clear()
        self.steps = 0

    @torch.no_grad()
    def state_tensors(self) -> dict[str, Tensor]:
        """`optimizer.<moment>.<parameter>` -> tensor sharded as the parameter, sharing memory with the state.

        Before the first step the state is made of zeros, so that a checkpoint can be loaded into it.
        """
        tensors: dict[str, Tensor] = {}
        for key, parameter in self.parameters.items():
            shard = self.shards[key]
            state = self.engine.state[shard] if shard.numel() else {m: torch.zeros_like(shard.data) for m in MOMENTS}
            if "exp_avg" not in state:
                state |= {m: torch.zeros_like(shard.data) for m in MOMENTS}
                state["step"] = torch.tensor(float(self.steps), device=self._step_device(shard))
            tensors |= {f"optimizer.{m}.{key}": _like(state[m], parameter) for m in MOMENTS}
        return tensors

    def set_steps(self, steps: int) -> None:
        """Set the number of updates done, which Adam's bias correction needs; call after loading `state_tensors`."""
        self.steps = steps
        for state in self.engine.state.values():
            state["step"] = torch.tensor(float(steps), device=state["step"].device)
        for group in self.engine.param_groups:
            if "step" in group:  # Apex counts per group
                group["step"] = steps

    def _step_device(self, shard: Tensor) -> torch.device:
        return shard.device if self.engine.param_groups[0].get("fused") else torch.device("cpu")


def _engine(name: str, implementation: str, shards: list[nn.Parameter], settings: dict[str, Any]) -> Any:
    if implementation == "apex":
        try:
            from apex.optimizers import FusedAdam  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise ValueError(
                'optimizer.implementation = "apex" needs NVIDIA Apex built from source with its CUDA extensions '
                f'(the PyPI package named apex is something else): {error}; or use implementation = "fused"'
            ) from error
        return FusedAdam(shards, adam_w_mode=name == "AdamW", **settings)
    kinds = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}
    flags = {"fused": implementation == "fused", "foreach": implementation == "foreach"}
    return kinds[name](shards, **settings, **flags)


@torch.no_grad()
def gradient_norm(parameters: Mapping[str, nn.Parameter], mesh: Mesh, counted_elsewhere: frozenset[str]) -> Tensor:
    """The 2-norm of the gradients of the whole model, an fp32 scalar equal on every rank.

    counted_elsewhere: names whose gradient another pipeline part counts (a tied weight's second copy).
    """
    total: Tensor | None = None
    for key, parameter in parameters.items():
        if parameter.grad is None or key in counted_elsewhere:
            continue
        square = _local(parameter.grad).float().square().sum(dtype=torch.float64)
        if _copies_on_tp(parameter) and mesh.tp_rank:
            square = square * 0
        total = square if total is None else total + square
    device = next(iter(parameters.values())).device
    total = torch.zeros((), dtype=torch.float64, device=device) if total is None else total
    for name in ("shard", "tp", "pp"):
        dist.all_reduce(total, group=mesh.group(name))
    return total.sqrt().float()


def _copies_on_tp(parameter: nn.Parameter) -> bool:
    """Whether every tensor-parallel rank holds the whole of what this rank holds."""
    if not isinstance(parameter, DTensor):
        return False
    names = parameter.device_mesh.mesh_dim_names or ()
    return isinstance(parameter.placements[names.index("tp")], Replicate)


@torch.no_grad()
def clip_gradients(parameters: Mapping[str, nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients by min(1, max_norm / norm) (Pascanu et al. 2013); max_norm 0 leaves them alone."""
    if max_norm > 0 and math.isfinite(max_norm):
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        grads = [_local(p.grad) for p in parameters.values() if p.grad is not None]
        torch._foreach_mul_(grads, scale)
