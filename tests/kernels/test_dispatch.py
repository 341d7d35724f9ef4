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


def test_the_ops_work_without_triton_installed():
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import torch
        from megastage.kernels import dispatch
        from megastage.kernels.global_norm import global_norm
        from megastage.kernels.linear_cross_entropy import linear_cross_entropy
        from megastage.kernels.optimizer import adamw_
        from megastage.kernels.rms_norm import rms_norm
        from megastage.kernels.rope import rope_qk
        from megastage.kernels.swiglu import swiglu
        x = torch.ones(2, 4)
        assert rms_norm(x, torch.ones(4)).shape == swiglu(x, x).shape
        linear_cross_entropy(x, x, torch.tensor([0, 1]))
        adamw_(*[[x.flatten()] for _ in range(4)], step=1, lr=0.1)
        assert not dispatch.HAS_TRITON
        try:
            swiglu(x, x, backend="triton")
        except ValueError as error:
            assert "not installed" in str(error)
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
