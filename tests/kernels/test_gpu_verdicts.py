"""What the GPU benchmark lets pass and what it refuses, in bf16 on the CPU path and with faults in the kernels."""

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from gpu_cases import OPS, TOY, Case, Place, Sizes, make_case
from gpu_checks import FORMS, TOY_FORMS, attention_check, check_makers
from gpu_judge import compare, errors, problems

CPU = torch.device("cpu")
TOY_CPU = Place(TOY, CPU, torch.float32, "torch")
BF16_CPU = Place(Sizes(4, 2, 64, 256, 320, 1000, 300), CPU, torch.bfloat16, "torch")


def test_every_case_makes_sense():
    for op, (_, ways) in OPS.items():
        case = make_case(op, 65, TOY_CPU)
        assert tuple(case.ways) == ways
        assert ways[0] == "ours"
        assert case.bytes > 0
        assert problems(errors(case)) == []


@pytest.mark.parametrize("form", check_makers(TOY_CPU))
def test_every_form_is_checked_against_its_definition(form):
    case = check_makers(TOY_CPU)[form]()
    assert case.op == form
    rows = errors(case)
    assert rows
    assert problems(rows) == []
    right = case.ways["ours"]
    case.ways["ours"] = lambda *inputs: tuple(x * 1.1 for x in right(*inputs))
    assert problems(errors(case))


@pytest.mark.parametrize("form", ["head dim 64", "second half of a row", "softcap", "one token"])
def test_right_attention_passes_in_bf16(form):
    assert problems(errors(attention_check(form, FORMS[form], BF16_CPU, False))) == []


def grads_changed(change):
    """A way of ours whose results are right and whose gradients of the inputs pass through `change` first."""

    def planted(right):
        def ours(*inputs):
            hooked = [x.clone() for x in inputs]
            for i, x in enumerate(hooked):
                x.register_hook(lambda grad, i=i: change(i, grad.clone()))
            return right(*hooked)

        return ours

    return planted


def results_changed(change):
    return lambda right: lambda *inputs: change(*right(*inputs))


def scaled(index, where, factor):
    """Gradient number `index` is wrong at `where`."""

    def change(i, grad):
        if i == index:
            grad[where] *= factor
        return grad

    return change


def last_tokens(out, lse):
    """Sixteen late tokens are off by a twentieth: as if they had missed a few of their keys."""
    factor = torch.ones(out.shape[1], dtype=out.dtype)
    factor[-16:] = 0.95
    return out * factor[None, :, None, None], lse


FAULTS = {
    "late tokens": results_changed(last_tokens),
    "heads of a group swapped": results_changed(lambda out, lse: (out[:, :, [1, 0, *range(2, out.shape[2])]], lse)),
    "no gradient through lse": results_changed(lambda out, lse: (out, lse.detach() + 0 * lse)),
    "lse in other units": results_changed(lambda out, lse: (out, lse * 1.4427)),
    "dq of the last tokens": grads_changed(scaled(0, (slice(None), slice(-16, None)), 0.9)),
    "dk of one key/value head": grads_changed(scaled(1, (slice(None), slice(None), 1), 0.9)),
    "dv of one head in two": grads_changed(scaled(2, (slice(None), slice(None), 0), 0.5)),
    "dv of late keys": grads_changed(scaled(2, (0, slice(-16, None)), 0.9)),
    "sink": grads_changed(scaled(3, (slice(None),), 0.9)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_refused_in_bf16(fault):
    case = attention_check("head dim 64", FORMS["head dim 64"], BF16_CPU, False)
    case.ways["ours"] = FAULTS[fault](case.ways["ours"])
    assert problems(errors(case))


@pytest.mark.parametrize(
    ("form", "change"),
    [
        ("window", {"window": 131}),
        ("window", {"window": 129}),
        ("softcap", {"softcap": 3.1}),
        ("second half of a row", {"q_offset": 511}),
        ("head dim 64", {"causal": False}),
        ("head dim 64", {"scale": 0.13}),
    ],
)
def test_other_options_are_refused_in_bf16(form, change):
    T, S, H, K, D, options = FORMS[form]
    case = attention_check(form, FORMS[form], BF16_CPU, False)
    wrong = attention_check(form, (T, S, H, K, D, {**options, **change}), BF16_CPU, False)
    case.ways["ours"] = wrong.ways["ours"]
    assert problems(errors(case))


def moved(low, high, for_keys):
    """Intervals of queries (or of keys) whose bounds are off by one."""
    from megastage.kernels import _attention_launch as launch

    right = launch.intervals

    def wrong(*args, **options):
        found = right(*args, **options)
        return (found[0] + low, found[1] + high, found[2]) if options["for_keys"] == for_keys else found

    return mock.patch.object(launch, "intervals", wrong)


def constant(kernel, **constants):
    """One of the backward kernels, compiled with other constants than it should be."""
    from megastage.kernels import _attention_launch as launch

    right = getattr(launch.backward_kernels, kernel)
    stub = mock.MagicMock()
    stub.__getitem__.side_effect = lambda grid: lambda *args, **given: right[grid](*args, **{**given, **constants})
    return mock.patch.object(launch.backward_kernels, kernel, stub)


@pytest.mark.parametrize(
    ("plant", "wrong_results"),
    [
        (lambda: moved(0, -1, False), {0, 1, 2}),
        (lambda: moved(1, 0, False), {0, 1, 2}),
        (lambda: moved(0, -1, True), {3, 4}),
        (lambda: moved(1, 0, True), {3, 4}),
        (lambda: constant("attention_delta_kernel", HAS_DLSE=False), {2, 3, 5}),
        (lambda: constant("attention_dq_kernel", SOFTCAP=False), {2}),
        (lambda: constant("attention_dkv_kernel", SOFTCAP=False), {3, 4}),
    ],
)
def test_faults_inside_the_kernels_are_refused(plant, wrong_results):
    """In the interpreter; results are out, lse, dq, dk, dv, dsink."""
    form = "second half of a row, window, softcap"
    case = attention_check(form, TOY_FORMS[form], TOY_CPU._replace(back="triton"), False)
    with plant():
        rows = errors(case)
    assert {row["result"] for row in rows if problems([row])} >= wrong_results


def test_small_numbers_behind_large_ones_are_judged_by_their_own_size():
    """An error of a tenth in late tokens is no larger than what rounding does to the first ones."""
    true = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 1 / 64, 4096)[:, None]
    their = (true * (1 + 2**-9)).bfloat16()
    our = true.clone()
    our[-64:] *= 1.1
    found = compare(our.bfloat16(), their, true, 2)
    assert found["share"] <= 1
    assert found["stretch_share"] > 1
    assert compare(true.bfloat16(), their, true, 2)["stretch_share"] < 1


def test_nan_and_other_bits_are_refused():
    x = torch.randn(8, 5)
    plain = lambda x: (x.exp(),)
    nan = {"ours": lambda x: (torch.where(x == x[0, 0], float("nan"), x.exp()),), "plain": plain}
    assert len(problems(errors(Case("op", 8, (x,), nan)))) >= 1
    calls = iter(range(10))
    drifts = {"ours": lambda x: (x.exp() * (1 + 1e-7 * next(calls)),), "plain": plain}
    assert any("other bits" in problem for problem in problems(errors(Case("op", 8, (x,), drifts))))
