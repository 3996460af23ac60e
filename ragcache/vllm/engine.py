"""The engine whose model runs in vLLM servers."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ragcache.engine.hf.model_info import ModelInfo
from ragcache.engine.hf.tokenizing import TokenizerEngine
from ragcache.engine.plain_text import PlainText
from ragcache.engine.template import split_chat_template
from ragcache.errors import ContextError, ModelError, PromptError
from ragcache.store.key import digest_tokens
from ragcache.types import ChunkKV, Tokens
from ragcache.vllm.handoff import REPLIES_FOLDER, WorkerReplies, new_ticket
from ragcache.vllm.http import ServerUnreachable, VllmClient
from ragcache.vllm.manifest import Manifest
from ragcache.vllm.router import Router
from ragcache.vllm.salt import cache_salt

__all__ = ["VllmEngine"]

_MAX_CONCURRENT = 8  # chunks that are computed at once


class VllmEngine(TokenizerEngine):
    """Servers at ``urls`` that serve the model ``name`` (folder, file or hub name) in ``dtype``.

    ``store`` is the store folder that they were started with. This process does not load the model;
    it reads the weights once to hash them. Raises ModelError if no server answers. Thread-safe.
    """

    def __init__(
        self,
        name: str | Path,
        urls: Sequence[str],
        store: Path,
        *,
        dtype: str = "float32",
        codec: str = "raw",
        api_key: str = "",
    ) -> None:
        self._identity = identity = ModelInfo.of(str(name), dtype, codec)
        self.name = Path(name).name
        self.tokenizer, self.spec = identity.tokenizer, identity.spec
        self.fingerprint, self.ends = identity.fingerprint, identity.ends
        self.context_tokens = identity.context_tokens
        self.bos: int | None = self.tokenizer.bos_token_id
        self.plain_text = PlainText(self.tokenizer, self.name)
        self.template = split_chat_template(self.tokenizer, self.tokenize)
        self.replicas = Router([url.rstrip("/").removesuffix("/v1") for url in urls])
        self.replies = WorkerReplies(store / REPLIES_FOLDER)
        self.client = VllmClient(self.replicas, api_key=api_key)
        try:
            self.replies.delete_expired()
            served = self.client.served_models().values()
            self.context_tokens = min(self.context_tokens, *(s.context_tokens for s in served))
        except BaseException:
            self.close()
            raise

    @property
    def parameters(self) -> int:
        return self._identity.parameters

    @property
    def heads(self) -> int:
        return self._identity.heads

    def close(self) -> None:
        self.client.close()

    def encode(self, chunks: Sequence[Tokens], *, context: Tokens = ()) -> list[ChunkKV]:
        """The KV of each chunk, computed by the servers after the tokens ``context``.

        Raises PromptError for an empty chunk, ContextError for one that is too long, and ModelError
        if the servers fail.
        """
        if not all(chunks):
            raise PromptError("a chunk has no tokens: leave it out")
        longest = max(map(len, chunks), default=0) + len(context) + 1
        if longest > self.context_tokens:
            raise ContextError(
                f"a chunk and its context need {longest} tokens, but {self.name} has a context "
                f"of {self.context_tokens}. Make chunks smaller."
            )
        with ThreadPoolExecutor(_MAX_CONCURRENT, "ragcache-encode") as pool:
            return list(pool.map(lambda chunk: self._encode(chunk, context), chunks))

    def _encode(self, chunk: Tokens, context: Tokens) -> ChunkKV:
        # vLLM loads nothing for a prompt of one token, so the worker would not be asked.
        given = chunk if context or len(chunk) > 1 else chunk * 2
        manifest = Manifest.keep(given, context, self.fingerprint.digest, new_ticket())
        body: dict[str, Any] = {
            "prompt": list(context + given),
            "max_tokens": 1,
            "temperature": 0,
            "kv_transfer_params": manifest.params(),
            "cache_salt": cache_salt(manifest),
        }
        lost: list[str] = []
        where = {digest_tokens(chunk): len(chunk)}
        while (url := self.replicas.choose(where, without=lost)) is not None:
            try:
                self.client.complete(url, body)
            except ServerUnreachable:
                lost.append(url)
                continue
            if (worker_reply := self.replies.take_report(manifest.ticket)) is not None:
                raise ModelError(
                    f"vLLM at {url} computes no chunks: {worker_reply['refused']}. "
                    "Its log has the details."
                )
            keys, values = self.replies.take_kv(manifest.ticket)
            keys, values = keys[:, :, : len(chunk)], values[:, :, : len(chunk)]
            return ChunkKV(chunk, keys.unbind(), values.unbind())
        raise ModelError(f"no vLLM server answers: {', '.join(lost)} cannot be reached. Start one.")
