"""The offline gate: every shipped kernel compiles well for every architecture, and a poor one would be noticed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import kernel_tables
import pytest
from kernel_probe import bars, gate
from kernel_probe.report import Report

REPO = Path(__file__).resolve().parents[2]
COMPILED = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def run_gate(*arguments):
    command = [sys.executable, str(REPO / "tools" / "kernel_gate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=COMPILED, check=False)


def judged(tmp_path, *arguments):
    """Run the gate; returns its kernels after checking that none failed."""
    result = run_gate("--json", str(tmp_path / "gate.json"), *arguments)
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    return json.loads((tmp_path / "gate.json").read_text())["kernels"]


def test_fast_selection(tmp_path):
    kernels = judged(tmp_path, "--fast")
    seen = {(row["kernel"], row["case"], row["arch"]) for row in kernels}
    archs = ("sm_80", "sm_90", "sm_100", "gfx942")
    main = ("attention_forward", "attention_dq", "attention_dkv")
    assert {(op, f"bf16 D{D}", arch) for op in main for D in (64, 128) for arch in archs} <= seen
    ops = {"rms_norm_forward", "rms_norm_backward", "rope", "swiglu_forward", "swiglu_backward", "adamw"}
    ops |= {"cross_entropy_statistics", "cross_entropy_gradient", "sum_of_squares", "attention_delta", "intervals"}
    assert {(op, arch) for op in ops for arch in archs} <= {(op, arch) for op, _, arch in seen}


LAUNCHES = """if True:
    import sys
    from collections import Counter
    sys.path[:0] = [{repo!r}, {tools!r}]
    import torch
    from kernel_probe.launches import pretending, specs_of
    from megastage.kernels import flash_attention_cases as cases, swiglu_triton
    from megastage.kernels.registry import ARCHITECTURES, all_cases
    {body}
"""


def compiled_python(body):
    """Run Python where kernels are compiled and not interpreted."""
    code = LAUNCHES.format(repo=str(REPO), tools=str(REPO / "tools"), body=body.replace("\n", "\n    "))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=COMPILED, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_all_masks_launch_one_compiled_kernel():
    """Documents, windows, offsets and full attention cost what the causal mask costs where no bound cuts: their
    launches ask for the very same compiled kernel."""
    compiled_python("""
for arch in ARCHITECTURES:
    with pretending(arch) as requests:
        cases.run(D=128)
    launched = Counter(r["fn"].fn.__name__ for r in requests)
    assert all(launched[f"attention_{k}_kernel"] == len(cases.MASKS) == 5 for k in ("forward", "dq", "dkv")), launched
    plain = [(arch, c) for c in cases.gate_cases(arch)]
    forms = Counter((s.kernel, s.case) for s in specs_of(plain) if s.tensor)
    assert max(forms.values()) == 1, forms
""")


def test_a_launch_is_noted_as_triton_would_compile_it():
    compiled_python("""
x = torch.zeros(4, 96, dtype=torch.bfloat16)
with pretending("sm_90") as requests:
    swiglu_triton.forward(x, x)
    swiglu_triton.forward(x[:, :40], torch.zeros(4, 129, dtype=torch.bfloat16)[:, 1:41])
from kernel_probe.launches import spec_of
from megastage.kernels.registry import GateCase
aligned, odd = (spec_of(r, "sm_90", GateCase("c", lambda: None)) for r in requests)
assert aligned.name == "swiglu_forward [c] sm_90" and aligned.num_warps == 4
assert aligned.signature["up_ptr"] == "*bf16:16" and aligned.signature["F"] == "i32:16", aligned.signature
assert odd.signature["up_ptr"] == "*bf16" and odd.signature["F"] == "i32" and odd.signature["up_stride"] == "i32"
assert aligned.constants["BLOCK"] == 128 and odd.constants["BLOCK"] == 64
with pretending("gfx942") as requests:
    swiglu_triton.forward(x, x)
