"""Every op against float64, forward and backward, over a grid of shapes, in the interpreter, with guarded memory.

bf16 too: these kernels compute in fp32, and the interpreter is wrong about bf16 only in arithmetic and in rounding,
which the fixture mends.
"""

import pytest
import torch
import torch.nn.functional as F
from error_bound import assert_as_good, joined
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numeric_cases import (
    adamw_case,
    add_norm_case,
    cross_entropy_case,
    global_norm_case,
    grid,
    noise,
    norm_case,
    rope_case,
    swiglu_case,
    three_ways,
)

from megastage.kernels.global_norm import global_norm
from megastage.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_by_token
from megastage.kernels.rms_norm import rms_norm
from megastage.kernels.swiglu import swiglu
from megastage.model.config import RopeScaling, RopeSpec
from megastage.model.rope import rope_table

pytestmark = pytest.mark.usefixtures("guard")
BACKENDS = ("triton", "torch")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GRID = {case.name: case for case in grid()}
DRAWN = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.generate],  # shrinking in the interpreter takes minutes
)
ROWS = st.lists(st.integers(1, 6), max_size=3)
SEED = st.integers(0, 2**20)


def hold(*draws):
    """All dtypes, both back ends; at fp32, cases that differ in their numbers only are judged together. At 16 bit 2 ulp
    decide, and one is enough."""
    for dtype in DTYPES:
        for backend in BACKENDS:
            cases = draws if dtype == torch.float32 else draws[:1]
            assert_as_good(*joined(three_ways(case, dtype, backend) for case in cases))


@pytest.mark.parametrize("name", GRID)
def test_grid(name):
    hold(GRID[name])


@DRAWN
@given(rows=ROWS, D=st.integers(1, 300), seed=SEED)
def test_norms_of_any_shape(rows, D, seed):
    hold(norm_case((*rows, D), seed=seed))
    hold(add_norm_case((*rows, D), seed=seed))


@DRAWN
@given(B=st.integers(1, 3), T=st.integers(1, 4), H=st.integers(1, 40), K=st.integers(1, 9), half=st.integers(1, 48),
       first=st.integers(0, 50), seed=SEED)  # fmt: skip
def test_rope_of_any_shape(B, T, H, K, half, first, seed):
    hold(rope_case(B, T, H, K, 2 * half, seed=seed, positions=torch.arange(first, first + T).repeat(B, 1)))


@pytest.mark.parametrize("scaling", [None, "linear", "llama3", "yarn"])
def test_rope_with_the_models_tables(scaling):
    """Documents that restart within a row, and a context-parallel rank's part of one far out. YaRN's tables are longer
    than a rotation, so that a gradient by their inverse instead of their transpose would show."""
    kind = None if scaling is None else RopeScaling(kind=scaling, factor=8.0, original_max_positions=8192)
    tables = rope_table(80, RopeSpec(theta=5e5, scaling=kind), 65_536)
    far = torch.cat((torch.arange(65_530, 65_536), torch.arange(6)))
    near = torch.arange(12) % 5
    hold(rope_case(2, 12, 4, 2, 80, positions=torch.stack((far, near)), tables=tables))


@DRAWN
@given(rows=ROWS, F=st.integers(1, 3000), seed=SEED)
def test_swiglu_of_any_shape(rows, F, seed):
    hold(swiglu_case((*rows[:2], F), seed=seed))


@settings(DRAWN, max_examples=6)
@given(
    N=st.integers(1, 40), D=st.integers(1, 20), V=st.integers(1, 90), tokens=st.integers(1, 40),
    vocab=st.integers(0, 90), z_loss=st.sampled_from([0.0, 1e-4, 1e-2]), reduction=st.sampled_from(["sum", "mean"]),
    seed=SEED,
)  # fmt: skip
def test_cross_entropy_of_any_shape(N, D, V, tokens, vocab, z_loss, reduction, seed):
    hold(*(cross_entropy_case(N, D, V, tokens, vocab, z_loss, reduction, seed + 10 * i) for i in range(5)))


@DRAWN
@given(sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=4), step=st.integers(1, 10**6), seed=SEED)
def test_optimizer_ops_of_any_shape(sizes, step, seed):
    hold(adamw_case(sizes[0], step, seed))
    hold(global_norm_case(tuple(sizes), seed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm_of_tiny_and_huge_rows(backend):
    x = torch.cat((torch.full((1, 48), 1e-12), torch.full((1, 48), 3e4), torch.zeros(1, 48)))
    out = rms_norm(x.half().float(), torch.ones(48), 1e-5, backend=backend)
    assert out.isfinite().all()
    torch.testing.assert_close(out[1], torch.ones(48))
    half = rms_norm(x.half(), torch.ones(48).half(), 1e-5, backend=backend)
    assert half.isfinite().all()  # the square of 3e4 is beyond fp16


@pytest.mark.parametrize("backend", BACKENDS)
def test_swiglu_far_out(backend):
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4]).requires_grad_()
    up = torch.ones(5).requires_grad_()
    out = swiglu(gate, up, backend=backend)
    grads = torch.autograd.grad(out, (gate, up), torch.ones(5))
    torch.testing.assert_close(out, torch.tensor([0.0, 0.0, 0.0, 100.0, 1e4]))
    torch.testing.assert_close(grads[0], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]), atol=1e-6, rtol=0)


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
def test_global_norm_shows_what_is_not_finite(backend):
    tensors = [noise(n, seed=n).to(dtype) for n in (5, 0, 3) for dtype in DTYPES]
    exact = torch.cat([x.double() for x in tensors]).norm()
    torch.testing.assert_close(global_norm(tensors, backend=backend).double(), exact, rtol=1e-6, atol=0)
    for value in (torch.inf, torch.nan):
        tensors[0][0] = value
        torch.testing.assert_close(global_norm(tensors, backend=backend).item(), value, equal_nan=True)
