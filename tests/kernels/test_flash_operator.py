"""The operator as PyTorch's machinery sees it: opcheck, compile, recomputation, FLOP counts, errors."""

from __future__ import annotations

import functools

import pytest
import torch
from flash_oracle import Case, results, run_backend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from megastage.kernels.flash_attention import attended_pairs, attention, attention_backward_op, attention_op

CASE = Case(B=2, T=40, S=40, H=4, K=2, cu=((0, 9, 9, 33, 33), (0, 40, 40, 40, 40)), sink=True, window=30)
BOTH = pytest.mark.parametrize("backend", ["torch", "triton"])


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def arguments(case: Case, backend: str, dtype: torch.dtype, grad: bool = True) -> tuple:
    x = {n: t.requires_grad_(grad) for n, t in case.inputs(dtype).items()}
    tail = (case.causal, case.D**-0.5, case.q_offset, case.window or 0, case.softcap or 0.0, backend)
    return x["q"], x["k"], x["v"], case.cu_seqlens(), x.get("sink"), *tail


@BOTH
@DTYPES
def test_opcheck(backend, dtype):
    torch.library.opcheck(attention_op, arguments(CASE, backend, dtype))
    torch.library.opcheck(attention_op, arguments(Case(T=20, S=20), backend, dtype))


@BOTH
@DTYPES
def test_opcheck_backward(backend, dtype):
    q, k, v, cu, sink, *tail = arguments(CASE, backend, dtype, grad=False)
    out, lse, stats = attention_op(q, k, v, cu, sink, *tail)
    for dlse in (None, torch.randn_like(lse)):
        torch.library.opcheck(
            attention_backward_op, (torch.randn_like(out), dlse, q, k, v, out, lse, stats, cu, sink, *tail)
        )


def gradients(case: Case, run):
    dout, dlse = (x.float() for x in case.cotangents())
    return results(case.inputs(torch.float32), run, dout, dlse)


@BOTH
def test_compile_fullgraph(backend):
    run = run_backend(CASE, backend)
    plain = gradients(CASE, run)
    compiled = gradients(CASE, torch.compile(run, fullgraph=True, backend="aot_eager"))
    for name, x in plain.items():
        torch.testing.assert_close(compiled[name], x, rtol=0, atol=0, equal_nan=True)


@BOTH
def test_selective_recomputation_keeps_attention(backend):
    calls = []

    def policy(ctx, op, *args, **kwargs):
        if op == torch.ops.megastage.attention.default:
            calls.append(ctx.is_recompute)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    run = run_backend(CASE, backend)

    def block(x):
        out, lse = run({n: t * 1.0 for n, t in x.items()})
        return out.sin(), lse

    plain = gradients(CASE, block)
    kept = gradients(CASE, lambda x: checkpoint(block, x, use_reentrant=False, context_fn=contexts))
    assert calls, "the policy never met the operator"
    for name, x in plain.items():
        assert torch.equal(kept[name], x), name


@BOTH
def test_two_runs_agree_bit_for_bit(backend):
    first, second = (gradients(CASE, run_backend(CASE, backend)) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(second[name], x), name


def test_fake_matches_strides_of_sliced_inputs():
    x = torch.randn(2, 12, 3, 4, 8)
    q, k, v = x.unbind(2)
    out, lse = attention(q, k, v, return_lse=True)
    with torch._subclasses.FakeTensorMode() as mode:
        fake, fake_lse = attention(*(mode.from_tensor(t) for t in (q, k, v)), return_lse=True)
    assert fake.stride() == out.stride()
    assert fake_lse.shape == lse.shape


@BOTH
def test_empty_sizes(backend):
    for T, S in ((0, 5), (5, 0)):
        q, k = torch.randn(1, T, 2, 16, requires_grad=True), torch.randn(1, S, 1, 16, requires_grad=True)
        out, lse = attention(q, k, k, return_lse=True, backend=backend)
        assert out.eq(0).all()
        assert lse.eq(-torch.inf).all()
        out.sum().backward()
        assert q.grad.eq(0).all()
        assert k.grad.eq(0).all()


def test_gradcheck_in_float64():
    case = Case(T=7, S=9, H=2, K=1, D=3, cu=((0, 4, 8, 8),), q_offset=1, sink=True)
    x = {n: t.requires_grad_() for n, t in case.inputs(torch.float64).items()}

    def run(*tensors):
        out, lse = run_backend(case, "torch")(dict(zip(x, tensors)))
        return out, torch.where(torch.isfinite(lse), lse, 0.0)

    torch.autograd.gradcheck(run, tuple(x.values()))


def test_partial_results_merge_by_lse():
    """Keys in two parts, each with its own offset, merged by log-sum-exp: the ring of context parallelism."""
    case = Case(B=1, T=30, S=60, H=2, K=1, q_offset=20, cu=((0, 22, 50, 50),))
    x = case.inputs(torch.float64)

    def merged(x):
        parts = []
        for start, stop in ((0, 25), (25, 60)):
            k, v = x["k"][:, start:stop], x["v"][:, start:stop]
            options = {"q_offset": case.q_offset - start, "return_lse": True, "backend": "torch"}
            parts.append(attention(x["q"], k, v, case.cu_seqlens() - start, **options))
        lse = torch.logaddexp(parts[0][1], parts[1][1])
        weights = [torch.where(lse > -torch.inf, (p[1] - lse).exp(), 0.0).transpose(1, 2)[..., None] for p in parts]
        return weights[0] * parts[0][0] + weights[1] * parts[1][0], lse

    dout, _ = case.cotangents()
    dlse = torch.zeros(1, 2, 30, dtype=torch.float64)
    whole, two = (results(x, run, dout, dlse) for run in (run_backend(case, "torch"), merged))
    for name in ("out", "dq", "dk", "dv"):
        torch.testing.assert_close(two[name], whole[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", [Case(T=9, S=9), Case(T=5, S=9, q_offset=3, window=3), Case(T=7, S=4, causal=False)])
def test_flop_counts_attended_pairs(case):
    pairs = int(case.mask().sum())
    assert attended_pairs(case.T, case.S, case.causal, case.q_offset, case.window or 0) == pairs
    with FlopCounterMode(display=False) as counter:
        out, _ = run_backend(case, "torch")({n: t.requires_grad_() for n, t in case.inputs(torch.float32).items()})
        out.sum().backward()
    assert counter.get_total_flops() == (4 + 10) * pairs * case.H * case.D


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 4, 2, 8), "v": torch.zeros(1, 5, 2, 8)}, "expected q"),
        ({"k": torch.zeros(1, 4, 3, 8), "v": torch.zeros(1, 4, 3, 8)}, "cannot share"),
        ({"k": torch.zeros(1, 4, 2, 8).half(), "v": torch.zeros(1, 4, 2, 8)}, "one floating dtype"),
        ({"cu_seqlens_BC": torch.zeros(2, 3, dtype=torch.int32)}, "cu_seqlens"),
        ({"sink_H": torch.zeros(3)}, "sink"),
        ({"scale": -1.0}, "scale = -1.0 must be positive"),
        ({"window": 0}, "window = 0"),
        ({"softcap": 0.0}, "softcap = 0.0"),
        ({"backend": "cuda"}, "choose one of auto, triton, torch"),
    ],
)
def test_wrong_arguments_name_the_value(change, message):
    x = {"q": torch.zeros(1, 4, 4, 8), "k": torch.zeros(1, 4, 2, 8), "v": torch.zeros(1, 4, 2, 8)} | change
    with pytest.raises(ValueError, match=message):
        attention(x.pop("q"), x.pop("k"), x.pop("v"), **x)
