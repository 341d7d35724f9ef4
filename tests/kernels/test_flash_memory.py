"""What the kernels may touch: guard regions, garbage in padding, offsets beyond 2^31, descriptors, slices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flash_oracle import DEVICE, Case, check, results, run_backend

from megastage.kernels import _attention_launch as launch
from megastage.kernels import _attention_tuning as tuning
from megastage.kernels._attention_reference import Geometry, key_intervals
from megastage.kernels.flash_attention import attention

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="reads and poisons memory under Triton's interpreter")
GUARD = 4096
CASE = Case(B=2, T=75, S=75, H=4, K=2, D=24, cu=((0, 20, 21, 60, 60), (0, 33, 33, 33, 33)))
PLAIN = Geometry(causal=True, scale=0.2, q_offset=0, window=0, softcap=0.0)


def guarded(x: torch.Tensor, poison: float) -> torch.Tensor:
    """x inside a larger buffer whose other elements are poison."""
    buffer = torch.full((x.numel() + 2 * GUARD,), poison, dtype=x.dtype)
    view = buffer[GUARD : GUARD + x.numel()].view(x.shape)
    view.copy_(x)
    return view


def guards(x: torch.Tensor) -> torch.Tensor:
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return torch.cat((whole[:GUARD], whole[-GUARD:]))


def poisoned_run(case: Case, monkeypatch) -> list[torch.Tensor]:
    """Forward and backward with every buffer between guards of NaN (large integers for bounds)."""
    made: list[torch.Tensor] = []

    def empty(*size, dtype=torch.float32, device=None):
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        poison = float("nan") if dtype.is_floating_point else 2**30
        made.append(guarded(torch.full(tuple(shape), poison, dtype=dtype), poison))
        return made[-1]

    monkeypatch.setattr(launch.torch, "empty", empty)
    x = {n: guarded(t, float("nan")) for n, t in case.inputs(torch.float32).items()}
    cu = guarded(case.cu_seqlens(), 2**30)
    geometry = Geometry(case.causal, 0.2, case.q_offset, case.window or 0, case.softcap or 0.0)
    out, lse, stats = launch.forward(x["q"], x["k"], x["v"], cu, None, geometry)
    dout, dlse = (guarded(t.float(), float("nan")) for t in case.cotangents())
    grads = launch.backward(dout, dlse, x["q"], x["k"], x["v"], out, lse, stats, cu, None, geometry)
    monkeypatch.undo()
    for buffer in made:
        edge = guards(buffer)
        assert edge.isnan().all() if edge.is_floating_point() else edge.eq(2**30).all(), "a guard was overwritten"
    return [out, lse, *grads[:3]]


@pytest.mark.parametrize(
    "case", [CASE, Case(T=70, S=33, cu=((-5, 20, 90),), q_offset=-9, causal=False, window=9)], ids=["rows", "offset"]
)
def test_guards_stay_whole_and_unread(case, monkeypatch):
    found = poisoned_run(case, monkeypatch)
    for tensor in found:
        assert not tensor.isnan().any(), "an element was not written, or a guard was read"


PADDED = {
    "plain": CASE,
    "full": replace(CASE, causal=False),
    "window": replace(CASE, window=9),
    "window, full": replace(CASE, window=9, causal=False),
    "window past the document": replace(CASE, window=50),
    "softcap": replace(CASE, softcap=3.0),
    "sink": replace(CASE, sink=True),
    "everything": replace(CASE, window=9, softcap=3.0, sink=True),
    "everything, full": replace(CASE, window=9, softcap=3.0, sink=True, causal=False),
    "slice of queries": replace(CASE, T=60, q_offset=15, window=9, sink=True),
}


def padding(case: Case, x: torch.Tensor, name: str) -> list[slice]:
    """What of each row of `x` lies behind its documents."""
    first = 0 if name in ("k", "v") else case.q_offset
    assert case.cu is not None
    return [slice(max(bounds[-1] - first, 0), x.shape[1]) for bounds in case.cu]


def spoiled(case: Case, x: torch.Tensor, name: str) -> torch.Tensor:
    dirty = x.clone()
    for row, tail in zip(dirty, padding(case, x, name)):
        row[tail] = float("nan")
    return dirty


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in PADDED), ("everything", torch.float16)]
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_garbage_in_the_padding_tail_changes_nothing(backend, name, dtype):
    case = PADDED[name]
    clean = case.inputs(dtype)
    dout, dlse = (x.to(dtype) for x in case.cotangents())
    garbage = spoiled(case, dout, "out")
    expected = results(clean, run_backend(case, backend), torch.where(garbage.isnan(), 0, dout), dlse)
    dirty = {n: x if n == "sink" else spoiled(case, x, n) for n, x in clean.items()}
    found = results(dirty, run_backend(case, backend), garbage, dlse)
    for key, x in found.items():
        assert torch.equal(x, expected[key]), key
        if key not in ("lse", "dsink"):
            for row, tail in zip(x, padding(case, x, key.removeprefix("d"))):
                assert row[tail].eq(0).all(), key


def test_offsets_beyond_31_bits():
    """Batch and head strides put the second half past 2^31 elements; int32 arithmetic would wrap to other memory."""
    far = 2**31 + 64
    shape, strides = (2, 18, 2, 16), (far, 32, 16, 1)
    storage = torch.empty(far + 18 * 32, dtype=torch.float16)  # pages never touched take no memory
    x = storage.as_strided(shape, strides)
    small = torch.randn(shape).half()
    x.copy_(small)
    found = launch.forward(x, x, x, None, None, PLAIN)
    expected = launch.forward(small, small, small, None, None, PLAIN)
    for mine, right in zip(found, expected):
        assert torch.equal(mine, right)
    dout = torch.randn(shape).half()
    grads = launch.backward(dout, None, x, x, x, *found, None, None, PLAIN)
    right = launch.backward(dout, None, small, small, small, *expected, None, None, PLAIN)
    for mine, other in zip(grads[:3], right[:3]):
        assert torch.equal(mine, other)


def test_row_strides_too_wide_for_a_tile_are_copied():
    wide = torch.empty(2**24 + 16, dtype=torch.float16).as_strided((1, 2, 1, 16), (2**25, 2**24, 16, 1))
    assert launch._readable(wide).stride(1) <= launch.MAX_ROW_STRIDE


def test_layouts_that_wide_loads_or_descriptors_cannot_read_are_copied():
    whole = torch.randn(2, 70, 6, 32)
    fused = whole.split((4, 1, 1), 2)[1]
    heads_first = torch.randn(2, 6, 70, 32).transpose(1, 2)
    tokens_first = torch.randn(70, 2, 6, 32).transpose(0, 1)
    kept = {"whole": (whole, True), "fused": (fused, True), "heads first": (heads_first, False)}
    kept |= {"tokens first": (tokens_first, False), "gap behind heads": (whole[..., :17], True)}
    for name, (x, matrix) in kept.items():
        assert launch._readable(x) is x, name
        assert (launch._readable(x, tma=True) is x) == matrix, name
    for x in (whole[..., 1:17], whole[..., 0:1].expand(2, 70, 6, 32), torch.randn(2, 70, 3, 24)):
        copy = launch._readable(x, tma=True)
        assert copy is not x
        assert torch.equal(copy, x)
        assert all(stride % 16 == 0 for stride in copy.stride()[:3])
    long, short = torch.randn(2, 70, 6, 32), torch.randn(2, 80, 6, 32)[:, :70]
    a, b = launch._streamed(long, short, tma=True)  # one row number must serve both
    assert a.stride() == b.stride()


@pytest.fixture
def descriptors(monkeypatch):
    """The tiles of the interpreter, with full blocks through TMA descriptors."""
    plain = tuning.lookup
    used = []

    def lookup(*args):
        return plain(*args)._replace(tma=True)

    def made(tensors, rows, tma, original=launch._descriptors):
        used.append(tma)
        return original(tensors, rows, tma)

    monkeypatch.setattr(tuning, "lookup", lookup)
    monkeypatch.setattr(launch, "_descriptors", made)
    return used


@pytest.mark.parametrize(
    "case",
    [
        Case(B=2, T=130, S=130, H=4, K=2, D=16),
        Case(B=2, T=97, S=150, H=2, K=1, D=24, cu=((0, 100, 140, 150), (0, 150, 150, 150)), q_offset=40, window=80),
    ],
    ids=["causal", "documents"],
)
def test_descriptors_agree_with_the_definition(case, descriptors, guard):
    check(case, torch.float32, "triton")
    assert descriptors
    assert all(descriptors)


def test_descriptors_of_a_fused_projection(descriptors):
    """q, k and v as slices of one [B, T, H + 2K, D] tensor; what lies behind a head's columns is not read."""
    fused = torch.randn(2, 70, 6, 16)
    q, k, v = fused.split((4, 1, 1), 2)
    out = attention(q, k, v, backend="triton")
    assert descriptors == [True]
    torch.testing.assert_close(out, attention(q, k, v, backend="torch"), rtol=1e-5, atol=1e-5)
    room = torch.full((2, 70, 6, 48), float("nan"))
    room[..., :24] = torch.randn(2, 70, 6, 24)
    q, k, v = (x.detach().requires_grad_() for x in room[..., :24].split((4, 1, 1), 2))
    results = []
    for backend in ("triton", "torch"):
        out = attention(q, k, v, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert all(descriptors)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bounds", [None, (0, 0, 7, 8, 30, 30), (-4, 3, 50), (5, 9, 9)])
def test_intervals_are_those_of_the_reference(bounds, causal, window):
    q = torch.zeros(1, 33, 1, 1)
    geometry = Geometry(causal, 1.0, 6, window, 0.0)
    cu = None if bounds is None else torch.tensor([bounds], dtype=torch.int32)
    low, high, _ = launch.intervals(cu, q, 40, geometry, for_keys=False)
    expected = key_intervals(None if bounds is None else list(bounds), 33, 40, geometry)
    seen = (torch.arange(40) >= low[0, :, None]) & (torch.arange(40) < high[0, :, None])
    right = (torch.arange(40) >= expected[0][:, None]) & (torch.arange(40) < expected[1][:, None])
    assert torch.equal(seen, right)
    low, high, _ = launch.intervals(cu, q, 40, geometry, for_keys=True)
    by_key = (torch.arange(33) >= low[0, :, None]) & (torch.arange(33) < high[0, :, None])
    assert torch.equal(by_key, right.T)
    for bound in (low, high):
        assert (bound.diff() >= 0).all(), "tiles rely on bounds that never decrease"


def test_cost_follows_documents():
    """Blocks visited, counted from the kernels' own bounds: 16 documents cost far less than one of their length."""

    def blocks(cu):
        low, high, _ = launch.intervals(cu, torch.zeros(1, 4096, 1, 1), 4096, PLAIN, for_keys=False)
        first, last = low[0, ::64], high[0, 63::64]
        return int(((last - first + 31) // 32).sum())

    whole = blocks(torch.tensor([[0, 4096]], dtype=torch.int32))
    packed = blocks(torch.arange(0, 4097, 256, dtype=torch.int32)[None])
    assert packed < whole / 12


def test_every_architecture_has_every_entry():
    for arch in ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942", "interpreter"):
        for dtype in (torch.bfloat16, torch.float32):
            for width in (16, 32, 64, 128, 256):
                for kernel in ("forward", "dq", *tuning.key_kernels(arch, dtype, width)):
                    tiles = tuning.lookup(kernel, arch, dtype, width)
                    streamed = tiles.block_n if kernel in ("forward", "dq") else tiles.block_m
                    assert tiles.cut <= streamed
                    assert not (tiles.tma and arch in ("sm_80", "sm_86", "gfx942"))
                    assert tiles.block_m >= 16
                    assert tiles.cut >= 16
