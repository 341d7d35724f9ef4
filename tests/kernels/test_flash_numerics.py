"""Both back ends of attention against dense float64 over a grid of shapes and masks, in fp32 and fp16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from error_bound import assert_as_good, joined
from flash_cases import CASES, drawn_cases
from flash_oracle import DEVICE, Case, check, held_ways
from hypothesis import HealthCheck, Phase, given, settings

if DEVICE == "cpu":
    pytestmark = pytest.mark.usefixtures("guard")
DTYPES = (torch.float32, torch.float16)
DRAWN = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.generate],  # shrinking in the interpreter takes minutes
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_torch(name, dtype):
    check(CASES[name], dtype, "torch")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_triton(name, dtype):
    check(CASES[name], dtype, "triton")


@pytest.mark.parametrize("name", ["prime", "documents", "documents, slice of queries", "everything"])
def test_torch_bf16(name):
    check(CASES[name], torch.bfloat16, "torch")


def hold(case: Case, backend: str, draws: int):
    for dtype in DTYPES:
        cases = (replace(case, seed=case.seed + 10 * i) for i in range(draws))
        assert_as_good(*joined(held_ways(one, dtype, backend) for one in cases))


@settings(DRAWN, max_examples=40)
@given(drawn_cases())
def test_torch_any_shape(case: Case):
    hold(case, "torch", 6)


@settings(DRAWN, max_examples=5)
@given(drawn_cases())
def test_triton_any_shape(case: Case):
    hold(case, "triton", 6)


@pytest.mark.slow
@settings(DRAWN, max_examples=20)
@given(drawn_cases())
def test_triton_many_shapes(case: Case):
    hold(case, "triton", 6)
