"""What of a model and its optimizers is stored as tensors, under which keys, and the rest as JSON.

Keys: model.<name>, optimizer.exp_avg.<name>, optimizer.exp_avg_sq.<name>, with <name> the parameter's name in the whole
model (layers carry their global number), so that the keys are the same on every layout. A tied weight is one parameter
and has one key. Hyper-parameters and the update count are JSON: see `optimizer_settings`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

TORCH_ADAM = (torch.optim.Adam, torch.optim.AdamW)
MOMENTS = ("exp_avg", "exp_avg_sq")
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")  # torch.compile, recomputation, FSDP


def collect(model_parts: Sequence[nn.Module], optimizers: Sequence[Optimizer], *, strip: str = "") -> dict[str, Tensor]:
    """Live tensors of this rank, to save them or to load into them (in place, before or after the first step).

    AdamW's moments are made (zeros) where the optimizer has not taken a step yet. `strip` is a prefix to drop from
    every name ("decoder." when the decoder sits inside the trained module). FSDP units are resharded first: after a
    forward without backward the root would show its gathered parameters.

    Raises ValueError when two parts of this rank hold different tensors of one name, or a parameter's optimizer state
    is not that of Adam.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # by identity; a tied weight keeps its first name
    for name, tensor in _named_tensors(model_parts, strip):
        key = f"model.{name}"
        if id(tensor) in names:
            continue
        if key in tensors:
            raise ValueError(f"{key}: two model parts of this rank hold different tensors of this name; share one")
        tensors[key] = tensor
        names[id(tensor)] = name
    for optimizer in optimizers:
        for parameter in _trained(optimizer):
            if id(parameter) not in names:
                raise ValueError(f"the optimizer has a parameter of shape {tuple(parameter.shape)} that no part owns")
            name = names[id(parameter)]
            state = _materialised(optimizer, parameter, name)
            for moment in MOMENTS:
                tensors[f"optimizer.{moment}.{name}"] = state[moment]
    return tensors


def optimizer_settings(optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Update count and hyper-parameters of every group as JSON: {"step": n, "groups": [{"lr": ..., ...}, ...]}.

    Raises ValueError when parameters count different updates: a dense model has one count.
    """
    steps = {step for optimizer in optimizers for step in _steps(optimizer)}
    if len(steps) > 1:
        raise ValueError(f"optimizer: parameters have taken different numbers of updates: {sorted(steps)}")
    groups = [
        {k: _plain(v) for k, v in group.items() if k not in ("params", "step")}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    return {"step": steps.pop() if steps else 0, "groups": groups}


def restore_optimizer_step(optimizers: Sequence[Optimizer], step: int) -> None:
    """Set the update count that bias correction divides by; to be called after the moments were loaded."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if not isinstance(optimizer, TORCH_ADAM):  # Apex counts per group, from its first step on
                group.setdefault("step", 0)
                group["step"] = torch.full_like(group["step"], step) if isinstance(group["step"], Tensor) else step
        for parameter in _trained(optimizer):
            state = _materialised(optimizer, parameter, "")
            if isinstance(state.get("step"), Tensor):
                state["step"].fill_(step)
            elif "step" in state:
                state["step"] = step


def _named_tensors(model_parts: Sequence[nn.Module], strip: str) -> Iterator[tuple[str, Tensor]]:
    for part in model_parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for prefix, module in part.named_modules():
            for name, tensor in [*module.named_parameters(recurse=False), *_saved_buffers(module)]:
                full = f"{prefix}.{name}" if prefix else name
                for wrapper in WRAPPERS:
                    full = full.replace(wrapper, "")
                yield full.removeprefix(strip), tensor


def _saved_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    hidden = module._non_persistent_buffers_set
    return [(name, buffer) for name, buffer in module.named_buffers(recurse=False) if name not in hidden]


def _trained(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from (p for p in group["params"] if p.requires_grad)


def _materialised(optimizer: Optimizer, parameter: Tensor, name: str) -> dict[str, Any]:
    """The parameter's state as the optimizer itself would make it at its first step."""
    state = optimizer.state[parameter]
    if not state:
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        from_torch = isinstance(optimizer, TORCH_ADAM)
        if from_torch:
            on_device = group.get("capturable") or group.get("fused")
            device = parameter.device if on_device else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for moment in MOMENTS:
            dtype = None if from_torch else torch.float32  # Apex keeps its moments in fp32
            state[moment] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
    if missing := [moment for moment in MOMENTS if moment not in state]:
        raise ValueError(f"{name}: {type(optimizer).__name__} keeps no {' and '.join(missing)}: only Adam can be saved")
    return state


def _steps(optimizer: Optimizer) -> Iterator[int]:
    for group in optimizer.param_groups:
        if "step" in group:
            yield int(group["step"])
            continue
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state and "step" in state:
                yield int(state["step"])


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value
