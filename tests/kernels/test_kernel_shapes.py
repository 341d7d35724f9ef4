"""Any layout, any size: kernels against references where tensors are empty, strided or enormous."""

import pytest
import torch
import triton.language as tl
from memory_guard import only_program, virtual

from megastage.kernels import (
    cross_entropy_triton,
    global_norm_triton,
    optimizer_triton,
    rms_norm_triton,
    rope_triton,
    swiglu_triton,
)
from megastage.kernels.global_norm import sum_of_squares
from megastage.kernels.linear_cross_entropy import Rows, linear_cross_entropy, tile_gradient, tile_statistics
from megastage.kernels.optimizer import adamw_, step_scalars
from megastage.kernels.rms_norm import rms_norm, rms_norm_reference
from megastage.kernels.rope import rope_qk, rope_reference
from megastage.kernels.swiglu import swiglu, swiglu_reference

pytestmark = pytest.mark.usefixtures("guard")


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_empty_inputs():
    for backend in ("triton", "torch"):
        x = torch.zeros(0, 8, requires_grad=True)
        w = torch.ones(8, requires_grad=True)
        out = rms_norm(x, w, backend=backend)
        assert torch.equal(torch.autograd.grad(out.sum(), w)[0], torch.zeros(8))
        assert swiglu(x, x, backend=backend).shape == (0, 8)
        loss = linear_cross_entropy(x, torch.ones(3, 8), torch.zeros(0, dtype=torch.int64), backend=backend)
        assert loss == 0
        all_ignored = linear_cross_entropy(
            torch.ones(2, 8), torch.ones(3, 8), torch.full((2,), -100), reduction="mean", backend=backend
        )
        assert all_ignored == 0


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_slices_of_one_projection(backend):
    """Gate and up, q, k and v as slices: what lies between them is poison."""
    fused = torch.full((3, 5, 40), float("nan"))
    fused[..., 3:13], fused[..., 20:30] = draw(3, 5, 10), draw(3, 5, 10) + 1
    gate, up = fused[..., 3:13], fused[..., 20:30]
    assert torch.allclose(swiglu(gate, up, backend=backend), swiglu_reference(gate.clone(), up.clone()))
    normed = rms_norm(gate, torch.ones(10), backend=backend)
    assert torch.allclose(normed, rms_norm_reference(gate.clone(), torch.ones(10), 1e-5))
    heads = torch.full((2, 4, 9, 8), float("nan"))
    heads[:, :, 1:5], heads[:, :, 6:8] = draw(2, 4, 4, 8), draw(2, 4, 2, 8)
    q, k = heads[:, :, 1:5], heads[:, :, 6:8]
    angle, positions = draw(4, 4), torch.arange(4).expand(2, 4)
    out = rope_qk(q, k, angle.cos(), angle.sin(), positions, backend=backend)
    for ours, x in zip(out, (q.clone(), k.clone())):
        assert torch.allclose(ours, rope_reference(x, angle.cos(), angle.sin(), positions), atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_norm_weight_with_gaps(backend):
    """Every second number of a vector, of whose others nothing may be read."""
    every = torch.full((24,), float("nan"))
    every[::2] = torch.arange(12.0)
    x, weight = draw(5, 12), every[::2].requires_grad_()
    out = rms_norm(x, weight, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), weight)
    normed = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(out, normed * torch.arange(12.0))
    torch.testing.assert_close(grad, normed.sum(0))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_rope_in_place_only_where_no_gradient_is_recorded(backend):
    q, k, angle, positions = draw(1, 3, 2, 8), draw(1, 3, 1, 8), draw(3, 4), torch.arange(3)[None]
    expected = rope_qk(q, k, angle.cos(), angle.sin(), positions, backend=backend)
    mine = q.clone(), k.clone()
    out = rope_qk(*mine, angle.cos(), angle.sin(), positions, inplace=True, backend=backend)
    assert [x.data_ptr() for x in out] == [x.data_ptr() for x in mine]
    assert all(map(torch.equal, out, expected))
    leaf = q.clone().requires_grad_()
    out = rope_qk(leaf, k.clone(), angle.cos(), angle.sin(), positions, inplace=True, backend=backend)
    assert torch.equal(leaf, q)
    assert torch.equal(out[0], expected[0])


