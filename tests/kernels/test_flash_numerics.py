"""Both back ends of attention against dense float64 over a grid of shapes and masks, in fp32 and fp16."""

from __future__ import annotations

import pytest
import torch
from flash_cases import CASES, drawn_cases
from flash_oracle import DEVICE, Case, check
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


@settings(DRAWN, max_examples=40)
@given(drawn_cases())
def test_torch_any_shape(case: Case):
    for dtype in DTYPES:
        check(case, dtype, "torch")


@settings(DRAWN, max_examples=5)
@given(drawn_cases())
def test_triton_any_shape(case: Case):
    for dtype in DTYPES:
        check(case, dtype, "triton")


@pytest.mark.slow
@settings(DRAWN, max_examples=100, derandomize=False)
@given(drawn_cases())
def test_triton_many_shapes(case: Case):
    for dtype in DTYPES:
        check(case, dtype, "triton")
