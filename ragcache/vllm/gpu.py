"""The worker class for GPUs: ``--worker-cls ragcache.vllm.gpu.GPUWorker``."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from ragcache.vllm.worker import ModelHandover

__all__ = ["GPUWorker"]


class GPUWorker(ModelHandover, Worker):  # type: ignore[misc]
    """vLLM's GPU worker, which hands its model to the connector."""
