"""What the schema reads but megastage does not have, in one table: accepted at its default, an error otherwise.

Building such a part means deleting its line here. `filter_fqns` and the recipe names of the quantized parts are
not listed where the part itself is switched by another key: stock files set them without switching the part on.
"""

from __future__ import annotations

from megastage.config.errors import show
from megastage.config.fields import all_keys
from megastage.config.schema import Config

_FLOAT8 = "float8 training is not built"
_MX = "training in microscaling formats is not built"
_FT = "fault-tolerant replica groups are not built (torchrun --max-restarts resumes a run)"
_EXPERT = "mixture-of-experts models are not built"
_CUSTOM = "custom modules are not supported"
_MEMORY_BUDGET = "recomputation by memory budget is not built (use mode selective or full)"

# a path, or a whole table as "table.*" -> why it can only stand at its default
UNBUILT_KEYS: dict[str, str] = {
    "job.custom_config_module": _CUSTOM,
    "model.converters": "float8 and MX conversion are not built",
    "model.print_after_conversion": "model conversion is not built",
    "optimizer.early_step_in_backward": "stepping inside backward is not built",
    "training.enable_cpu_offload": "CPU offload is not built",
    "parallelism.enable_async_tensor_parallel": "asynchronous tensor parallelism is not built",
    "parallelism.enable_compiled_autograd": "compiled autograd is not built",
    "parallelism.pipeline_parallel_schedule_csv": "schedules from a file are not built (use 1F1B or GPipe)",
    "parallelism.pipeline_parallel_expert_parallel_overlap": _EXPERT,
    "parallelism.expert_parallel_degree": _EXPERT,
    "parallelism.expert_tensor_parallel_degree": _EXPERT,
    "parallelism.expert_parallel_comm_backend": _EXPERT,
    "checkpoint.enable_ft_dataloader_checkpoints": _FT,
    "checkpoint.initial_load_in_hf_quantized": "reading quantized weights is not built",
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": "recomputation by module name is not built",
    "activation_checkpoint.memory_budget": _MEMORY_BUDGET,
    "activation_checkpoint.visualize_memory_budget_pareto": _MEMORY_BUDGET,
    "float8.*": _FLOAT8,
    "mx.*": _MX,
    "quantize.*": "quantized training is not built",
    "fault_tolerance.*": _FT,
    "experimental.*": _CUSTOM,
    "memory_estimation.disable_fake_mode": "memory is estimated from shapes alone; no tensors are made",
    "debug.moe_force_load_balance": _EXPERT,
}

# Set in stock files beside `converters = []`, where they change nothing.
_INERT = ("float8.filter_fqns", "mx.filter_fqns", "quantize.linear.float8.filter_fqns")

# path -> values that the schema knows and megastage does not have
UNBUILT_CHOICES: dict[str, dict[str, str]] = {
    "optimizer.name": {"Adam": "only AdamW is built"},
    "activation_checkpoint.mode": {"memory_budget": _MEMORY_BUDGET},
    "comm.mode": dict.fromkeys(("fake_backend", "local_tensor"), "stand-ins for communication are not built"),
    "parallelism.context_parallel_load_balancer": {"ptrr": "only headtail is built"},
    "parallelism.context_parallel_rotate_method": {"alltoall": "only allgather is built"},
}


def unbuilt_problems(cfg: Config) -> list[str]:
    """One line for each setting of a part that megastage does not have."""
    problems: list[str] = []
    for path, info in all_keys().items():
        if ".N." in path or path in _INERT or not cfg.is_set(path):
            continue
        reason = UNBUILT_KEYS.get(path) or UNBUILT_KEYS.get(path.split(".")[0] + ".*")
        value = cfg.value(path)
        if reason and value != info.default:
            default = "unset" if info.default is None else show(info.default)
            problems.append(f"{path} = {show(value)}: {reason}; leave it at its default ({default})")
    for path, choices in UNBUILT_CHOICES.items():
        value = cfg.value(path)
        if value in choices:
            problems.append(f"{path} = {show(value)}: {choices[value]}")
    for index, stage in enumerate(cfg.training.data_stages):
        if stage.recompute_mode == "memory_budget":
            problems.append(f'training.data_stages[{index}].recompute_mode = "memory_budget": {_MEMORY_BUDGET}')
    return problems
