"""The GPU benchmark as far as it goes without one: its dry run, its verdict on wrong results, its arguments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "benchmarks"))

import gpu  # noqa: E402
from gpu_cases import TOY, Case, case_makers, document_ends  # noqa: E402
from gpu_checks import check_makers  # noqa: E402

OPS = {
    "attention, causal", "attention, documents", "linear cross-entropy", "rms_norm", "add + rms_norm", "rope", "swiglu",
    "adamw", "global norm",
}  # fmt: skip


def test_dry_run(tmp_path):
    command = [sys.executable, str(REPO / "benchmarks" / "gpu.py"), "--dry-run", "--out", str(tmp_path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 problems" in result.stdout
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["op"] for row in rows} == OPS
    assert all(row["forward_ms"] > 0 for row in rows if row["way"].startswith("ours"))
    assert all("did_not_run" in row or row["forward_ms"] > 0 for row in rows)
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


def test_a_wrong_kernel_is_not_timed():
    x = torch.randn(8, 5)
    plain = lambda x: (x.exp(),)
    assert not gpu.check(Case("op", 8, (x,), {"ours": plain, "plain": plain}))
    wrong = {"ours": lambda x: (x.exp() * (1 + 1e-4),), "plain": plain}
    problems = gpu.check(Case("op", 8, (x,), wrong))
    assert len(problems) == 2  # the result and its gradient
    assert "8 tokens" in problems[0]


def test_every_case_makes_sense():
    cpu = torch.device("cpu")
    for make in case_makers(65, TOY, cpu, torch.float32, "torch"):
        made = make()
        for case in made if isinstance(made, list) else [made]:
            assert next(iter(case.ways)) == "ours"
            assert case.bytes > 0
            assert gpu.check(case) == []


def test_failures_keep_their_reason():
    def fails(x):
        raise RuntimeError("no such back end\nmore")

    row = gpu.measure(Case("op", 8, (torch.ones(2),), {"ours": fails}), "ours", torch.device("cpu"))
    assert row["did_not_run"] == "RuntimeError: no such back end"
    assert "no such back end" in gpu.table([row])


def test_an_error_of_any_kind_is_a_problem_or_a_row_and_not_the_end():
    class BackEndError(Exception):
        pass

    def fails(*inputs):
        raise BackEndError("no such chip")

    case = Case("op", 8, (torch.ones(2),), {"ours": fails, "plain": lambda x: (x,)})
    assert gpu.check(case) == ["op, 8 tokens: BackEndError: no such chip"]
    missing = gpu.absent("optimizer_cases", 131072, torch.OutOfMemoryError("too large"))
    assert gpu.check(missing) == []
    assert "too large" in gpu.measure(missing, "all", torch.device("cpu"))["did_not_run"]


@pytest.mark.parametrize("make", check_makers(TOY, torch.device("cpu"), torch.float32, "torch"))
def test_every_form_of_attention_is_checked_against_its_definition(make):
    case = make()
    assert gpu.check(case) == []
    right = case.ways["ours"]
    case.ways["ours"] = lambda *inputs: tuple(x * 1.1 for x in right(*inputs))
    assert gpu.check(case)


def test_unknown_ops_are_an_error(capsys):
    assert gpu.main(["--dry-run", "--ops", "nosuch"]) == 2
    assert "nosuch" in capsys.readouterr().out


def test_documents_cover_the_row():
    ends = document_ends(5000, 300)
    assert ends[0] == 0
    assert ends[-1] == 5000
    assert ends == sorted(set(ends))
    assert 10 < len(ends) < 40


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message of a machine without CUDA")
def test_arguments(capsys):
    for argv, message in (([], "--dry-run"), (["--dry-run", "--lengths", "0"], "--lengths 0")):
        with pytest.raises(SystemExit):
            gpu.main(argv)
        assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_bf16_is_right_on_this_gpu():
    assert gpu.main(["--check-only"]) == 0
