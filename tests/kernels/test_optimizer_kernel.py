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
    [*product(*[(torch.float32, torch.bfloat16)] * 2, (False, True))],
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


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_two_hundred_steps_stay_as_near_to_float64_as_torchs(backend, decay):
    """Errors add up over a run: they may be twice those of torch.optim.AdamW in fp32, no more."""
    steps, options = 200, {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay}
    generator = torch.Generator().manual_seed(4)
    start = torch.randn(512, generator=generator)
    exact, theirs = (start.to(dtype).requires_grad_() for dtype in (torch.float64, torch.float32))
    optimizers = [torch.optim.AdamW([p], **options) for p in (exact, theirs)]
    mine, mean, square = start.clone(), torch.zeros(512), torch.zeros(512)
    for step in range(1, steps + 1):
        grad = torch.randn(512, generator=generator) * 10.0 ** (step % 5 - 3)
        exact.grad, theirs.grad = grad.double(), grad
        for optimizer in optimizers:
            optimizer.step()
        adamw_([mine], [grad], [mean], [square], step=step, backend=backend, **options)
    for ours, name in ((mine, None), (mean, "exp_avg"), (square, "exp_avg_sq")):
        true, torchs = ((p if name is None else o.state[p][name]) for o, p in zip(optimizers, (exact, theirs)))
        error, torch_error = ((x.detach().double() - true.detach()).abs().max() for x in (ours, torchs))
        assert error <= 2 * torch_error


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("sign", [1, -1])
def test_stochastic_rounding_has_the_mean_and_the_variance_it_should(backend, sign):
    """Values at every eighth of a bf16 step: the share that goes up is that eighth, so mean and variance follow."""
    n, step = 4000, 2.0**-7  # of bf16 between 1 and 2
    parts = torch.arange(8) / 8
    value = (sign * (1 + parts * step)).repeat_interleave(n)
    mean = torch.zeros(8 * n, dtype=torch.bfloat16)
    # with beta1 = 0 the first moment is the gradient, so that what is stored is `value` rounded
    adamw_(
        [torch.ones(8 * n)], [value], [mean], [mean.clone()], step=1, lr=0.0, betas=(0.0, 0.95), weight_decay=0.0,
        stochastic_rounding=True, seed=11, backend=backend,
    )  # fmt: skip
    away = (mean.float().abs() > 1).view(8, n)
    assert set(mean.float().tolist()) == {sign * 1.0, sign * (1 + step)}
    up = away.double().mean(1)
    assert ((up - parts).abs() <= 4.5 * (parts * (1 - parts) / n).sqrt()).all()
    assert up[0] == 0  # what bf16 holds is kept
    noise = away.double() - up[:, None]
    neighbours = (noise[:, 1:] * noise[:, :-1]).mean(1)
    assert (neighbours.abs() <= 4.5 * parts * (1 - parts) / n**0.5).all()  # elements round independently


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_roundings_of_other_seeds_and_of_other_shards_are_independent(backend):
    def rounded(seed, shards=2):
        lists = [[torch.full((4096,), x).bfloat16() for _ in range(shards)] for x in (1.0, 1.0, 0.0, 0.0)]
        adamw_(*lists, step=1, lr=2.0**-9, eps=0.0, weight_decay=0.0, stochastic_rounding=True, seed=seed,
               backend=backend)  # fmt: skip
        return [(x != 1).double() - 0.5 for x in lists[0]]

    first, again, other = rounded(5), rounded(5), rounded(6)
    assert all(map(torch.equal, first, again))
    for a, b in ((first[0], first[1]), (first[0], other[0]), (first[1], other[1]), (first[0], other[1])):
        assert (4 * (a * b).mean()).abs() < 4.5 / 4096**0.5


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
