"""The sanitizer itself: it must see what it is there to see."""

import ast
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from flash_cases import CASES
from flash_oracle import check
from memory_guard import only_program, virtual
from numeric_cases import (
    adamw_case,
    add_norm_case,
    cross_entropy_case,
    global_norm_case,
    rope_case,
    swiglu_case,
    three_ways,
)

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


@triton.jit
def shift_kernel(x_ptr, out_ptr, N, LOAD: tl.constexpr, STORE: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lane + LOAD, lane < N, 0.0)
    tl.store(out_ptr + lane + STORE, x, lane < N)


@triton.jit
def far_row_kernel(x_ptr, out_ptr, stride, row, WIDE: tl.constexpr):
    if WIDE:
        tl.store(out_ptr, tl.load(x_ptr + row.to(tl.int64) * stride))
    else:
        tl.store(out_ptr, tl.load(x_ptr + row * stride))


def test_exact_access_passes(guard):
    x, out = torch.randn(13), torch.zeros(13)
    shift_kernel[(1,)](x, out, 13, LOAD=0, STORE=0, BLOCK=16)
    assert torch.equal(x, out)
    assert guard.launches == 1


@pytest.mark.parametrize(("load", "store"), [(1, 0), (-1, 0), (0, 1), (0, -1)])
def test_one_element_outside_is_caught(guard, load, store):
    # the buffers are larger than the views, so nothing but the guard could notice
    x, out = torch.randn(40)[10:23], torch.zeros(40)[10:23]
    with pytest.raises(Exception, match="addresses outside"):
        shift_kernel[(1,)](x, out, 13, LOAD=load, STORE=store, BLOCK=16)


def test_index_overflow_is_caught(guard):
    stride, rows = 2**30 + 16, 4
    x, out = virtual(stride * rows, torch.float16).as_strided((rows, 1), (stride, 1)), torch.zeros(1).half()
    x[3, 0] = 7
    far_row_kernel[(1,)](x, out, stride, 3, WIDE=True)
    assert out.item() == 7
    with pytest.raises(Exception, match="addresses outside"):
        far_row_kernel[(1,)](x, out, stride, 3, WIDE=False)


def test_only_program_runs_the_one_asked_for(guard):
    x, out = torch.randn(64), torch.zeros(64)
    with only_program(2):
        shift_kernel[(1,)](x, out, 64, LOAD=0, STORE=0, BLOCK=16)
    assert torch.equal(out[32:48], x[32:48])
    assert not out[:32].any()
    assert not out[48:].any()


def launched_from(folder: Path) -> set[str]:
    """Names of all kernels in `folder`: what is decorated by triton.jit and named so."""
    names = set()
    for path in folder.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list:
                names.add(node.name)
    return names


def test_every_kernel_runs_under_the_guard(guard):
    """So that none is added which the guard never sees: tests of numerics run in it too."""
    cases = (add_norm_case((5, 33)), rope_case(1, 3, 2, 1, 10), swiglu_case((3, 37)), cross_entropy_case(5, 7, 11),
             adamw_case(1025, 2), global_norm_case((5, 8193)))  # fmt: skip
    for case in cases:
        three_ways(case, torch.float32, "triton")
    check(CASES["everything"], torch.float32, "triton")
    assert guard.launched == launched_from(KERNELS)
    assert len(guard.launched) == 14
