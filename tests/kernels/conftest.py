"""Without a GPU, Triton kernels run in Triton's interpreter; it is switched on before Triton is first imported."""

import os
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[2]
for folder in (REPO, REPO / "tools"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

if not torch.cuda.is_available():
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", (
        "triton was imported before its interpreter was switched on: run tests/kernels first or set TRITON_INTERPRET=1"
    )
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def guard():
    """Kernels of this test may touch only the tensors they are given."""
    from memory_guard import memory_guard

    with memory_guard() as active:
        yield active
