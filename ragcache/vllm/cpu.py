"""The worker class for CPUs: ``--worker-cls ragcache.vllm.cpu.CPUWorker``."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker as _CPUWorker

from ragcache.vllm.worker import ModelHandover

__all__ = ["CPUWorker"]


class CPUWorker(ModelHandover, _CPUWorker):  # type: ignore[misc]
    """vLLM's CPU worker, which hands its model to the connector."""
