"""What a caller may hand to the ops but attention: odd layouts, empty sizes, mixed types, other devices, autocast,
sizes that change under compile, second derivatives. Right, or an error that names what was given; never foreign
memory."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from megastage.kernels.global_norm import global_norm
from megastage.kernels.linear_cross_entropy import linear_cross_entropy
from megastage.kernels.optimizer import adamw_
from megastage.kernels.rms_norm import add_rms_norm, rms_norm
from megastage.kernels.rope import rope_qk
from megastage.kernels.swiglu import swiglu

pytestmark = pytest.mark.usefixtures("guard")
BACKENDS = ("triton", "torch")
ANGLE = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
TABLES = ANGLE.cos(), ANGLE.sin()
META = torch.device("meta")


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def rotated(q, k, backend):
    return torch.cat(rope_qk(q, k, *TABLES, torch.arange(q.shape[1])[None] % 16, backend=backend), 2)


def loss(h, w, backend, **options):
    labels = torch.arange(h.shape[0]) % max(w.shape[0], 1)
    return linear_cross_entropy(h, w, labels, chunk_tokens=4, backend=backend, **options)


# op: the call, and the shapes of its inputs for n rows
OPS = {
    "rms_norm": (lambda x, w, backend: rms_norm(x, w, backend=backend), lambda n: ((n, 70), (70,))),
    "add_rms_norm": (lambda *a, backend: sum(add_rms_norm(*a, backend=backend)), lambda n: ((n, 70), (n, 70), (70,))),
    "swiglu": (lambda g, u, backend: swiglu(g, u, backend=backend), lambda n: ((n, 70), (n, 70))),
    "rope": (rotated, lambda n: ((1, n, 2, 8), (1, n, 1, 8))),
    "loss": (lambda h, w, backend: loss(h, w, backend, z_loss=1e-2), lambda n: ((n, 6), (7, 6))),
    "mean, tiles": (
        lambda h, w, backend: loss(h, w, backend, chunk_vocab=3, reduction="mean"),
        lambda n: ((n, 6), (7, 6)),
    ),
}
EVERY = pytest.mark.parametrize(("name", "backend"), [*product(OPS, BACKENDS)])


def transposed(x):
    """x with its dimensions in memory the other way round."""
    return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))


def sliced(x):
    """x as every second element of a tensor whose others are NaN."""
    room = torch.full((*x.shape, 2), float("nan"))
    room[..., 0] = x
    return room[..., 0]


def repeated(x):
    """The first row, or number, of x in every place of it."""
    return x[:1].expand(x.shape)


@pytest.mark.parametrize("layout", [transposed, sliced, repeated])
@EVERY
def test_any_layout(name, backend, layout):
    call, shapes = OPS[name]
    found = []
    for inputs in ([layout(draw(*s)) for s in shapes(6)], [layout(draw(*s)).contiguous() for s in shapes(6)]):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = call(*leaves, backend=backend)
        found.append((out, *torch.autograd.grad(out, leaves, layout(draw(*out.shape)) if out.ndim else None)))
    torch.testing.assert_close(*found)


@EVERY
def test_gradients_of_some_inputs_only(name, backend):
    call, shapes = OPS[name]
    leaves = [draw(*s, seed=i).requires_grad_() for i, s in enumerate(shapes(5))]
    every = torch.autograd.grad(call(*leaves, backend=backend).sum(), leaves)
    for number, expected in enumerate(every):
        alone = [x.detach().requires_grad_(i == number) for i, x in enumerate(leaves)]
        found = torch.autograd.grad(call(*alone, backend=backend).sum(), alone[number])
        assert torch.equal(found[0], expected)


@EVERY
def test_one_graph_for_any_number_of_rows(name, backend):
    call, shapes = OPS[name]
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: call(*x, backend=backend), backend=counter, fullgraph=True, dynamic=True)
    for n in (5, 9, 13, 21):
        leaves = [draw(*s, seed=i).requires_grad_() for i, s in enumerate(shapes(n))]
        expected, found = (run(*leaves) for run in (lambda *x: call(*x, backend=backend), compiled))
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(x.sum(), leaves) for x in (found, expected)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count <= 2  # one more where a chunk first is not the whole


@EVERY
def test_no_rows(name, backend):
    call, shapes = OPS[name]
    leaves = [draw(*s).requires_grad_() for s in shapes(0)]
    out = call(*leaves, backend=backend)
    for x, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves)):
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_columns(backend):
    x, w = torch.zeros(3, 0, requires_grad=True), torch.zeros(0, requires_grad=True)
    for out in (
        rms_norm(x, w, backend=backend),
        *add_rms_norm(x, x, w, backend=backend),
        swiglu(x, x, backend=backend),
    ):
        assert out.shape == (3, 0)
        assert torch.autograd.grad(out.sum(), x, retain_graph=True)[0].shape == (3, 0)
    empty = torch.zeros(1, 3, 2, 0)
    out = rope_qk(empty, empty[:, :, :1], *(t[:, :0] for t in TABLES), torch.arange(3)[None], backend=backend)
    assert [x.shape for x in out] == [(1, 3, 2, 0), (1, 3, 1, 0)]
    h, w = torch.zeros(3, 0, requires_grad=True), torch.zeros(5, 0, requires_grad=True)
    torch.testing.assert_close(loss(h, w, backend).detach(), 3 * torch.tensor(5.0).log())


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_of_another_type(backend):
    """A bf16 activation under an fp32 norm weight, as mixed precision may leave it."""
    x, w, grad = draw(5, 70, dtype=torch.bfloat16), 1 + draw(70), draw(5, 70, dtype=torch.bfloat16)
    leaves = x.requires_grad_(), w.requires_grad_()
    out = rms_norm(*leaves, backend=backend)
    grads = torch.autograd.grad(out, leaves, grad)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    true = F.rms_norm(wide[0], (70,), wide[1], 1e-5)
    true_grads = torch.autograd.grad(true, wide, grad.double())
    assert [t.dtype for t in (out, *grads)] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for ours, exact, digits in zip((out, *grads), (true, *true_grads), (1e-2, 1e-2, 1e-6)):
        torch.testing.assert_close(ours.double(), exact, rtol=digits, atol=digits)


@EVERY
def test_autocast_leaves_the_digits_alone(name, backend):
    call, shapes = OPS[name]
    leaves = [draw(*s, seed=i).requires_grad_() for i, s in enumerate(shapes(5))]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = call(*leaves, backend=backend)
            found.append((out, *torch.autograd.grad(out.sum(), leaves)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_are_right_or_refused(backend):
    for name, (call, shapes) in OPS.items():
        leaves = [draw(*s, seed=i).double().requires_grad_() for i, s in enumerate(shapes(3))]
        narrow = [x.detach().float().requires_grad_() for x in leaves]
        (first,) = torch.autograd.grad(call(*narrow, backend=backend).square().sum(), narrow[:1], create_graph=True)
        if name == "rope" or (name == "swiglu" and backend == "torch"):
            second = torch.autograd.grad(first.square().sum(), narrow[:1])
            (exact,) = torch.autograd.grad(call(*leaves, backend="torch").square().sum(), leaves[:1], create_graph=True)
            true = torch.autograd.grad(exact.square().sum(), leaves[:1])
            torch.testing.assert_close(second[0].double(), true[0], rtol=1e-4, atol=1e-4)
        else:
            with pytest.raises(RuntimeError, match=r"second derivative|backward through megastage"):
                torch.autograd.grad(first.square().sum(), narrow[:1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_whose_square_overflows(backend):
    h, w = 1e10 * draw(4, 6), 1e10 * draw(5, 6)
    labels = torch.tensor([0, 1, 2, 4])
    ours = linear_cross_entropy(h, w, labels, backend=backend)
    torch.testing.assert_close(ours, F.cross_entropy(h @ w.mT, labels, reduction="sum"))


@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_loss_survive_other_backward_passes(dtype, factor):
    """On a CPU the last one hands over the buffers that forward filled."""
    h, w = (draw(n, 6, dtype=dtype).requires_grad_() for n in (5, 7))
    ours, other = (factor * loss(x, w, "torch") for x in (h, h.detach() * 2))
    wide = [x.detach().double().requires_grad_() for x in (h, w)]
    true = factor * F.cross_entropy(wide[0] @ wide[1].mT, torch.arange(5), reduction="sum")
    exact = torch.autograd.grad(true, wide)
    expected = torch.autograd.grad(ours, (h, w), retain_graph=True)
    digits = 1e-6 if dtype == torch.float32 else 1.5e-2
    for found, right in zip(expected, exact):
        torch.testing.assert_close(found.double(), right, rtol=digits, atol=digits)
    for _ in range(2):
        ours.backward(retain_graph=True)
    ours.backward()
    for x, once in zip((h, w), expected):
        torch.testing.assert_close(x.grad, 3 * once, rtol=digits, atol=digits)
    before = w.grad.clone()
    other.backward()
    twice = torch.autograd.grad(factor * loss(h.detach() * 2, w, "torch"), w)[0]
    torch.testing.assert_close(w.grad, before + twice, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_and_labels_in_int32(backend):
    q, k, h, w = draw(1, 3, 2, 8), draw(1, 3, 1, 8), draw(3, 6), draw(7, 6)
    places, labels = torch.tensor([[0, 9, 15]]), torch.tensor([6, -100, 2])
    found = [
        (*rope_qk(q, k, *TABLES, places.to(kind), backend=backend),
         linear_cross_entropy(h, w, labels.to(kind), backend=backend))
        for kind in (torch.int32, torch.int64)
    ]  # fmt: skip
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_positions_outside_the_tables_are_an_error_on_the_cpu():
    for position in (-1, 16):
        with pytest.raises(IndexError):
            rope_qk(draw(1, 1, 2, 8), draw(1, 1, 1, 8), *TABLES, torch.tensor([[position]]), backend="torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_of_tensors_with_gaps(backend):
    tensors = [draw(4, 6).T, draw(10)[::2], draw(1).expand(9)]
    exact = torch.cat([x.double().flatten() for x in tensors]).norm()
    torch.testing.assert_close(global_norm(tensors, backend=backend).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_optimizer_takes_numbers_as_tensors_and_shards_of_other_shapes(backend):
    found = []
    for step, lr, shape in ((7, 0.1, (6,)), (torch.tensor(7.0), torch.tensor(0.1, dtype=torch.float64), (2, 3))):
        lists = [[torch.linspace(0.1, 1, 6)] for _ in range(4)]
        lists[0][0] = lists[0][0].view(shape)
        scale = torch.tensor([0.5])
        adamw_(*lists, step=step, lr=lr, grad_scale=scale.view(()) if step == 7 else scale, backend=backend)
        found.append([x[0].flatten() for x in lists])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def flat(*kinds):
    return [[torch.ones(3, dtype=kind)] for kind in kinds]


FP32 = (torch.float32,) * 4
q, k, places = draw(1, 3, 2, 8), draw(1, 3, 1, 8), torch.arange(3)[None]
WRONG = [
    (lambda b: rms_norm(torch.tensor(1.0), torch.ones(1), backend=b), r"\(\) and \(1,\)"),
    (lambda b: rms_norm(torch.ones(2, 3).long(), torch.ones(3), backend=b), "int64"),
    (lambda b: rms_norm(torch.ones(2, 3), torch.ones(3, device=META), backend=b), "weight on meta"),
    (lambda b: add_rms_norm(torch.ones(2, 3), torch.ones(2, 3, device=META), torch.ones(3), backend=b), "meta"),
    (lambda b: add_rms_norm(torch.ones(2, 3), torch.ones(2, 3).half(), torch.ones(3), backend=b), "alike"),
    (lambda b: swiglu(torch.ones(2, 3), torch.ones(2, 3, device=META), backend=b), "up on meta"),
    (lambda b: swiglu(torch.ones(2, 3), torch.ones(2, 3).half(), backend=b), "alike"),
    (lambda b: rope_qk(q[0], k[0], *TABLES, places, backend=b), r"\(3, 2, 8\)"),
    (lambda b: rope_qk(q, k.half(), *TABLES, places, backend=b), "one type"),
    (lambda b: rope_qk(q, k, *TABLES, places.float(), backend=b), "positions in torch.float32"),
    (lambda b: rope_qk(q, k, *TABLES, places.to(META), backend=b), "positions on meta"),
    (lambda b: rope_qk(q, k, *(t.clone().requires_grad_() for t in TABLES), places, backend=b), "no gradient"),
    (lambda b: loss(draw(3, 6), draw(7, 6, dtype=torch.bfloat16), b), "cast"),
    (lambda b: linear_cross_entropy(draw(2, 6), draw(7, 6), torch.ones(2), backend=b), "labels are torch.float32"),
    (lambda b: linear_cross_entropy(draw(2, 6), draw(7, 6), torch.ones(2, device=META).long(), backend=b), "on meta"),
    (lambda b: global_norm([torch.ones(2), torch.ones(2, device=META)], backend=b), "meta"),
    (lambda b: adamw_(*flat(*FP32[:3]), [torch.ones(3, device=META)], step=1, lr=0.1, backend=b), "meta"),
    (lambda b: adamw_(*flat(torch.int64, *FP32[1:]), step=1, lr=0.1, backend=b), "int64"),
    (lambda b: adamw_(*flat(*FP32[:3], torch.bfloat16), step=1, lr=0.1, backend=b), "share one dtype"),
    (lambda b: adamw_(*flat(*FP32), step=1, lr=0.1, grad_scale=torch.ones(3), backend=b), r"one number, not \(3,\)"),
    (lambda b: adamw_(*flat(*FP32), step=1, lr=0.1, grad_scale=torch.ones((), device=META), backend=b), "meta"),
    (lambda b: adamw_(*flat(*FP32), step=1, lr=0.1, betas=(1.0, 0.9), backend=b), r"\(1.0, 0.9\)"),
    (lambda b: adamw_(*flat(*FP32), step=1, lr=0.1, eps=-1.0, backend=b), "-1.0"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("call", "message"), WRONG, ids=range(len(WRONG)))
def test_errors_name_what_was_given(call, message, backend):
    with pytest.raises(ValueError, match=message):
        call(backend)


def test_in_place_rotation_of_repeated_heads_is_refused():
    with pytest.raises(ValueError, match="no element twice"):
        rope_qk(q[:, :, :1].expand(1, 3, 2, 8), k, *TABLES, places, inplace=True, backend="triton")
