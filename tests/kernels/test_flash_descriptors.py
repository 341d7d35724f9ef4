"""Descriptors that the hardware takes: CUDA's driver refuses others only on a GPU. Rules of cuTensorMapEncodeTiled."""

from itertools import pairwise, product

import pytest
import torch

from megastage.kernels import _attention_launch as launch

HEADS, KV_HEADS, ROWS = 6, 2, 64


def layouts(B, N, D, dtype):
    """Keys and values as models make them, and as gradients arrive."""
    make = lambda *shape: torch.zeros(shape, dtype=dtype)
    yield make(B, N, KV_HEADS, D), make(B, N, KV_HEADS, D)
    yield make(B, N, HEADS + 2 * KV_HEADS, D).split((HEADS, KV_HEADS, KV_HEADS), 2)[1:]
    yield make(B, KV_HEADS, N, D).transpose(1, 2), make(B, KV_HEADS, N, D).transpose(1, 2)
    yield make(B, N, KV_HEADS, D), make(B, N, KV_HEADS, 1).expand(B, N, KV_HEADS, D)
    yield make(B, N + 3, KV_HEADS, D)[:, 3:], make(B, 2 * N, KV_HEADS, D)[:, :N]
    yield make(B, N, 1, D), make(B, N, KV_HEADS, D)[:, :, 1:]


@pytest.mark.parametrize("D", [8, 16, 64, 72, 80, 96, 100, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_descriptors_are_valid_and_stay_inside_their_tensor(D, dtype):
    for B, N in product((1, 2, 3), (1, 5, 100)):
        for pair in layouts(B, N, D, dtype):
            tensors = launch._streamed(*pair, True)
            first, second = launch._descriptors(tensors, ROWS, True)
            assert first.shape[0] == second.shape[0]  # one row number serves both
            for x, given, found in zip(tensors, pair, (first, second)):
                assert torch.equal(x, given)
                assert_valid(x, found)


def assert_valid(x, descriptor):
    size, strides = x.element_size(), descriptor.strides
    assert x.data_ptr() % 16 == 0
    assert 1 <= len(descriptor.shape) <= 5
    assert all(0 < extent <= 2**32 for extent in descriptor.shape)
    assert all(stride * size % 16 == 0 and 0 < stride * size < 2**40 for stride in strides[:-1])
    assert strides[-1] == 1
    assert all(above % below == 0 for above, below in pairwise(strides))
    assert all(block <= 256 for block in descriptor.block_shape)
    assert descriptor.block_shape[-1] * size % 16 == 0
    last = sum((extent - 1) * stride for extent, stride in zip(descriptor.shape, strides))
    assert (x.storage_offset() + last) * size < x.untyped_storage().nbytes()
