"""Every op against float64, forward and backward, over a grid of shapes, in the interpreter, with guarded memory."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from error_bound import assert_as_good

from megastage.kernels.global_norm import global_norm
from megastage.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_by_token
from megastage.kernels.rms_norm import add_rms_norm, rms_norm
from megastage.kernels.rope import rope_qk
from megastage.kernels.swiglu import swiglu

pytestmark = pytest.mark.usefixtures("guard")
BACKENDS = ("triton", "torch")
DTYPES = (torch.float32, torch.float16)


def run(fn, inputs, grads, dtype):
    """Outputs and gradients of `fn` on detached copies of the inputs at `dtype`."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    outputs = fn(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(grads, outputs)])
    return [*(o.detach() for o in outputs), *found]


def judge(ours, theirs, exact, inputs, grads, dtype, terms=()):
    inputs = [x.to(dtype).double() for x in inputs]
    grads = [g.to(dtype).double() for g in grads]
    exact_results = run(exact, inputs, grads, torch.float64)
    assert_as_good(run(ours, inputs, grads, dtype), run(theirs, inputs, grads, dtype), exact_results, terms)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "backend"), product(DTYPES, BACKENDS))
@pytest.mark.parametrize("shape", [(1, 1), (1, 128), (7, 1), (3, 5, 96), (13, 257), (2, 1000), (33, 64)])
def test_rms_norm(shape, dtype, backend):
    D = shape[-1]

    def native(x, w):
        return F.rms_norm(x, (D,), w, 1e-5)

    inputs, grads = [3 * noise(*shape), 1 + noise(D, seed=1)], [noise(*shape, seed=2)]
    # a row of one element has the gradient zero but for eps: the difference of two equal terms
    terms = (1e-7, 2 * (grads[0] * inputs[1] / inputs[0]).abs().max().item(), 1.0) if D == 1 else ()
    judge(lambda x, w: rms_norm(x, w, 1e-5, backend=backend), native, native, inputs, grads, dtype, terms)


@pytest.mark.parametrize(("dtype", "backend"), product(DTYPES, BACKENDS))
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 96), (19, 130)])
def test_add_rms_norm(shape, dtype, backend):
    def native(x, residual, w):
        total = x + residual
        return F.rms_norm(total, shape[-1:], w, 1e-6), total

    inputs = [noise(*shape), noise(*shape, seed=1), noise(shape[-1], seed=2)]
    grads = [noise(*shape, seed=3), noise(*shape, seed=4)]
    terms = (1e-7, *[5.0] * 4) if shape[-1] == 1 else ()
    judge(lambda *a: add_rms_norm(*a, 1e-6, backend=backend), native, native, inputs, grads, dtype, terms)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm_of_tiny_and_huge_rows(backend):
    x = torch.cat((torch.full((1, 48), 1e-12), torch.full((1, 48), 3e4), torch.zeros(1, 48)))
    out = rms_norm(x.half().float(), torch.ones(48), 1e-5, backend=backend)
    assert out.isfinite().all()
    torch.testing.assert_close(out[1], torch.ones(48))
    half = rms_norm(x.half(), torch.ones(48).half(), 1e-5, backend=backend)
    assert half.isfinite().all()  # the square of 3e4 is beyond fp16


