"""vLLM servers as what a store is filled with and answers come from."""

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
from ragcache.vllm.handoff import FOLDER, WorkerReplies, ticket
from ragcache.vllm.http import Client, Unreachable
from ragcache.vllm.manifest import Manifest
from ragcache.vllm.router import Router
from ragcache.vllm.salt import salt

_AT_ONCE = 8  # chunks that are being computed


class VllmEngine(TokenizerEngine):
    """Servers at ``urls`` that hold the model ``name`` (folder or hub name) in ``dtype``.

    ``store``: the folder that they were started with. The model is not loaded here: its weights
    are read once, for their digest. Raises ModelError where no server answers. Thread-safe.
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
        self.mailbox = WorkerReplies(store / FOLDER)
        self.client = Client(self.replicas, api_key=api_key)
        try:
            self.mailbox.clean()
            served = self.client.ready().values()
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

    def encode(self, chunks: Sequence[Tokens], *, behind: Tokens = ()) -> list[ChunkKV]:
        """By the servers, several at a time. Raises ModelError where they cannot."""
        if not all(chunks):
            raise PromptError("a chunk has no tokens: leave it out")
        longest = max(map(len, chunks), default=0) + len(behind) + 1
        if longest > self.context_tokens:
            raise ContextError(
                f"a chunk and its context need {longest} tokens, but {self.name} has a context "
                f"of {self.context_tokens}. Make chunks smaller."
            )
        with ThreadPoolExecutor(_AT_ONCE, "ragcache-encode") as pool:
            return list(pool.map(lambda chunk: self._encode(chunk, behind), chunks))

    def _encode(self, chunk: Tokens, behind: Tokens) -> ChunkKV:
        manifest = Manifest.keep(chunk, behind, self.fingerprint.digest, ticket())
        body: dict[str, Any] = {
            "prompt": list(behind + chunk),
            "max_tokens": 1,
            "temperature": 0,
            "kv_transfer_params": manifest.params(),
            "cache_salt": salt(manifest),
        }
        lost: list[str] = []
        where = {digest_tokens(chunk): len(chunk)}
        while (url := self.replicas.choose(where, without=lost)) is not None:
            try:
                self.client.complete(url, body)
            except Unreachable:
                lost.append(url)
                continue
            if (letter := self.mailbox.take(manifest.ticket)) is not None:
                raise ModelError(
                    f"vLLM at {url} computes no chunks: {letter['refused']}. Its log says more."
                )
            keys, values = self.mailbox.take_kv(manifest.ticket)
            return ChunkKV(chunk, keys.unbind(), values.unbind())
        raise ModelError(f"no vLLM server answers: {', '.join(lost)} are lost. Start one.")
