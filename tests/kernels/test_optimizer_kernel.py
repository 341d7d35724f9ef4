"""AdamW against PyTorch's, and stochastic rounding against the statistics it promises."""

from itertools import product
from unittest import mock

import pytest
import torch

from megastage.kernels import multi_tensor
from megastage.kernels.optimizer import adamw_, random_words

pytestmark = pytest.mark.usefixtures("guard")
SIZES = (1, 7, 1024, 2500)


def lists(param=torch.float32, state=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda dtype: [torch.randn(n, generator=generator).to(dtype) for n in SIZES]
    return [draw(param), draw(param), draw(state), [x.abs() for x in draw(state)]]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_follows_torch_adamw(backend):
    params, grads, _, _ = lists()
    means, squares = ([torch.zeros_like(p) for p in params] for _ in range(2))
    theirs = [p.clone().double().requires_grad_() for p in params]
    options = {"lr": 3e-2, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.3}
    optimizer = torch.optim.AdamW(theirs, **options)
    clip = torch.tensor(0.25)
    for step in range(1, 6):
        for their, grad in zip(theirs, grads):
            their.grad = grad.double() * 0.25
        optimizer.step()
        adamw_(params, grads, means, squares, step=step, grad_scale=clip, backend=backend, **options)
        grads = [g.roll(1) * 1.5 for g in grads]
    for ours, their in zip(params, theirs):
        torch.testing.assert_close(ours.double(), their.detach(), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize(
    ("param", "state", "stochastic"),
    # rounding to nearest bf16 is not modelled by the interpreter
    [(torch.float32, torch.float32, False), *product(*[(torch.float32, torch.bfloat16)] * 2, (True,))],
)
def test_back_ends_draw_the_same_numbers(param, state, stochastic):
    found = []
    for backend in ("triton", "torch"):
        mine = lists(param, state)
        adamw_(*mine, step=2, lr=0.1, stochastic_rounding=stochastic, seed=1, backend=backend)
        found.append([x.float() for tensors in (mine[0], mine[2], mine[3]) for x in tensors])
    apart = torch.cat([(a - b).abs() > 1e-6 for a, b in zip(*found)])
    assert apart.float().mean() < 1e-3  # an fp32 result one ulp apart may round to another bf16
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-6)


def test_every_list_has_its_own_dtype():
    """bf16 parameters with fp32 gradients and states, as a mixed-precision reduction leaves them; and the other way."""
    kinds = (torch.bfloat16, torch.float32)
    found = []
    for backend in ("triton", "torch"):
        (wide, grads, means, squares), (narrow, *_) = lists(), lists(torch.bfloat16)
        mixed = [[*narrow, *wide], [*grads, *(g.bfloat16() for g in grads)]]
        mixed += [[x.clone() for x in (*states, *states)] for states in (means, squares)]
        # stochastic: rounding to nearest bf16 is not modelled by the interpreter
        adamw_(*mixed, step=2, lr=0.1, stochastic_rounding=True, seed=3, backend=backend)
        assert [x.dtype for x in mixed[0]] == [kind for kind in kinds for _ in SIZES]
        found.append([x.float() for tensors in (mixed[0], *mixed[2:]) for x in tensors])
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_parameters_that_require_gradients_are_updated_in_place(backend):
    parameter = torch.ones(5, requires_grad=True)
    parameter.square().sum().backward()
    adamw_([parameter], [parameter.grad], [torch.zeros(5)], [torch.zeros(5)], step=1, lr=0.1, backend=backend)
    assert (parameter < 0.95).all()
    assert parameter.is_leaf


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_stochastic_rounding_keeps_the_mean_where_nearest_stalls(backend):
    """2000 elements at 1, an update of 1/10 of a bf16 step below 1: a tenth of them must move, and only by one step."""
    n, move = 2000, 2**-8 / 10
    for stochastic in (True, False):
        param, grad = torch.ones(n).bfloat16(), torch.ones(n).bfloat16()
        mean, square = torch.zeros(n), torch.zeros(n)
        if not stochastic and backend == "triton":
            continue
        adamw_(
            [param], [grad], [mean], [square], step=1, lr=move, eps=0.0, weight_decay=0.0,
            stochastic_rounding=stochastic, seed=12, backend=backend,
        )  # fmt: skip
        moved = (param != 1).float().mean().item()
        assert set(param.float().tolist()) <= {1.0, 1 - 2**-8}
        assert moved == 0 if not stochastic else abs(moved - 0.1) < 4 * (0.09 / n) ** 0.5


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_infinities_and_nan_survive_stochastic_rounding(backend):
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0]).bfloat16()
    zero = torch.zeros(4)
    adamw_(
        [values], [zero.bfloat16()], [zero.clone()], [zero + 1], step=1, lr=0.1, weight_decay=0.0,
        stochastic_rounding=True, seed=3, backend=backend,
    )  # fmt: skip
    assert values[0] == float("inf")
    assert values[1] == -float("inf")
    assert values[2].isnan()
    assert values[3] == 1


def test_random_words_are_well_spread():
    first, more = random_words(1 << 16, place=3, seed=99)
    for word in (first & 0xFFFF, first >> 16, more & 0xFFFF):
        counts = torch.bincount(word >> 8, minlength=256).double()
        chi2 = ((counts - 256).square() / 256).sum()
        assert 160 < chi2 < 370  # 255 degrees of freedom, six standard deviations
    assert (first == random_words(1 << 16, place=4, seed=99)[0]).float().mean() < 1e-3
    assert (first == random_words(1 << 16, place=3, seed=100)[0]).float().mean() < 1e-3
    correlation = torch.corrcoef(torch.stack((first.double(), more.double(), first.roll(1).double())))
    assert (correlation - torch.eye(3)).abs().max() < 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [({"step": 0}, "step = 0"), ({"seed": -1}, "seed = -1"), ({"seed": 2**31}, "2\\^31"), ({}, "match")],
)
def test_errors(change, message):
    mine = lists()
    if not change:
        mine[1].pop()
    with pytest.raises(ValueError, match=message):
        adamw_(*mine, **{"step": 1, "lr": 0.1, **change})


def test_strided_shards_are_refused():
    mine = lists()
    mine[0][2] = torch.zeros(2048)[::2]
    with pytest.raises(ValueError, match="contiguous"):
        adamw_(*mine, step=1, lr=0.1)


@pytest.mark.parametrize("place", range(5))
def test_tensors_on_two_devices_are_an_error_and_not_an_access_to_foreign_memory(place):
    tensors = [torch.ones(5) for _ in range(4)] + [torch.ones(())]
    tensors[place] = tensors[place].to("meta")
    with pytest.raises(ValueError, match="cpu, meta"):
        adamw_(*([x] for x in tensors[:4]), step=1, lr=0.1, grad_scale=tensors[4])


def test_addresses_go_to_a_gpu_without_waiting_for_it():
    """From pinned memory: a copy from pageable memory stops the host until the GPU has done all that came before."""
    device = torch.device("cuda")
    gradient = mock.Mock(wraps=torch.ones(8), device=device, shape=(8,), **{"data_ptr.return_value": 32})
    with mock.patch.object(torch, "tensor") as tensor, mock.patch.object(multi_tensor, "_parts"):
        table = multi_tensor.build([[gradient]], 8)
    assert table.aligned
    tensor.assert_called_once_with([[32]], dtype=torch.int64, pin_memory=True)
    tensor.return_value.to.assert_called_once_with(device, non_blocking=True)
