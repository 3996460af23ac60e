"""A vLLM beside the embedded engine: one model, one store, the same prompts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from ragcache.blend import Blender, written
from ragcache.core.generate import LocalGenerator
from ragcache.core.precompute import precompute, store_variants
from ragcache.core.request import PromptRequest
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.planning.context import EncodingContext, encoding_context
from ragcache.store.disk.store import DiskStore
from ragcache.store.key import ChunkKey
from ragcache.store.memory import MemoryStore
from ragcache.types import Answer, Prompt, Sampling
from ragcache.vllm.handoff import REPLIES_FOLDER, WorkerReplies, new_ticket
from ragcache.vllm.manifest import Manifest
from ragcache.vllm.salt import cache_salt

ROOT = Path(__file__).resolve().parents[2]
CONNECTOR = {
    "kv_connector": "RagCacheConnector",
    "kv_connector_module_path": "ragcache.vllm.connector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}
WORKER = "ragcache.vllm.cpu.CPUWorker"
TOKENS = 8  # of an answer
EXACT = 1e-4  # between log probabilities

TEXTS = (
    "Mira Holt keeps a parrot. She plays the cello and lives by the sea.",
    "The old mill in Bexley stands on the river Avon. It grinds no more.",
    "Her father built boats in Oslo. The boats were small and fast.",
    "Question books are kept in the town hall. It is open in the summer.",
)
QUESTION = "Where does Mira Holt live?"


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in here after so long: nothing may hang."""

    def over(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still at it after {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def environment() -> None:
    """The environment variables for vLLM: to run in this process, among others."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
        "PYTHONPATH": str(ROOT),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def started(model: Path, store: Path, **changes: Any) -> Iterator[Any]:
    """An offline vLLM in this process: one at a time. ``connector``: changes to its connector."""
    environment()
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    connector = CONNECTOR | changes.pop("connector", {})
    connector["kv_connector_extra_config"] = {"store": str(store)}
    given = {
        "model": str(model),
        "dtype": "float32",
        "max_model_len": 512,
        "enforce_eager": True,
        "block_size": 32,  # so that prompts have whole blocks, which the prefix cache shares
        "worker_cls": WORKER,
        "kv_transfer_config": connector,
        "seed": 0,
    }
    llm = None
    try:
        with deadline(120):
            llm = LLM(**(given | changes))
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        ensure_kv_transfer_shutdown()
        cleanup_dist_env_and_memory()


@dataclass
class Said:
    """What came of one request."""

    tokens: tuple[int, ...]
    logprobs: list[dict[int, float]]  # of some tokens at every step
    cached: int
    refused: str | None = None
    report: dict[str, Any] | None = None


@dataclass
class Request:
    """A prompt, plain or with a manifest."""

    prompt: Prompt
    manifest: Manifest | None = None
    tokens: Sequence[int] | None = None  # instead of the prompt's own
    salt: str | None = None

    @classmethod
    def fused(cls, prompt: Prompt, mode: Blender, scene: Scene, **changes: Any) -> Request:
        model, how = scene.engine.fingerprint.digest, scene.encoding
        made = Manifest.fuse(prompt, written(mode), model, encoding=how, ticket=new_ticket())
        made = replace(made, **changes)
        return cls(prompt, made, salt=cache_salt(made))


@dataclass
class Scene:
    """One model with its chunks stored, for the embedded engine in memory, for vLLM on disk."""

    engine: TransformersEngine
    path: Path  # of the store
    prompt: Prompt
    held: MemoryStore = field(default_factory=MemoryStore)

    @classmethod
    def of(cls, engine: TransformersEngine, path: Path) -> Scene:
        engine.repairs = False  # as vLLM
        prompt = engine.template.prompt(TEXTS[:3], QUESTION)
        scene = cls(engine, path, prompt)
        with DiskStore(path) as store:
            for kept in (store, scene.held):
                precompute(engine, kept, scene.keys)
        return scene

    @property
    def encoding(self) -> EncodingContext:
        return encoding_context("prefix", self.engine)

    @property
    def keys(self) -> list[ChunkKey]:
        """Of the prefix, and of a chunk of each text."""
        chunks = map(self.engine.template.chunk, TEXTS)
        fingerprint = self.engine.fingerprint
        prefix = ChunkKey(fingerprint, self.engine.template.prefix)
        return [prefix, *(self.encoding.key(fingerprint, chunk) for chunk in chunks)]

    def keep_variants(self) -> None:
        """Also the chunks as computed after another one."""
        other = self.engine.template.chunk(TEXTS[3])
        for chunk in self.prompt.chunks:
            met = Prompt.of(self.prompt.prefix, (other, chunk), self.prompt.question)
            with DiskStore(self.path) as store:
                for kept in (store, self.held):
                    store_variants(self.engine, kept, met, [1])

    def embedded(self, prompt: Prompt, mode: Blender, tokens: int = TOKENS) -> tuple[Answer, Any]:
        """The embedded engine's answer, and the log probabilities of its first token."""
        given = LocalGenerator(self.engine, self.held, self.encoding, store_misses=False)
        stream = given.stream(PromptRequest(prompt, mode, Sampling(max_tokens=tokens)))
        answer = stream.answer
        return answer, stream.first_logits.log_softmax(-1)

    def ask(
        self,
        llm: Any,
        requests: Sequence[Request],
        seconds: int = 60,
        tokens: int = TOKENS,
        *,
        ignore_eos: bool = False,
    ) -> list[Said]:
        """All at once, greedily, up to ``tokens`` each; all of them with ``ignore_eos``."""
        from vllm import SamplingParams

        prompts: list[dict[str, Any]] = []
        sampling = []
        how = {"max_tokens": tokens, "temperature": 0, "logprobs": 5, "ignore_eos": ignore_eos}
        for request in requests:
            ids = request.prompt.tokens if request.tokens is None else request.tokens
            prompts.append({"prompt_token_ids": list(ids)})
            if request.salt is not None:
                prompts[-1]["cache_salt"] = request.salt
            params = request.manifest.params() if request.manifest is not None else None
            extra = {"kv_transfer_params": params} if params else None
            sampling.append(SamplingParams(**how, extra_args=extra))
        with deadline(seconds):
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return [
            self._said(output, request) for output, request in zip(outputs, requests, strict=True)
        ]

    def _said(self, output: Any, request: Request) -> Said:
        [given] = output.outputs
        logprobs = [
            {token: found.logprob for token, found in step.items()} for step in given.logprobs
        ]
        said = Said(tuple(given.token_ids), logprobs, output.num_cached_tokens or 0)
        if request.manifest is not None:
            worker_reply = (
                WorkerReplies(self.path / REPLIES_FOLDER).take_report(request.manifest.ticket) or {}
            )
            said.refused, said.report = worker_reply.get("refused"), worker_reply.get("report")
        return said

    def check(self, said: Said, prompt: Prompt, mode: Blender, tokens: int = TOKENS) -> None:
        """It is what the embedded engine says."""
        answer, logprobs = self.embedded(prompt, mode, tokens)
        assert said.refused is None
        ended = answer.stopped == "eos"  # where that was to be ignored, vLLM goes on
        assert said.tokens[: len(answer.tokens) if ended else tokens] == answer.tokens
        errors = [abs(got - float(logprobs[token])) for token, got in said.logprobs[0].items()]
        assert max(errors) <= EXACT, (mode, errors)
