"""Copying stored KV to a GPU in the background, beside what the GPU computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ragcache.types import KVPair


class Uploader:
    """Copies on a CUDA stream of its own. From pinned memory that takes no time of the host's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, parts: Sequence[KVPair]) -> Uploaded:
        """Begin to copy; from any thread."""
        with torch.cuda.stream(self._stream):
            moved = [(self._moved(keys), self._moved(values)) for keys, values in parts]
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(self._stream)
        return Uploaded(self.device, parts, moved, ready)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


class Uploaded:
    """Parts on their way. The host's memory of them is kept until ``finish`` or this is dropped."""

    def __init__(
        self,
        device: torch.device,
        source: Sequence[KVPair],
        moved: list[KVPair],
        ready: torch.cuda.Event,
    ) -> None:
        self._device, self._source, self._moved, self._ready = device, source, moved, ready

    def taken(self) -> list[KVPair]:
        """The parts on the device: what this thread queues there from now on waits for them."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._ready)
        moved, self._moved = self._moved, []
        for pair in moved:
            for tensor in pair:  # its memory is not used again before that stream has done with it
                tensor.record_stream(stream)
        return moved

    def finish(self) -> None:
        """Wait until the host's memory has been read."""
        self._ready.synchronize()
