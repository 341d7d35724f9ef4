"""The sanitizer itself: it must see what it is there to see."""

import pytest
import torch
import triton
import triton.language as tl
from memory_guard import only_program, virtual


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