(amd,) = (spec_of(r, "gfx942", GateCase("c", lambda: None)) for r in requests)
assert amd.signature["up_ptr"] == "*bf16:16,range32", amd.signature
""")


def bar_problems(case, **loop):
    spec = SimpleNamespace(kernel="attention_forward", arch="sm_90", case=case)
    figures = {"nontensor_per_kflop": 0.45, "ceil_serial": 0.66, **loop}
    return "; ".join(bars.missed(spec, report(loop=figures)))


def test_static_bars():
    least_forward_ceiling = bars.BARS[("attention_forward", "sm_90")][1]
    most = {f"{kernel.removeprefix('attention_')} {arch}": bar[0] for (kernel, arch), bar in bars.BARS.items()}
    assert most == {
        "forward sm_90": 0.46,
        "dkv sm_90": 0.48,
        "dq sm_90": 0.385,
        "forward sm_80": 0.71,
        "dkv sm_80": 0.7,
    }
    assert least_forward_ceiling == 0.66
    assert bar_problems("bf16 D128", nontensor_per_kflop=0.46) == ""
    assert "0.461 non-MMA" in bar_problems("bf16 D128", nontensor_per_kflop=0.461)
    assert "ceiling 0.659" in bar_problems("bf16 D128", ceil_serial=0.659)
    assert bar_problems("bf16 D128 MHA", nontensor_per_kflop=0.48) == ""  # within 5 %
    assert "non-MMA" in bar_problems("bf16 D128 MHA", nontensor_per_kflop=0.49)
    assert bar_problems("bf16 D64", nontensor_per_kflop=0.8) == ""
    spec = SimpleNamespace(kernel="attention_dq", arch="sm_90", case="bf16 D128")
    cheap = {"nontensor_per_kflop": 0.3, "ceil_serial": 0.7}
    assert "2 spill" in "; ".join(bars.missed(spec, report(loop=cheap, spills=2)))  # outside the loop too


def assert_documented(kernels):
    """docs/kernels-gate.md and docs/kernels.md show what was just measured."""
    page = [
        line for name in ("kernels-gate", "kernels") for line in (REPO / "docs" / f"{name}.md").read_text().splitlines()
    ]
    lines = [line for group in kernel_tables.groups(kernels).values() for line in kernel_tables.table(group)]
    lines += kernel_tables.summary_table(kernels)
    stale = [line for line in lines if line not in page]
    assert not stale, "make the page anew: " + "\n".join(stale[:5])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_everything(tmp_path):
    assert_documented(judged(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_everything_on_the_other_triton(tmp_path):
    other = os.environ.get("MEGASTAGE_OTHER_TRITON", "")
    if not (Path(other) / "triton").is_dir():
        pytest.skip("set MEGASTAGE_OTHER_TRITON to a folder made by pip install --no-deps --target DIR triton==3.9.0")
    assert_documented(judged(tmp_path, "--triton", other))


def report(**changes):
    loop = {"mma": 8, "local": 0, "flop": 1e6, "total": 100, "tma": 1, "cp_async": 0, "load": 0}
    figures = {
        "name": "k", "target": "sm_90", "warps": 4, "stages": 2, "registers": 100, "spills": 0, "local_bytes": 0,
        "shared": 1024, "ctas_per_sm": 2, "warps_per_sm": 8, "limiter": "registers", "totals": {}, "loops": [loop],
        "widest_load": 16,
    }  # fmt: skip
    loop.update(changes.pop("loop", {}))
    return Report(**{**figures, **changes})


@pytest.mark.parametrize(
    ("changes", "tensor", "problem"),
    [
        ({}, True, None),
        ({}, False, None),
        ({"spills": 3}, True, None),  # outside the tensor loops
        ({"spills": 3}, False, "3 spill"),
        ({"loop": {"local": 5}}, True, "5 spill"),
        ({"serialised": 1}, True, "serialised"),
        ({"unpipelined": 1}, True, "plain loads"),
        ({"ctas_per_sm": 0}, True, "does not fit"),
        ({"ctas_per_sm": 0}, False, "does not fit"),
        ({"widest_load": 4}, False, "4 B"),
        ({"loops": []}, True, "no tensor loop"),
    ],
)
def test_judgement(changes, tensor, problem):
    problems = gate.judge(report(**changes), tensor)
    assert (problem is None and not problems) or (problem is not None and problem in "; ".join(problems))


def test_exact_forms_must_only_fit():
    slow = {"spills": 900, "loop": {"local": 80}, "unpipelined": 1}
    assert gate.judge(report(**slow), tensor=True, exact=True) == []
    assert "does not fit" in gate.judge(report(**slow, ctas_per_sm=0), tensor=True, exact=True)[0]


POOR_KERNELS = """
import triton, triton.language as tl
@triton.jit
def narrow(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK) * stride
    tl.store(out_ptr + lane, tl.load(x_ptr + lane))
@triton.jit
def broken(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr, undefined_name)
"""


def test_poor_kernels_fail_and_results_are_cached(tmp_path):
    (tmp_path / "poor_kernels.py").write_text(POOR_KERNELS)
    code = f"""if True:
        import sys
        from pathlib import Path
        sys.path[:0] = [{str(tmp_path)!r}, {str(REPO)!r}, {str(REPO / "tools")!r}]
        import poor_kernels
        from kernel_probe import gate
        from kernel_probe.example import causal_forward
        from megastage.kernels.registry import KernelSpec
        types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16:16")
        types |= {{"lse_ptr": "*fp32:16", "scale": "fp32"}}
        types |= dict.fromkeys(("head_stride", "row_stride", "N"), "i32:16")
        shape = {{"D": 128, "ROWS": 128, "COLUMNS": 128}}
        pointers = {{"x_ptr": "*bf16:16", "out_ptr": "*bf16:16", "stride": "i32"}}
        specs = [
            KernelSpec("spills", "", "sm_90", causal_forward, types, shape, 4, 3, tensor=True),
            KernelSpec("narrow", "", "sm_80", poor_kernels.narrow, pointers, {{"BLOCK": 1024}}, 4),
            KernelSpec("broken", "", "sm_80", poor_kernels.broken, pointers, {{"BLOCK": 1024}}, 4),
        ]
        cache = Path({str(tmp_path / "cache")!r})
        first, again = gate.run(specs, cache, 1), gate.run(specs, cache, 1)
        for verdict in first:
            print(verdict.name, verdict.problems)
        assert all(verdict.problems for verdict in first)
        assert [v.cached for v in first] == [False] * 3
        assert [v.cached for v in again] == [True, True, False]
        assert [v.problems for v in again] == [v.problems for v in first]
        changed = KernelSpec("narrow", "", "sm_80", poor_kernels.narrow, pointers, {{"BLOCK": 512}}, 4)
        assert gate.source_key(changed) != gate.source_key(specs[1])
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=COMPILED, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "does not fit" in result.stdout or "spill" in result.stdout
    assert "at once" in result.stdout
    assert "does not compile" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--arch", "sm_75"), "sm_75"), (("--kernel", "nosuch"), "nosuch"), (("--triton", "/nonexistent"), "nonexistent")],
)
def test_bad_arguments(arguments, message):
    result = run_gate(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