def test_rope_position_outside_the_tables_is_nan_not_foreign_memory():
    q, k, angle = draw(1, 3, 2, 8), draw(1, 3, 1, 8), draw(3, 4)
    out = rope_qk(q, k, angle.cos(), angle.sin(), torch.tensor([[0, 3, -1]]), backend="triton")
    for x in out:
        assert x[0, 0].isfinite().all()
        assert x[0, 1:].isnan().all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_label_that_nobody_holds_makes_the_loss_nan(backend):
    labels = torch.tensor([1, 7])
    assert linear_cross_entropy(draw(2, 4), draw(7, 4), labels, backend=backend).isnan()


# --- sizes beyond 2^31 elements: one program far out, in memory that exists only where it is touched -----------------


def test_norm_rows_beyond_int32():
    D, N = 1024, 2**21 + 3
    x, out, total = (virtual(N * D, torch.float16).view(N, D) for _ in range(3))
    rstd, weight, row = virtual(N, torch.float32), torch.ones(D).half(), draw(D).half()
    x[N - 1] = row
    with only_program(N - 1):
        rms_norm_triton.rms_norm_forward_kernel[(1,)](
            x, x, weight, out, total, rstd, N, D, D, 1e-5, D=D, BLOCK=D, ROWS=1, ADD=True, WIDE=tl.float32
        )  # fmt: skip
    assert torch.equal(total[N - 1], row + row)
    torch.testing.assert_close(out[N - 1], rms_norm_reference(row + row, weight, 1e-5), rtol=2e-3, atol=2e-3)
    grad_x, partial = virtual(N * D, torch.float16).view(N, D), virtual(N * D, torch.float32).view(N, D)
    with only_program(N - 1):
        rms_norm_triton.rms_norm_backward_kernel[(1,)](
            x, x, x, weight, rstd, grad_x, partial, N, 1, D, D, D, D=D, BLOCK=D, ROWS=1, ADD=True, WIDE=tl.float32
        )  # fmt: skip
    assert grad_x[N - 1].any()
    assert partial[N - 1].any()


def test_norm_stride_beyond_int32():
    stride = 2**30 + 16
    x = virtual(3 * stride, torch.float16).as_strided((3, 40), (stride, 1))
    x[2] = draw(40).half()
    out = rms_norm(x, torch.ones(40).half(), backend="triton")
    torch.testing.assert_close(out[2], rms_norm_reference(x[2], torch.ones(40).half(), 1e-5))


