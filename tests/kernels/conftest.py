"""Kernel tests import the probe in tools/ and helpers beside them."""

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
if str(TOOLS) not in sys.path:
    sys.path.insert(0, str(TOOLS))


@pytest.fixture
def guard():
    """Kernels of this test may touch only the tensors they are given; bf16 is rounded as on a GPU."""
    from memory_guard import bf16_rounded, memory_guard

    with memory_guard() as active, bf16_rounded():
        yield active
