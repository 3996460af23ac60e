"""Copy stored KV to a GPU in the background, while the GPU computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ragcache.types import KVPair


class Uploader:
    """Copies on a CUDA stream of its own. From pinned memory, a copy does not block the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, parts: Sequence[KVPair]) -> _CudaUpload:
        """Begin to copy (keys, values) of several parts. Thread-safe."""
        with torch.cuda.stream(self._stream):
            moved = [(self._moved(keys), self._moved(values)) for keys, values in parts]
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(self._stream)
        return _CudaUpload(self.device, parts, moved, ready)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


class _CudaUpload:
    """A :class:`~ragcache.types.LayerUpload` to a GPU. It refers to the host memory that is read
    until it is dropped."""

    def __init__(
        self,
        device: torch.device,
        source: Sequence[KVPair],
        moved: list[KVPair],
        ready: torch.cuda.Event,
    ) -> None:
        self._device, self._source, self._moved, self._ready = device, source, moved, ready

    def taken(self) -> list[KVPair]:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._ready)
        moved, self._moved = self._moved, []
        for pair in moved:
            for tensor in pair:  # keeps the memory until this stream has used it
                tensor.record_stream(stream)
        return moved

    def finish(self) -> None:
        self._ready.synchronize()