def test_rope_beyond_int32():
    T, H, D = 2**20 + 1, 32, 64
    q, out = (virtual(T * H * D, torch.float16).view(1, T, H, D) for _ in range(2))
    k = virtual(T * D, torch.float16).view(1, T, 1, D)
    positions = virtual(T, torch.int64).view(1, T)
    q[0, T - 1], positions[0, T - 1], angle = draw(H, D).half(), 5, draw(8, D // 2)
    with only_program(T - 1):
        config = {"F": D // 2, "BLOCK": D // 2, "HEADS": 16, "KV_HEADS": 1, "INVERSE": False}
        rope_triton.rope_kernel[(1,)](
            q, k, out, k, angle.cos(), angle.sin(), positions, T, 8, H, 1, *q.stride()[:3], *k.stride()[:3],
            *out.stride()[:3], *k.stride()[:3], *positions.stride(), D // 2, **config,
        )  # fmt: skip
    last = torch.tensor([[5]])
    expected = rope_reference(q[:, T - 1 :], angle.cos(), angle.sin(), last)
    torch.testing.assert_close(out[:, T - 1 :], expected)
    far = virtual(2 * (2**31 + 64), torch.float16).as_strided((2, 1, 1, 4), (2**31 + 64, 4, 4, 1))
    far[1] = draw(1, 1, 4).half()
    small = rope_qk(far, far, angle[:, :2].contiguous().cos(), angle[:, :2].contiguous().sin(), last.expand(2, 1),
                    backend="triton")  # fmt: skip
    assert small[0][1].any()


def test_swiglu_beyond_int32():
    F, N = 8192, 2**18 + 2
    gate, up, out = (virtual(N * F, torch.float16).view(N, F) for _ in range(3))
    gate[N - 1], up[N - 1] = draw(F).half(), 1.5
    block = 1024
    with only_program(N - 1, 3):
        swiglu_triton.swiglu_forward_kernel[(1,)](gate, up, out, F, F, F, BLOCK=block)
        swiglu_triton.swiglu_backward_kernel[(1,)](gate, gate, up, out, up, F, F, F, F, BLOCK=block)
    part = slice(3 * block, 4 * block)
    expected = torch.autograd.functional.vjp(swiglu_reference, (gate[N - 1, part].float(), torch.tensor(1.5)),
                                             gate[N - 1, part].float())[1]  # fmt: skip
    torch.testing.assert_close(out[N - 1, part].float(), expected[0], rtol=1e-2, atol=1e-2)
    assert not out[N - 1, : part.start].any()


def test_logits_beyond_int32():
    W, C = 131072, 16387
    logits = virtual(C * W, torch.float16).view(C, W)
    logits[C - 1] = draw(W).half()
    labels = torch.full((C,), 77)
    peak, sums = torch.zeros(C), torch.zeros(C, 3)
    grad = virtual(C * W, torch.float16).view(C, W)
    with only_program(C - 1):
        cross_entropy_triton.cross_entropy_statistics_kernel[(1,)](
            logits, labels, peak, sums, W, 0, IGNORE=-100, BLOCK=16384
        )
    expected = tile_statistics(logits[C - 1 :], labels[C - 1 :], 0)
    torch.testing.assert_close((peak[C - 1 :], sums[C - 1 :]), expected)
    stats = Rows(peak, torch.full((C,), 1e-5), torch.full((C,), 1e-2))
    with only_program(C - 1, 7):
        cross_entropy_triton.cross_entropy_gradient_kernel[(1,)](
            logits, labels, *stats, grad, W, 0, IGNORE=-100, BLOCK=16384, WIDE=tl.float32
        )
    part = slice(7 * 16384, None)
    true = tile_gradient(logits[C - 1 :].clone(), labels[C - 1 :], 0, stats.of(slice(C - 1, C)), torch.float16)
    torch.testing.assert_close(grad[C - 1, part], true[0, part])


def test_flat_shards_beyond_int32(guard):
    """The global norm's and AdamW's last part of a shard."""
    n = 2**31 + 5000
    x = virtual(n, torch.float16)
    x[n - 3 :] = 2.0
    guard.allow(x)
    block = global_norm_triton.DEFAULT["block"]
    parts, partial = torch.tensor([[0, n // block * block, n % block]]), torch.zeros(1)
    global_norm_triton.sum_of_squares_kernel[(1,)](
        torch.tensor([[x.data_ptr()]]), parts, partial, DTYPE=global_norm_triton.TL_TYPES[torch.float16],
        ALIGNED=True, BLOCK=block,
    )  # fmt: skip
    assert partial.item() == 12.0
    lists = [virtual(n, torch.float16) for _ in range(4)]
    guard.allow(*lists)
    for y in lists:
        y[n - 3 :] = 1.0
    addresses = torch.tensor([[y.data_ptr() for y in lists]])
    block, kind = optimizer_triton.DEFAULT["block"], global_norm_triton.TL_TYPES[torch.float16]
    parts = torch.tensor([[0, n // block * block, n % block]])
    optimizer_triton.adamw_kernel[(1,)](
        addresses, parts, None, *step_scalars(1, 0.5, (0.0, 0.0), 0.0, 0.0), 7, PARAM=kind, GRAD=kind, STATE=kind,
        STOCHASTIC=False, SCALED=False, ALIGNED=True, BLOCK=block,
    )  # fmt: skip
    assert lists[0][n - 3 :].tolist() == [0.5] * 3


def test_views_that_are_not_aligned():
    x = torch.randn(4097)
    for start in (0, 1, 3):
        ours = sum_of_squares([x[start:4000]], backend="triton")
        torch.testing.assert_close(ours, x[start:4000].square().sum(), rtol=1e-6, atol=0)
    for backend in ("triton", "torch"):
        lists = [[torch.ones(4001)[1:]] for _ in range(4)]
        adamw_(*lists, step=1, lr=0.5, weight_decay=0.0, betas=(0.0, 0.0), backend=backend)
        torch.testing.assert_close(lists[0][0], torch.full((4000,), 0.5))
