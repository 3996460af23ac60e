"""The embedded engine: any Hugging Face RoPE decoder, driven through its own forward.

No model code is copied and nothing stays patched. For the length of one prefill, pre-hooks on
the decoder layers cut hidden states, positions, rotary embeddings and mask down to the rows that
a ``PrefillCallbacks`` names, and a ``Cache`` scatters their fresh KV among the placed rows.
Embedding scales, per-layer RoPE, windows and soft caps stay the model's business.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from blake3 import blake3
from torch import Tensor, nn

from ragcache.engine.base import AttentionRule, Engine, PrefillCallbacks, Prefilled, Step
from ragcache.engine.decode import decode, end_tokens
from ragcache.engine.hf.fingerprint import cached_weights_digest, fingerprint
from ragcache.engine.hf.forward import Forward
from ragcache.engine.hf.host_to_device import Uploader
from ragcache.engine.hf.layer_hooks import (
    Capture,
    StopForward,
    on_host,
)
from ragcache.engine.hf.loading import load_model, load_tokenizer
from ragcache.engine.hf.packing import PackedForward
from ragcache.engine.hf.prompt_cache import PlacedKV
from ragcache.engine.hf.rope_probe import probe_layers
from ragcache.engine.hf.rope_scaling import context_tokens, refuse_length_dependent_rope, unfit
from ragcache.engine.hf.tokenizing import TokenizerEngine
from ragcache.engine.kernels.choose import Shape, choose
from ragcache.engine.plain_text import PlainText
from ragcache.engine.self_test import check_engine, packable, watchable
from ragcache.engine.template import split_chat_template
from ragcache.errors import ConfigError, ContextError, ModelError, PromptError
from ragcache.models.checkpoint import Checkpoint
from ragcache.models.kept import kept
from ragcache.models.memory import in_memory, unchanged
from ragcache.types import ChunkKV, Sampling, Tokens
from ragcache.util.buffer_pool import SPARE_BYTES, BufferPool

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Behind how many beginnings packs go on by turns: what a chunk is stored behind, and what it is
#: seen behind to measure its sensitivity.
_KEPT = 2


class TransformersEngine(TokenizerEngine, Engine):
    """A model and tokenizer of the transformers library. Not thread-safe: one prompt at a time."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "",
        codec: str = "raw",
        weights: str = "",
        kernels: str = "auto",
        stock: bool = False,
    ) -> None:
        """Take a loaded causal language model; raise ModelError if it would be got wrong.

        ``codec`` names how its KV is to be stored, ``weights`` their digest if it is known.
        ``kernels`` as for :func:`ragcache.engine.kernels.choose`. ``stock``: the model computes as
        its class does, unpatched, so that it is checked once for what it is known by, and what was
        found is kept for the next process.
        """
        self.model, self.tokenizer = model.eval(), tokenizer
        self.name = name or model.config.name_or_path or type(model).__name__
        refuse_length_dependent_rope(model.config, self.name)
        modules = _decoder_layers(model, self.name)
        layers, self.spec = probe_layers(model, modules, self.name)
        heads, dtype = (self.heads, self.spec.kv_heads), _DTYPES[self.spec.dtype]
        shape = Shape(*heads, self.spec.head_dim, dtype, self.device)
        chosen = choose(kernels, shape, layers.rope)
        self.kernels, self.kernel_names = chosen.about, chosen.names
        self._forward = Forward(model, replace(layers, kernels=chosen), BufferPool(SPARE_BYTES))
        self._contexts: dict[Tokens, PlacedKV] = {}  # KV that the last packs went on after
        self.upload = Uploader(self.device) if self.device.type == "cuda" else None
        self.bos: int | None = tokenizer.bos_token_id
        self.context_tokens = context_tokens(model.config)
        self.sliding_window = _sliding_window(model.config.get_text_config())
        self.plain_text = PlainText(tokenizer, self.name)
        self.template = split_chat_template(tokenizer, self.tokenize)
        self.packs = True  # whether several chunks are encoded in one forward
        own = fingerprint(model, tokenizer, self.name, codec=codec, weights=weights)
        self.fingerprint = replace(own, spec=self.spec)
        found = kept("check", self._known_by(), self._checked) if stock else self._checked()
        self.watchable, self.packs = (what in found.split() for what in ("watchable", "packable"))

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        codec: str = "raw",
        kernels: str = "auto",
    ) -> TransformersEngine:
        """Load a model by hub name or local folder. ModelError says what is wrong and the fix.

        ``device`` auto: CUDA where there is one. ``dtype`` auto: float32 on a CPU, bfloat16 on
        CUDA. ``codec`` and ``kernels`` as for the constructor.
        """
        where = as_device(device)
        if dtype == "auto":
            dtype = "bfloat16" if where.type == "cuda" else "float32"
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype {dtype!r} is unknown: use auto, {', '.join(_DTYPES)}")
        checkpoint = Checkpoint.of(name)
        with unchanged(checkpoint.folder, checkpoint.files) as identity:
            tokenizer = load_tokenizer(checkpoint)
            model = load_model(checkpoint, _DTYPES[dtype])
            weights = cached_weights_digest(model, identity)
            model = model.to(device=where)
            in_memory(model)
        return cls(
            model,
            tokenizer,
            name=checkpoint.name,
            codec=codec,
            weights=weights,
            kernels=kernels,
            stock=True,
        )

    def _checked(self) -> str:
        """What the model was seen to be able to do. Raises ModelError if it cannot be used."""
        vocabulary = self.model.get_input_embeddings().num_embeddings
        check_engine(self, vocabulary, self.context_tokens)
        found = {"watchable": watchable(self), "packable": packable(self)}
        return " ".join(what for what, can in found.items() if can)

    def _known_by(self) -> list[str]:
        """Everything that the outcome of the self-check depends on."""
        where = self.device
        device = torch.cuda.get_device_name(where) if where.type == "cuda" else platform.processor()
        return [
            self.fingerprint.digest.hex(),
            _code_digest(),
            *(f"{name} {version(name)}" for name in ("torch", "transformers")),
            f"{type(self.model).__module__}.{type(self.model).__qualname__}",
            f"attention {self._forward.config._attn_implementation}",
            f"{where.type} {platform.machine()} {device}",
            re.sub(r" \([^)]*\)", "", self.kernels),  # without the times that they took
        ]

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.model.device)

    @property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters())

    @property
    def heads(self) -> int:
        return int(self.model.config.get_text_config().num_attention_heads)

    @torch.inference_mode()
    def encode(self, chunks: Sequence[Tokens], *, behind: Tokens = ()) -> list[ChunkKV]:
        if not all(chunks):
            raise PromptError("a chunk has no tokens: leave it out")
        longest = max(map(len, chunks), default=0)
        self._check_length(len(behind) + longest, "a chunk behind its prefix")
        packs = [chunks] if self.packs else [[chunk] for chunk in chunks]
        return [kv for pack in packs if pack for kv in self._encode(pack, behind)]

    def _encode(self, chunks: Sequence[Tokens], behind: Tokens) -> list[ChunkKV]:
        """KV of chunks from one forward. One chunk alone just goes on after ``behind``."""
        pack = PackedForward(self._forward.config, [len(chunk) for chunk in chunks], len(behind))
        ids = [token for chunk in chunks for token in chunk]
        kv, capture, dtype = self._continued(behind, len(ids)), Capture(), self.model.dtype
        override = pack if len(chunks) > 1 else None
        with self._forward.driven(kv, ids, pack.positions, capture, override=override) as arguments:
            self.model(**arguments)
        return [
            ChunkKV(
                chunk,
                tuple(on_host(k[:, first:end], dtype) for k in capture.keys),
                tuple(on_host(v[:, first:end], dtype) for v in capture.values),
            )
            for chunk, (first, end) in zip(chunks, pack.spans, strict=True)
        ]

    def _continued(self, context: Tokens, room: int) -> PlacedKV:
        """KV of ``context`` with ``room`` for more rows; computed once, not for every pack."""
        if not context:
            return self._forward.cache(room)
        kv = self._contexts.pop(context, None)
        if kv is None:
            kv = self._forward.cache(len(context))
            with self._forward.driven(kv, context, range(len(context))) as arguments:
                self.model(**arguments)
        self._contexts[context] = kv  # as the latest
        for earlier in list(self._contexts)[:-_KEPT]:
            del self._contexts[earlier]
        return kv.continued(room)

    @torch.inference_mode()
    def prefill(
        self,
        tokens: Tokens,
        callbacks: PrefillCallbacks | None = None,
        *,
        positions: Sequence[int] | None = None,
        room: int = 1,
        attend: AttentionRule | None = None,
    ) -> Prefilled:
        positions = range(len(tokens)) if positions is None else positions
        if not tokens:
            raise PromptError("the prompt is empty: give it a question")
        self._check_length(max(len(tokens), positions[-1] + 1) + room, "prompt and answer")
        if callbacks is None and attend is not None:
            callbacks = PrefillCallbacks()
        kv = self._forward.cache(len(tokens) + room)
        with self._forward.driven(kv, tokens, positions, callbacks, attend=attend) as arguments:
            logits = self.model(**arguments).logits
        return Prefilled(logits[0, -1].float(), kv, positions[-1] + 1, attend)

    @torch.inference_mode()
    def probe(
        self,
        tokens: Tokens,
        callbacks: PrefillCallbacks,
        attend: AttentionRule,
        *,
        positions: Sequence[int],
        layers: int,
    ) -> None:
        self._check_length(max(len(tokens), positions[-1] + 1), "the prompt")
        kv = self._forward.cache(len(tokens))
        with (
            suppress(StopForward),
            self._forward.driven(
                kv, tokens, positions, callbacks, attend=attend, until=layers
            ) as arguments,
        ):
            self.model(**arguments)

    def decode(self, prefilled: Prefilled, sampling: Sampling) -> Iterator[Step]:
        ends = end_tokens(self.model, self.tokenizer)
        return decode(self._next, self.tokenizer, ends, prefilled, sampling)

    @torch.inference_mode()
    def _next(self, prefilled: Prefilled, token: int, position: int) -> Tensor:
        """Logits (vocabulary,) after one more token."""
        callbacks = PrefillCallbacks() if prefilled.attend is not None else None
        with self._forward.driven(
            prefilled.kv, [token], [position], callbacks, attend=prefilled.attend
        ) as arguments:
            logits = self.model(**arguments).logits
        return cast(Tensor, logits[0, -1].float())

    def _check_length(self, tokens: int, what: str) -> None:
        if tokens > self.context_tokens:
            raise ContextError(
                f"{what} need {tokens} tokens, but {self.name} has a context of "
                f"{self.context_tokens}. Retrieve fewer chunks (--top-k), make them smaller, or "
                "ask for a shorter answer."
            )


def _code_digest() -> str:
    """blake3 over the sources that drive a model: another one with every change of them."""
    package = Path(__file__).parents[2]
    others = package / "util" / "buffer_pool.py", package / "types.py"
    h = blake3()
    for file in (*sorted((package / "engine").rglob("*.py")), *others):
        h.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes() + b"\0")
    return h.hexdigest()


def _decoder_layers(model: Any, name: str) -> Sequence[nn.Module]:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    if not layers:
        raise ModelError(unfit(name, "its decoder layers cannot be found"))
    return cast(Sequence[nn.Module], layers)


def _sliding_window(config: Any) -> int | None:
    if not getattr(config, "use_sliding_window", True):
        return None
    window = getattr(config, "sliding_window", None)
    return int(window) if window else None


def as_device(device: str) -> torch.device:
    """The device that a setting names. ConfigError if there is none, or it is not here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is unknown: use auto, cpu or cuda") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but torch finds no GPU: use cpu")
    return where
