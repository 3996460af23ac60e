"""What is loaded for which request: the scheduler's side of a connector, without a scheduler.

A request's life here: ``match`` says how many of its tokens will be there without vLLM's doing,
``allocated`` learns where they go, ``due`` hands the jobs of one step to the workers, ``failed``
remembers what they could not do, and ``finished`` forgets. A request whose job failed is scheduled
again by vLLM and asked about again; it is then computed by vLLM itself, or it would fail for ever.
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
    """A request as the scheduler has it."""

    id: str
    params: Mapping[str, Any] | None  # its kv_transfer_params
    tokens: Sequence[int] | None  # of its prompt; None where that is embeddings
    salt: str | None
    adapter: str | None = None  # name of its LoRA
    multimodal: bool = False


@dataclass(frozen=True, slots=True)
class LoadJob:
    """What a worker is to do before the next forward."""

    request: str
    manifest: Manifest
    tokens: Tokens
    first: int  # row that vLLM counts from as loaded,
    stop: int  # and up to which; those before are cached blocks of the same recipe
    blocks: tuple[int, ...]  # of the whole prompt, in order


@dataclass(frozen=True, slots=True)
class _Match:
    manifest: Manifest
    tokens: Tokens
    first: int
    stop: int


class Planner:
    """Plans for requests to a model whose fingerprint has the digest ``model`` (hex)."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.refused: dict[str, str] = {}  # request -> why nothing is loaded for it
        self._read: dict[str, Manifest | None] = {}
        self._matched: dict[str, _Match] = {}
        self._due: list[LoadJob] = []

    def match(self, asked: PlannedRequest, computed: int) -> int:
        """Tokens beyond ``computed`` that a job would provide: all of the prompt but the last.

        One token at least is left to vLLM, which takes the first logits from it. 0 where the
        request asks for nothing, is :attr:`refused`, or has its chunks among the ``computed``:
        those are cached blocks of the same recipe, and what is left of the question is computed in
        any case. Nothing but :attr:`refused` is changed: vLLM may ask again.
        """
        manifest = self._manifest(asked)
        self._matched.pop(asked.id, None)
        if manifest is None or asked.tokens is None:
            return 0
        stop = len(manifest) - 1
        if computed >= min(stop, manifest.question_start) and manifest.task == "fuse":
            return 0
        self._matched[asked.id] = _Match(manifest, tuple(asked.tokens), computed, stop)
        return stop - computed

    def allocate(self, request: str, blocks: Sequence[int], loaded: int) -> None:
        """``blocks`` are the request's; ``loaded`` tokens are expected: what ``match`` said, or 0
        where vLLM has thought better of it."""
        match = self._matched.pop(request, None)
        if match is None or loaded == 0:
            return
        assert loaded == match.stop - match.first, "vLLM takes what was matched, or nothing"
        job = LoadJob(request, match.manifest, match.tokens, match.first, match.stop, tuple(blocks))
        self._due.append(job)

    def take_jobs(self) -> list[LoadJob]:
        """The jobs of this step, once."""
        jobs, self._due = self._due, []
        return jobs

    def mark_failed(self, requests: Mapping[str, str]) -> None:
        """Workers could not do these jobs, and why: they are not planned again."""
        self.refused.update(requests)

    def manifest(self, request: str) -> Manifest | None:
        """What a request that was asked about says, if that could be read."""
        return self._read.get(request)

    def finish(self, request: str) -> str | None:
        """Forget a request; why nothing was loaded for it, if it was to be."""
        self._read.pop(request, None)
        self._matched.pop(request, None)
        self._due = [job for job in self._due if job.request != request]
        return self.refused.pop(request, None)

    def _manifest(self, asked: PlannedRequest) -> Manifest | None:
        """A request's manifest, checked once; None where it has none or was refused."""
        if asked.id in self.refused:
            return None
        if asked.id not in self._read:
            self._read[asked.id] = None
            try:
                self._read[asked.id] = Manifest.read(asked.params)
                if (manifest := self._read[asked.id]) is not None:
                    self._check(manifest, asked)
            except RagCacheError as error:
                self.refused[asked.id] = str(error)
                return None
        return self._read[asked.id]

    def _check(self, manifest: Manifest, asked: PlannedRequest) -> None:
        """Raise PromptError where loading would be wrong."""
        if asked.adapter is not None:
            raise PromptError(
                f"the request uses the LoRA adapter {asked.adapter!r}, which changes the KV and "
                "has no fingerprint: merge it into a model of its own"
            )
        if asked.multimodal or asked.tokens is None:
            raise PromptError(
                "the prompt is not plain token ids: images and embeddings have no KV in a store"
            )
        if manifest.model != self.model:
            raise PromptError(
                f"the manifest is for a model of fingerprint {manifest.model[:8]}, this one's is "
                f"{self.model[:8]}: weights, configuration, tokenizer, template, dtype and "
                "codec must be the same"
            )
        manifest.prompt(asked.tokens)
        check_salt(manifest, asked.salt)


def merge_failures(reports: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """What several workers say of their requests: the first reason for each."""
    out: dict[str, str] = {}
    for report in reports:
        for request, reason in report.items():
            out.setdefault(request, reason)
    return out
