"""Which back end runs is decided in one place, and says why when it cannot."""

import subprocess
import sys

import pytest
import torch

from megastage.kernels import dispatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("backend", "device", "has_triton", "interpret", "expected"),
    [
        ("auto", CPU, True, "1", "torch"),
        ("auto", CPU, False, "0", "torch"),
        ("auto", CUDA, True, "0", "triton"),
        ("auto", CUDA, False, "0", "torch"),
        ("torch", CUDA, True, "0", "torch"),
        ("triton", CUDA, True, "0", "triton"),
        ("triton", CPU, True, "1", "triton"),
    ],
)
def test_resolve(monkeypatch, backend, device, has_triton, interpret, expected):
    monkeypatch.setattr(dispatch, "HAS_TRITON", has_triton)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert dispatch.resolve(backend, device, "rope") == expected


@pytest.mark.parametrize(
    ("backend", "device", "has_triton", "message"),
    [
        ("triton", CPU, True, "TRITON_INTERPRET=1"),
        ("triton", CUDA, False, "not installed"),
        ("cuda", CPU, True, "auto, triton, torch"),
        ("triton", torch.device("meta"), True, "meta"),
    ],
)
def test_errors_name_the_key_the_value_and_the_way_out(monkeypatch, backend, device, has_triton, message):
    monkeypatch.setattr(dispatch, "HAS_TRITON", has_triton)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=message) as caught:
        dispatch.resolve(backend, device, "rope")
    assert "kernels.rope" in str(caught.value)
    assert backend in str(caught.value)


def test_describe_lists_every_op_once(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    lines = dispatch.describe({"rope": "triton", "swiglu": "auto", "rms_norm": "torch"}, "cpu")
    assert "interpreter" in lines[0]
    assert lines[1:] == ["  triton: rope", "  torch: rms_norm, swiglu"]


def test_importing_the_ops_does_not_import_triton():
    code = (
        "import sys, megastage.kernels.rms_norm, megastage.kernels.rope, megastage.kernels.swiglu, "
        "megastage.kernels.linear_cross_entropy, megastage.kernels.dispatch; "
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
