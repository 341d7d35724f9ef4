"""The optimizer over local shards: plain tensors, so that any fused implementation serves; DTensors for checkpoints."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from megastage.kernels.global_norm import sum_of_squares
from megastage.kernels.optimizer import adamw_
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

    parameters: checkpoint name -> parameter. implementation: "fused", "foreach", "for-loop" (torch) or "apex";
    `kernel` takes the place of "fused".
    As in the trainers whose configs are read unchanged, weight decay applies to every parameter.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, name: str, lr: float, betas: tuple[float, float], eps: float,
        weight_decay: float, implementation: str, kernel: Kernel | None = None,
    ) -> None:  # fmt: skip
        self.parameters = dict(parameters)
        with torch.no_grad():
            self.shards = {key: nn.Parameter(_local(p).detach()) for key, p in self.parameters.items()}
        nonempty = [shard for shard in self.shards.values() if shard.numel()]
        settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        if kernel is not None:
            self.engine: Any = KernelAdamW(self.shards, settings, kernel)
        else:
            self.engine = _engine(name, implementation, nonempty or [nn.Parameter(torch.zeros(1))], settings)
        self.steps = 0

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float, grad_scale: Tensor | None = None) -> None:
        """One update from the parameters' gradients times `grad_scale` (a scalar, see `clip_scale`); frees them."""
        for key, parameter in self.parameters.items():
            shard = self.shards[key]
            shard.data = _local(parameter)  # FSDP may have moved a padded shard since the last step
            shard.grad = None if parameter.grad is None else _local(parameter.grad).to(shard.dtype)
        for group in self.engine.param_groups:
            group["lr"], group["weight_decay"] = lr, weight_decay
        if isinstance(self.engine, KernelAdamW):
            self.engine.step(grad_scale)
        else:
            if grad_scale is not None:
                torch._foreach_mul_([s.grad for s in self.shards.values() if s.grad is not None], grad_scale)
            self.engine.step()
        self.steps += 1
        for key, parameter in self.parameters.items():
            parameter.grad = self.shards[key].grad = None

    def drop_gradients(self) -> None:
        """Free the parameters' gradients without an update."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def reset(self) -> None:
        """Forget the moments and the step count (a stage may ask for a fresh optimizer)."""
        self.engine.state.clear()
        self.set_steps(0)

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
            if "step" in state:
                state["step"] = torch.tensor(float(steps), device=state["step"].device)
        for group in self.engine.param_groups:
            if "step" in group:  # Apex and the kernel count per group
                group["step"] = steps

    def _step_device(self, shard: Tensor) -> torch.device:
        return shard.device if self.engine.param_groups[0].get("fused") else torch.device("cpu")


@dataclass(frozen=True)
class Kernel:
    """How `KernelAdamW` runs. backend: of megastage.kernels.optimizer. rounding: stochastically, of bf16 storage, with
    random numbers that are a function of the seed, the step and the group.

    group_of: parameter name -> which part of the model's parameters this rank's shard belongs to. Ranks that hold
    copies of a shard give it the same group, so that copies are rounded alike and stay equal.
    """

    backend: str
    stochastic: bool
    seed: int
    group_of: Callable[[str], str]


class KernelAdamW:
    """AdamW over lists of shards by megastage.kernels.optimizer, with the attributes of a torch optimizer used here."""

    def __init__(self, shards: Mapping[str, nn.Parameter], settings: dict[str, Any], kernel: Kernel) -> None:
        self.param_groups: list[dict[str, Any]] = [{**settings, "step": 0}]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)
        self.kernel = kernel
        self.groups: dict[str, list[nn.Parameter]] = defaultdict(list)
        for name, shard in shards.items():
            if shard.numel():
                self.groups[kernel.group_of(name)].append(shard)

    def step(self, grad_scale: Tensor | None) -> None:
        """Update every shard that has a gradient."""
        table = self.param_groups[0]
        table["step"] += 1
        for group, shards in self.groups.items():
            rows = [(shard.data, shard.grad, *self._moments(shard)) for shard in shards if shard.grad is not None]
            if not rows:
                continue
            adamw_(
                *(list(column) for column in zip(*rows)),
                step=table["step"],
                lr=table["lr"],
                betas=table["betas"],
                eps=table["eps"],
                weight_decay=table["weight_decay"],
                grad_scale=grad_scale,
                stochastic_rounding=self.kernel.stochastic,
                seed=zlib.crc32(f"{self.kernel.seed} {table['step']} {group}".encode()) % 2**31,
                backend=self.kernel.backend,
            )

    def _moments(self, shard: nn.Parameter) -> list[Tensor]:
        state = self.state[shard]
        if "exp_avg" not in state:
            state |= {moment: torch.zeros_like(shard.data) for moment in MOMENTS}
        return [state[moment] for moment in MOMENTS]


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
def gradient_norm(
    parameters: Mapping[str, nn.Parameter], mesh: Mesh, counted_elsewhere: frozenset[str], backend: str = "auto"
) -> Tensor:
    """The 2-norm of the gradients of the whole model, an fp32 scalar equal on every rank.

    counted_elsewhere: names whose gradient another pipeline part counts (a tied weight's second copy).
    """
    mine = [
        _local(parameter.grad)
        for key, parameter in parameters.items()
        if parameter.grad is not None
        and key not in counted_elsewhere
        and not (mesh.tp_rank and copies_on_tp(parameter))
    ]
    device = next(iter(parameters.values())).device
    total = sum_of_squares(mine, backend=backend).to(device, torch.float64)
    for name in ("shard", "tp", "pp"):
        dist.all_reduce(total, group=mesh.group(name))
    return total.sqrt().float()


def copies_on_tp(parameter: nn.Parameter) -> bool:
    """Whether every tensor-parallel rank holds the whole of what this rank holds."""
    if not isinstance(parameter, DTensor):
        return False
    names = parameter.device_mesh.mesh_dim_names or ()
    return isinstance(parameter.placements[names.index("tp")], Replicate)


def clip_scale(norm: Tensor, max_norm: float) -> Tensor | None:
    """What to multiply gradients with: min(1, max_norm / norm) (Pascanu et al. 2013); None for an infinite limit."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0) if math.isfinite(max_norm) else None
