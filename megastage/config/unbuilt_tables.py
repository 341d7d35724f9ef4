"""Tables of parts that megastage does not have. They are read so that existing files load at their defaults."""

from __future__ import annotations

from typing import Any

from megastage.config.keys import FiniteFloat, Section, Strings, key


class Float8(Section):
    """Float8 training, first generation of key names."""

    enable_fsdp_float8_all_gather: bool = key(False, "Gather parameters in float8")
    precompute_float8_dynamic_scale_for_fsdp: bool = key(False, "One reduction for all scales")
    force_recompute_fp8_weight_in_bwd: bool = key(False, "Cast weights again in backward")
    recipe_name: str | None = key(None, "Float8 recipe")
    filter_fqns: Strings = key((), "Modules left alone")
    emulate: bool = key(False, "Emulate float8")


class Mx(Section):
    """Microscaling formats, first generation of key names."""

    use_fp8_dim1_cast_triton_kernel: bool = key(True, "Cast by a Triton kernel")
    recipe_name: str = key("mxfp8", "MX recipe")
    filter_fqns: Strings = key(("output",), "Modules left alone")


class LinearFloat8(Section):
    """Float8 linear layers, second generation of key names."""

    enable_fsdp_float8_all_gather: bool = key(False, "Gather parameters in float8")
    precompute_float8_dynamic_scale_for_fsdp: bool = key(False, "One reduction for all scales")
    recipe_name: str | None = key(None, "Float8 recipe")
    filter_fqns: Strings = key((), "Modules left alone")
    emulate: bool = key(False, "Emulate float8")


class LinearQuantize(Section):
    """Quantized linear layers."""

    float8: LinearFloat8 = key(LinearFloat8(), "Float8")
    mx: dict[str, Any] = key({}, "Microscaling formats")


class Quantize(Section):
    """Quantized training, second generation of key names."""

    linear: LinearQuantize = key(LinearQuantize(), "Linear layers")
    grouped_mm: dict[str, Any] = key({}, "Grouped matrix products")


class FaultTolerance(Section):
    """Replica groups that come and go. (Restarting after a fault is torchrun's --max-restarts.)"""

    enable: bool = key(False, "Fault-tolerant replica groups")
    process_group: str = key("gloo", "Back end between groups")
    process_group_timeout_ms: int = key(10_000, "Its timeout in milliseconds")
    replica_id: int = key(0, "This group's number")
    group_size: int = key(0, "Number of groups")
    min_replica_size: int = key(1, "Groups needed to go on")
    semi_sync_method: str | None = key(None, "Semi-synchronous method")
    sync_steps: int = key(5, "Steps between synchronizations")
    should_quantize: bool = key(False, "Quantize what is exchanged")
    fragment_sync_delay: int = key(0, "Steps between a fragment's send and use")
    fragment_update_alpha: FiniteFloat = key(0.0, "Share of the local value kept")


class Experimental(Section):
    """Extension points."""

    custom_import: str = key("", "Python module to import first")
    custom_args_module: str = key("", "Python module that extends the configuration")
