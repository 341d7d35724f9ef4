"""RoPE tables against transformers' frequencies for released settings, and against exact angles far out."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megastage.model.config import RopeScaling, RopeSpec
from megastage.model.rope import attention_factor, inverse_frequencies, rope_table

RELEASED = [
    (128, 500_000.0, RopeScaling("llama3", 8.0)),  # Llama 3.1
    (64, 500_000.0, RopeScaling("llama3", 32.0)),  # Llama 3.2 1B
    (128, 1_000_000.0, RopeScaling("yarn", 4.0, 32_768)),  # Qwen3 at 131,072
    (64, 10_000.0, RopeScaling("yarn", 40.0, 4096, attention_factor=1.0)),
    (128, 50_000.0, RopeScaling("linear", 2.5)),
]


@pytest.mark.parametrize(("head_dim", "theta", "scaling"), RELEASED)
def test_frequencies_equal_transformers(head_dim: int, theta: float, scaling: RopeScaling) -> None:
    parameters = {"rope_type": scaling.kind, "rope_theta": theta, "factor": scaling.factor}
    if scaling.kind != "linear":
        parameters["original_max_position_embeddings"] = scaling.original_max_positions
    if scaling.kind == "llama3":
        parameters |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.attention_factor is not None:
        parameters["attention_factor"] = scaling.attention_factor
    config = LlamaConfig(
        hidden_size=head_dim * 2, num_attention_heads=2, rope_parameters=parameters, max_position_embeddings=131_072
    )
    expected, factor = ROPE_INIT_FUNCTIONS[scaling.kind](config)
    spec = RopeSpec(theta, scaling)
    torch.testing.assert_close(inverse_frequencies(head_dim, spec).float(), expected, rtol=2e-6, atol=0)
    assert attention_factor(spec) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("theta", [10_000.0, 5_000_000.0])
def test_far_positions_are_exact_to_fp32(theta: float) -> None:
    cos, sin = rope_table(64, RopeSpec(theta), 131_072)
    assert cos.shape == sin.shape == (131_072, 32)
    assert cos.dtype == torch.float32
    for position in (0, 1, 4095, 32_767, 131_071):
        for pair in (0, 1, 9, 31):
            angle = position * theta ** (-2 * pair / 64)
            assert cos[position, pair].item() == pytest.approx(math.cos(angle), abs=1e-7)
            assert sin[position, pair].item() == pytest.approx(math.sin(angle), abs=1e-7)


def test_yarn_multiplies_the_table() -> None:
    spec = RopeSpec(10_000.0, RopeScaling("yarn", 16.0, 2048))
    cos, sin = rope_table(32, spec, 100)
    norm = (cos.double().square() + sin.double().square()).sqrt()
    torch.testing.assert_close(norm, torch.full_like(norm, 0.1 * math.log(16) + 1), rtol=1e-6, atol=0)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="head_dim = 15"):
        inverse_frequencies(15, RopeSpec())
    with pytest.raises(ValueError, match='rope scaling kind "ntk"'):
        inverse_frequencies(16, RopeSpec(scaling=RopeScaling("ntk", 2.0)))
