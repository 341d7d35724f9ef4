"""The ops as PyTorch operators: schemas, fake tensors, compile, selective recomputation, FLOPs."""

import functools

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from megastage.kernels import linear_cross_entropy as linear_cross_entropy_module
from megastage.kernels.global_norm import sum_of_squares_op
from megastage.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_backward_op,
    linear_cross_entropy_op,
)
from megastage.kernels.optimizer import adamw_op, step_scalars
from megastage.kernels.rms_norm import add_rms_norm, add_rms_norm_op, rms_norm, rms_norm_backward_op, rms_norm_op
from megastage.kernels.rope import rope_qk, rope_qk_inplace_op, rope_qk_op
from megastage.kernels.swiglu import swiglu, swiglu_backward_op, swiglu_op


def leaf(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).requires_grad_()


ANGLE = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
POSITIONS = torch.tensor([[0, 1, 5], [2, 0, 1]])
LABELS = torch.tensor([1, -100, 6, 0, 3])


ROOTS = torch.ones(3, dtype=torch.float64)


def cross_entropy_args(with_grad=True, triton=True):
    return leaf(5, 4), leaf(7, 4), LABELS, 0, 1e-3, 2, 0, "", with_grad, triton


def flat(n):
    return torch.linspace(0.1, 1, n)


CASES = {
    "rms_norm": lambda: (rms_norm_op, (leaf(3, 5, 6), leaf(6), 1e-5)),
    "add_rms_norm": lambda: (add_rms_norm_op, (leaf(3, 6), leaf(3, 6), leaf(6), 1e-5)),
    "rope": lambda: (rope_qk_op, (leaf(2, 3, 4, 8), leaf(2, 3, 2, 8), ANGLE.cos(), ANGLE.sin(), POSITIONS, False)),
    "rope_inplace": lambda: (
        rope_qk_inplace_op,
        (leaf(2, 3, 4, 8).detach(), leaf(2, 3, 2, 8).detach(), ANGLE.cos(), ANGLE.sin(), POSITIONS),
    ),
    "swiglu": lambda: (swiglu_op, (leaf(3, 5), leaf(3, 5))),
    "rms_norm_backward": lambda: (
        rms_norm_backward_op,
        (flat(18).view(3, 6), None, flat(18).view(3, 6), flat(6), ROOTS),
    ),
    "add_rms_norm_backward": lambda: (
        rms_norm_backward_op,
        (flat(18).view(3, 6), flat(18).view(3, 6), flat(18).view(3, 6), flat(6), ROOTS),
    ),
    "swiglu_backward": lambda: (swiglu_backward_op, (flat(15), flat(15), flat(15))),
    "cross_entropy_backward": lambda: (linear_cross_entropy_backward_op, (torch.ones(()), flat(8), flat(9))),
    "cross_entropy": lambda: (linear_cross_entropy_op, cross_entropy_args()),
    "cross_entropy_reference": lambda: (linear_cross_entropy_op, cross_entropy_args(triton=False)),
    "sum_of_squares": lambda: (sum_of_squares_op, ([flat(5), flat(3)],)),
    "adamw": lambda: (
        adamw_op,
        (*([flat(5), flat(3)] for _ in range(4)), None, step_scalars(1, 0.1, (0.9, 0.95), 1e-8, 0.1), False, 0),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    op, args = CASES[name]()
    torch.library.opcheck(op, args)


def block(x, residual, w, w_out, backend):
    """Every op of a decoder layer, in one graph."""
    normed, total = add_rms_norm(x, residual, w, backend=backend)
    heads = normed.view(2, 3, 3, 8)
    q, k = rope_qk(heads[:, :, :2], heads[:, :, 2:], ANGLE.cos(), ANGLE.sin(), POSITIONS, backend=backend)
    mixed = swiglu(q.flatten(2), torch.cat((k, k), 2).flatten(2), backend=backend)
    out = rms_norm(mixed, w[:16], backend=backend)
    hidden = torch.cat((out, total[..., :8]), -1).view(6, 24)
    labels = torch.tensor([0, 4, -100, 2, 1, 3])
    return linear_cross_entropy(hidden, w_out, labels, z_loss=1e-4, chunk_tokens=4, backend=backend)


def block_inputs():
    return leaf(2, 3, 24), leaf(2, 3, 24), leaf(24), leaf(5, 24)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiles_into_one_graph(backend):
    inputs = block_inputs()
    eager = block(*inputs, backend)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)(*inputs, backend)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs))


