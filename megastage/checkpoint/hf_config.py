"""config.json of Hugging Face Llama and Qwen3 models, to and from `ModelConfig` (pure Python)."""

from __future__ import annotations

from typing import Any

from megastage.model.config import ModelConfig, RopeScaling, RopeSpec

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_NAMES = {"llama": "llama3", "qwen3": "qwen3"}
_FIXED: dict[str, tuple[Any, ...]] = {  # settings of theirs that our decoder has at one value only
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
}


def hf_config(
    cfg: ModelConfig, max_positions: int, dtype: str, *, bos_id: int | None = None, eos_id: int | None = None
) -> dict[str, Any]:
    """config.json for `cfg`: Qwen3 when it has QK-norm, else Llama. RoPE is written as all releases read it."""
    kind = "qwen3" if cfg.qk_norm else "llama"
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": cfg.dim,
        "intermediate_size": cfg.ffn_dim,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "vocab_size": cfg.vocab_size,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied_embeddings,
        "max_position_embeddings": max_positions,
        "rope_theta": cfg.rope.theta,
        "rope_scaling": None if cfg.rope.scaling is None else _scaling_out(cfg.rope.scaling),
        "initializer_range": cfg.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "torch_dtype": dtype,
        "use_cache": True,
        **({"use_sliding_window": False} if kind == "qwen3" else {"mlp_bias": False}),
    }


def _scaling_out(scaling: RopeScaling) -> dict[str, Any]:
    out: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        out["original_max_position_embeddings"] = scaling.original_max_positions
    if scaling.kind == "llama3":
        out |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        out |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor is not None:
            out["attention_factor"] = scaling.attention_factor
    return out


def parse_hf_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """The `ModelConfig` of a config.json; `where` names the file in errors.

    Raises ValueError for another architecture, or a setting that our decoder does not have.
    """
    kind = raw.get("model_type")
    if kind not in _ARCHITECTURES:
        raise ValueError(f'{where}: model_type = {kind!r} is not supported: use "llama" or "qwen3"')
    for key, allowed in _FIXED.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{where}: {key} = {raw[key]!r} is not supported (only {allowed[0]!r})")
    if raw.get("quantization_config"):
        raise ValueError(f"{where}: quantized weights (quantization_config) are not read: use the bf16 release")
    other = set(raw.get("layer_types") or ()) - {"full_attention"}
    if other:
        raise ValueError(f"{where}: layer_types has {sorted(other)}, but only full_attention is supported")
    defaults = {"num_key_value_heads": raw.get("num_attention_heads"), "rms_norm_eps": 1e-6, "initializer_range": 0.02}
    raw = {**raw, **{key: value for key, value in defaults.items() if raw.get(key) is None}}
    n_heads = _count(raw, "num_attention_heads", where)
    if raw.get("head_dim") is None:
        raw["head_dim"] = 128 if kind == "qwen3" else _count(raw, "hidden_size", where) // n_heads
    return ModelConfig(
        name=_NAMES[kind],
        dim=_count(raw, "hidden_size", where),
        n_layers=_count(raw, "num_hidden_layers", where),
        n_heads=n_heads,
        n_kv_heads=_count(raw, "num_key_value_heads", where),
        head_dim=_count(raw, "head_dim", where),
        ffn_dim=_count(raw, "intermediate_size", where),
        vocab_size=_count(raw, "vocab_size", where),
        norm_eps=_number(raw, "rms_norm_eps", where),
        qk_norm=kind == "qwen3",
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        rope=_rope_in(raw, where),
        init_std=_number(raw, "initializer_range", where),
    )


def _number(raw: dict[str, Any], key: str, where: str) -> float:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: {key} = {value!r}, but a number is needed")
    return value


def _count(raw: dict[str, Any], key: str, where: str) -> int:
    value = _number(raw, key, where)
    if value != int(value) or value < 1:
        raise ValueError(f"{where}: {key} = {value!r}, but a positive integer is needed")
    return int(value)


def _rope_in(raw: dict[str, Any], where: str) -> RopeSpec:
    """RoPE in either form: `rope_theta` beside `rope_scaling`, or both in `rope_parameters`."""
    spec = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(spec.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    kind = spec.get("rope_type", spec.get("type", "default"))
    partial = spec.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ValueError(f"{where}: partial_rotary_factor = {partial} is not supported (only 1.0)")
    if kind == "default":
        return RopeSpec(theta)
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(f'{where}: rope_type = {kind!r} is not supported: use "default", "linear", "llama3" or "yarn"')
    for key in ("mscale", "mscale_all_dim"):
        if spec.get(key):
            raise ValueError(f"{where}: rope {key} = {spec[key]} is not supported: give attention_factor instead")
    if not spec.get("truncate", True):
        raise ValueError(f"{where}: rope truncate = false is not supported")
    at = f"{where}, RoPE settings"
    llama3 = kind == "llama3"
    factor = spec.get("attention_factor")
    original = spec.get("original_max_position_embeddings") or raw.get("max_position_embeddings")
    return RopeSpec(
        theta,
        RopeScaling(
            kind,
            _number(spec, "factor", at),
            original_max_positions=original or RopeScaling.original_max_positions,
            low_freq_factor=_number(spec, "low_freq_factor", at) if llama3 else RopeScaling.low_freq_factor,
            high_freq_factor=_number(spec, "high_freq_factor", at) if llama3 else RopeScaling.high_freq_factor,
            beta_fast=float(spec.get("beta_fast") or 32),
            beta_slow=float(spec.get("beta_slow") or 1),
            attention_factor=None if factor is None else float(factor),
        ),
    )
