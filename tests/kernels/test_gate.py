"""The offline gate: every shipped kernel compiles well for every architecture, and a poor one would be noticed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_probe import gate
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
    seen = {(row["report"]["name"].split(" [")[0], row["report"]["target"]) for row in kernels}
    ops = {"rms_norm", "rms_norm_backward", "rope", "swiglu", "swiglu_backward", "cross_entropy_statistics"}
    ops |= {"cross_entropy_gradient", "adamw", "global_norm"}
    assert {(op, arch) for op in ops for arch in ("sm_80", "sm_90", "sm_100", "gfx942")} <= seen


@pytest.mark.slow
def test_everything(tmp_path):
    judged(tmp_path)


@pytest.mark.slow
def test_everything_on_the_other_triton(tmp_path):
    other = os.environ.get("MEGASTAGE_OTHER_TRITON", "")
    if not (Path(other) / "triton").is_dir():
        pytest.skip("set MEGASTAGE_OTHER_TRITON to a folder made by pip install --no-deps --target DIR triton==3.9.0")
    judged(tmp_path, "--triton", other)


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