@pytest.mark.parametrize(
    ("saved", "again"),
    [
        ((), 8),
        (("add_rms_norm", "rms_norm", "swiglu"), 5),
        (("rope_qk",), 7),
        (("linear_cross_entropy",), 4),
        (("add_rms_norm", "rms_norm", "swiglu", "rope_qk", "linear_cross_entropy"), 0),
    ],
)
def test_selective_recomputation(saved, again, guard):
    """The block's forward makes eight launches; what is saved is not launched again."""
    inputs = block_inputs()
    keep = [getattr(torch.ops.megastage, name).default for name in saved]

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in keep else CheckpointPolicy.PREFER_RECOMPUTE

    context = functools.partial(create_selective_checkpoint_contexts, policy)
    loss = checkpoint(block, *inputs, "triton", use_reentrant=False, context_fn=context)
    forward, grads = guard.launches, torch.autograd.grad(loss, inputs)
    both_ways = guard.launches - forward
    plain = block(*inputs, "triton")
    start, plain_grads = guard.launches, torch.autograd.grad(plain, inputs)
    assert loss == plain
    torch.testing.assert_close(grads, plain_grads, rtol=0, atol=0)
    assert forward == 8
    assert both_ways - (guard.launches - start) == again


def test_whole_block_agrees_between_back_ends():
    inputs = block_inputs()
    found = [(loss := block(*inputs, backend), *torch.autograd.grad(loss, inputs)) for backend in ("triton", "torch")]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("chunk_vocab", "training", "passes"), [(0, True, 3), (3, True, 4), (0, False, 1)])
def test_flop_count(chunk_vocab, training, passes):
    h, w = leaf(5, 4), leaf(7, 4)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        loss = linear_cross_entropy(h, w, LABELS, chunk_vocab=chunk_vocab)
        if training:
            loss.backward()
    assert counter.get_total_flops() == passes * 2 * 5 * 4 * 7


def test_the_weight_gradient_is_added_inside_the_product_where_pytorch_can(monkeypatch):
    """On CUDA; here the operator's place is taken by what it means, or by one that overwrites."""
    cpu, added = torch.device("cpu"), []

    def adds(out, a, b):
        added.append(out.shape)
        out += a.float() @ b.float()

    def verdict(operator):
        monkeypatch.setattr(linear_cross_entropy_module, "add_wide", operator)
        linear_cross_entropy_module.adds_wide.cache_clear()
        return linear_cross_entropy_module.adds_wide(cpu, torch.bfloat16)

    hidden, weight = torch.randn(9, 8).bfloat16(), torch.randn(5, 8).bfloat16().requires_grad_()
    labels = torch.arange(9) % 5
    loss = lambda: linear_cross_entropy(hidden, weight, labels, chunk_tokens=4, backend="torch")
    assert not verdict(linear_cross_entropy_module.add_wide)  # no such operator on CPUs
    (expected,) = torch.autograd.grad(loss(), weight)
    assert not verdict(lambda out, a, b: out.copy_(a.float() @ b.float()))
    assert verdict(adds)
    (found,) = torch.autograd.grad(loss(), weight)
    linear_cross_entropy_module.adds_wide.cache_clear()
    assert added[1:] == [(5, 8)] * 3
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_no_gradient_means_no_gradient_work():
    h, w = leaf(5, 4), leaf(7, 4)
    with torch.no_grad():
        assert linear_cross_entropy_op(*cross_entropy_args(with_grad=False))[1].numel() == 0
        assert linear_cross_entropy(h, w, LABELS) == linear_cross_entropy(h, w, LABELS).detach()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm(torch.ones(2, 3), torch.ones(4)), r"\(2, 3\) and \(4,\)"),
        (lambda: rms_norm(torch.ones(1, 40000), torch.ones(40000), backend="triton"), "32768"),
        (lambda: rms_norm(torch.ones(1, 4).double(), torch.ones(4).double(), backend="triton"), "float64"),
        (lambda: add_rms_norm(torch.ones(2, 3), torch.ones(3), torch.ones(3)), "alike"),
        (lambda: swiglu(torch.ones(2), torch.ones(3)), "alike"),
        (lambda: rope_qk(*[torch.ones(1, 1, 1, 3)] * 2, *[torch.ones(4, 1)] * 2, torch.zeros(1, 1).long()), "even"),
        (lambda: rope_qk(*[torch.ones(1, 1, 1, 4)] * 2, *[torch.ones(4, 4)] * 2, torch.zeros(1, 1).long()), "2]"),
        (lambda: linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 2), torch.zeros(2).long()), "not"),
        (lambda: linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3).half(), torch.zeros(2).long()), "cast"),
        (
            lambda: linear_cross_entropy(
                torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2).long(), reduction="none"
            ),
            "reduction",
        ),
        (
            lambda: linear_cross_entropy(
                torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2).long(), chunk_tokens=0
            ),
            "chunk_tokens = 0",
        ),
    ],
)  # fmt: skip
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
