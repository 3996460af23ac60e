"""Decides which requests are loaded: the scheduler's part of the connector, without vLLM.

For each request, ``match`` returns how many of its tokens will be loaded, ``allocate`` receives its
blocks, ``take_jobs`` returns the jobs of one step for the workers, ``mark_failed`` records failed
jobs, and ``finish`` forgets the request. vLLM schedules a request whose job failed again; it is
then computed by vLLM itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ragcache.errors import PromptError, RagCacheError
from ragcache.types import Tokens
from ragcache.vllm.manifest import Manifest
from ragcache.vllm.salt import check_salt


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request of vLLM's scheduler."""

    id: str
    params: Mapping[str, Any] | None  # its kv_transfer_params
    tokens: Sequence[int] | None  # of its prompt; None for prompt embeddings
    salt: str | None
    adapter: str | None = None  # name of its LoRA adapter
    multimodal: bool = False


@dataclass(frozen=True, slots=True)
class LoadJob:
    """A job of the workers before the next forward pass."""

    request: str
    manifest: Manifest
    tokens: Tokens
    first: int  # first row that vLLM counts as loaded; rows before it are in cached blocks
    stop: int  # end of the loaded rows
    blocks: tuple[int, ...]  # of the whole prompt, in order


@dataclass(frozen=True, slots=True)
class _Match:
    manifest: Manifest
    tokens: Tokens
    first: int
    stop: int


class Planner:
    """Plans requests to the model whose fingerprint has the digest ``model`` (hex)."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.refused: dict[str, str] = {}  # by request, why nothing is loaded for it
        self._read: dict[str, Manifest | None] = {}
        self._matched: dict[str, _Match] = {}
        self._due: list[LoadJob] = []

    def match(self, request: PlannedRequest, computed: int) -> int:
        """Tokens after ``computed`` that a job would load: all of the prompt except the last one.

        The last token is left to vLLM, which computes the first logits from it. Returns 0 if the
        request has no manifest, is :attr:`refused`, or has all its chunks in ``computed``, or
        without chunks all texts that can be loaded: those are cached blocks of the same manifest.
        Only :attr:`refused` changes: vLLM may call it again for the same request.
        """
        manifest = self._manifest(request)
        self._matched.pop(request.id, None)
        if manifest is None or request.tokens is None:
            return 0
        stop = len(manifest) - 1
        if computed >= min(stop, manifest.reuse_end) and manifest.task == "fuse":
            return 0
        self._matched[request.id] = _Match(manifest, tuple(request.tokens), computed, stop)
        return stop - computed

    def allocate(self, request: str, blocks: Sequence[int], loaded: int) -> None:
        """Note the request's ``blocks``. ``loaded`` is the result of ``match``, or 0 if vLLM has
        decided against loading.
        """
        match = self._matched.pop(request, None)
        if match is None or loaded == 0:
            return
        assert loaded == match.stop - match.first, "vLLM loads all matched tokens, or none"
        job = LoadJob(request, match.manifest, match.tokens, match.first, match.stop, tuple(blocks))
        self._due.append(job)

    def take_jobs(self) -> list[LoadJob]:
        """The jobs of this step, which are then forgotten."""
        jobs, self._due = self._due, []
        return jobs

    def mark_failed(self, requests: Mapping[str, str]) -> None:
        """Note why jobs failed, by request: they are not planned again."""
        self.refused.update(requests)

    def manifest(self, request: str) -> Manifest | None:
        """The manifest of a request, if it has one that could be read."""
        return self._read.get(request)

    def finish(self, request: str) -> str | None:
        """Forget a request; returns why nothing was loaded for it, if so."""
        self._read.pop(request, None)
        self._matched.pop(request, None)
        self._due = [job for job in self._due if job.request != request]
        return self.refused.pop(request, None)

    def _manifest(self, request: PlannedRequest) -> Manifest | None:
        """A request's manifest, checked once; None if it has none or is refused."""
        if request.id in self.refused:
            return None
        if request.id not in self._read:
            self._read[request.id] = None
            try:
                self._read[request.id] = Manifest.read(request.params)
                if (manifest := self._read[request.id]) is not None:
                    self._check(manifest, request)
            except RagCacheError as error:
                self.refused[request.id] = str(error)
                return None
        return self._read[request.id]

    def _check(self, manifest: Manifest, request: PlannedRequest) -> None:
        """Raise PromptError if loading would give wrong results."""
        if request.adapter is not None:
            raise PromptError(
                f"the request uses the LoRA adapter {request.adapter!r}, which changes the KV and "
                "has no fingerprint: merge it into a model of its own"
            )
        if request.multimodal or request.tokens is None:
            raise PromptError(
                "the prompt is not plain token ids: images and embeddings have no KV in a store"
            )
        if manifest.model != self.model:
            raise PromptError(
                f"the manifest is for the model fingerprint {manifest.model[:8]}, but this "
                f"model's is {self.model[:8]}: weights, configuration, tokenizer, template, dtype "
                "and codec must be the same"
            )
        manifest.prompt(request.tokens)
        check_salt(manifest, request.salt)


def merge_failures(reports: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Join the failures of several workers: the first reason for each request."""
    out: dict[str, str] = {}
    for report in reports:
        for request, reason in report.items():
            out.setdefault(request, reason)
    return out
