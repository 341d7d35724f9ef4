"""The copy that lets training go on while a checkpoint is written in the background."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Stager:
    """Copies shards to buffers in host memory, kept from save to save.

    pinned: page-locked buffers, filled by the copy engine of the GPU behind the kernels already in the stream; later
    kernels (the next optimizer step) queue up behind the copies, so the training thread need not wait at all.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self._buffers: dict[str, Tensor] = {}
        self._events: list[torch.cuda.Event] = []

    def stage(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Host copies of `shards` by key; call `wait` before reading them. The previous save must be over."""
        self._buffers = {key: b for key, b in self._buffers.items() if key in shards}
        devices = set()
        for key, shard in shards.items():
            on_gpu = shard.device.type == "cuda"
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != shard.shape or buffer.dtype != shard.dtype:
                buffer = torch.empty(shard.shape, dtype=shard.dtype, pin_memory=self.pinned and on_gpu)
                self._buffers[key] = buffer
            buffer.copy_(shard, non_blocking=self.pinned and on_gpu)
            if on_gpu:
                devices.add(shard.device)
        self._events = []
        for device in devices:
            with torch.cuda.device(device):
                event = torch.cuda.Event()
                event.record()
                self._events.append(event)
        return dict(self._buffers)

    def wait(self) -> None:
        """Block (the writing thread) until the copies have arrived."""
        for event in self._events:
            event.synchronize()