def rotate_complex(x, angle):
    """Rotary embedding as a complex product: another road to the same numbers."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:])
    turned = pairs * torch.polar(torch.ones_like(angle), angle)[:, :, None, :]
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize(("dtype", "backend"), product(DTYPES, BACKENDS))
@pytest.mark.parametrize(
    ("B", "T", "H", "K", "D"), [(1, 1, 1, 1, 2), (2, 7, 6, 3, 20), (1, 11, 8, 1, 64), (1, 3, 33, 17, 80)]
)
def test_rope(B, T, H, K, D, dtype, backend):
    angles = torch.arange(T)[:, None].double() * 10000 ** (-torch.arange(0, D, 2).double() / D)
    cos, sin = angles.cos().float(), angles.sin().float()
    positions = torch.arange(T).repeat(B, 1) % 3  # documents of three tokens: positions restart
    angle = torch.atan2(sin.double(), cos.double())[positions]

    def exact(q, k):
        return rotate_complex(q, angle), rotate_complex(k, angle)

    def native(q, k):
        out = []
        for x in (q, k):
            c, s = (t[positions][:, :, None].repeat(1, 1, 1, 2).to(x.dtype) for t in (cos, sin))
            low, high = x.chunk(2, -1)
            out.append(x * c + torch.cat((-high, low), -1) * s)
        return tuple(out)

    shapes = ((B, T, H, D), (B, T, K, D))
    judge(
        lambda q, k: rope_qk(q, k, cos, sin, positions, backend=backend), native, exact,
        [noise(*s, seed=i) for i, s in enumerate(shapes)], [noise(*s, seed=i + 2) for i, s in enumerate(shapes)], dtype,
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "backend"), product(DTYPES, BACKENDS))
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 5, 96), (2, 2049), (17, 31)])
def test_swiglu(shape, dtype, backend):
    def native(gate, up):
        return F.silu(gate) * up

    inputs, grads = [6 * noise(*shape), noise(*shape, seed=1)], [noise(*shape, seed=2)]
    judge(lambda g, u: swiglu(g, u, backend=backend), native, native, inputs, grads, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_swiglu_far_out(backend):
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4]).requires_grad_()
    up = torch.ones(5).requires_grad_()
    out = swiglu(gate, up, backend=backend)
    grads = torch.autograd.grad(out, (gate, up), torch.ones(5))
    torch.testing.assert_close(out, torch.tensor([0.0, 0.0, 0.0, 100.0, 1e4]))
    torch.testing.assert_close(grads[0], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("dtype", "backend"), product(DTYPES, BACKENDS))
@pytest.mark.parametrize(("chunk_tokens", "chunk_vocab"), [(1024, 0), (5, 0), (1024, 16), (4, 10)])
@pytest.mark.parametrize(("N", "D", "V"), [(1, 1, 1), (13, 16, 37), (9, 32, 131)])
def test_linear_cross_entropy(N, D, V, chunk_tokens, chunk_vocab, dtype, backend):
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(5))
    labels[N // 2] = -100 if N > 1 else labels[N // 2]
    z_loss = 1e-2

    def native(h, w):
        logits = h @ w.mT
        lse = torch.where(labels == -100, 0, logits.logsumexp(-1))
        return F.cross_entropy(logits, labels, reduction="sum") + z_loss * lse.square().sum()

    def ours(h, w):
        tiles = {"chunk_tokens": chunk_tokens, "chunk_vocab": chunk_vocab}
        return linear_cross_entropy(h, w, labels, z_loss=z_loss, backend=backend, **tiles)

    def compared(h, w):  # PyTorch's loss has the inputs' dtype, ours fp32
        return native(h, w).to(torch.float64 if h.dtype == torch.float64 else torch.float32)

    inputs = [noise(N, D), noise(V, D, seed=1)]
    # with one word the softmax is 1, and only the z-loss keeps its gradient from being zero
    terms = (1e-7, inputs[1].abs().item(), inputs[0].abs().item()) if V == 1 else ()
    judge(ours, compared, native, inputs, [torch.ones((), dtype=torch.float64)], dtype, terms)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("chunk_tokens", "chunk_vocab"), [(1024, 0), (5, 0), (1024, 16), (4, 10)])
def test_losses_of_tokens(chunk_tokens, chunk_vocab, backend):
    h, w = noise(13, 16).float().requires_grad_(), noise(37, 16, seed=1).float()
    labels = torch.randint(0, 37, (13,), generator=torch.Generator().manual_seed(5))
    labels[[0, 6]] = -100
    tiles = {"chunk_tokens": chunk_tokens, "chunk_vocab": chunk_vocab, "backend": backend}
    loss, losses_N = linear_cross_entropy_by_token(h, w, labels, **tiles)
    torch.testing.assert_close(losses_N, F.cross_entropy(h.detach() @ w.mT, labels, reduction="none"))
    assert not losses_N.requires_grad
    assert loss == linear_cross_entropy(h, w, labels, **tiles)
    torch.testing.assert_close(loss.detach(), losses_N.sum())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(1,), (5, 8192, 8193, 0, 3)])
def test_global_norm(sizes, backend):
    tensors = [noise(n, seed=n).to(dtype) for n in sizes for dtype in DTYPES]
    exact = torch.cat([x.double() for x in tensors]).norm()
    # the reference is PyTorch's own norm, which sums each tensor in turn
    assert abs(global_norm(tensors, backend=backend).double() / exact - 1) < (2e-7 if backend == "triton" else 1e-6)
    tensors[0][0] = float("inf")
    assert global_norm(tensors, backend=backend) == float("inf")
    tensors[0][0] = float("nan")
    assert global_norm(tensors, backend=backend).isnan()
