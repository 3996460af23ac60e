"""The embedded engine: any decoder of transformers with RoPE, run through its own forward.

No model code is copied, and nothing stays patched. For the duration of one prefill, pre-hooks on
the decoder layers reduce hidden states, positions, rotary embeddings and mask to the rows that
``PrefillCallbacks`` return, and a ``Cache`` scatters their fresh KV among the placed rows.
Embedding scales, RoPE per layer, sliding windows and soft caps remain the model's own.
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

from ragcache.engine.base import (
    AttentionRule,
    ComputeRows,
    Draft,
    Engine,
    PrefillCallbacks,
    Prefilled,
    Step,
)
from ragcache.engine.decode import DraftReader, decode, end_tokens
from ragcache.engine.hf.device import resolve_device, resolve_dtype
from ragcache.engine.hf.fingerprint import cached_weights_digest, fingerprint
from ragcache.engine.hf.forward import Forward
from ragcache.engine.hf.host_to_device import Uploader
from ragcache.engine.hf.layer_hooks import CaptureKV, StopForward, copy_to_host
from ragcache.engine.hf.loading import load_model, load_tokenizer
from ragcache.engine.hf.onednn import use_onednn
from ragcache.engine.hf.packing import PackedForward
from ragcache.engine.hf.prompt_cache import PlacedKV
from ragcache.engine.hf.rope_probe import probe_layers
from ragcache.engine.hf.rope_scaling import (
    context_tokens,
    refuse_length_dependent_rope,
    unsupported_model,
)
from ragcache.engine.hf.tokenizing import TokenizerEngine
from ragcache.engine.json_format import JsonFormats
from ragcache.engine.kernels.choose import AttentionShape, choose
from ragcache.engine.plain_text import PlainText
from ragcache.engine.self_test import check_engine, supports_attention_rules, supports_packing
from ragcache.engine.template import split_chat_template
from ragcache.errors import ConfigError, ContextError, ModelError, PromptError
from ragcache.models.checkpoint import Checkpoint
from ragcache.models.file_cache import cached_text
from ragcache.models.memory import copy_to_memory, ensure_unchanged
from ragcache.types import ChunkKV, Sampling, Tokens
from ragcache.util.buffer_pool import SPARE_BYTES, BufferPool

__all__ = ["TransformersEngine"]

_ATTENTION, _PACKING = "attention", "packing"  # optional features that the self-test looks for
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Number of contexts whose KV is cached for the next chunks: the encoding context of the store, and
#: the one with which sensitivity is measured.
_CONTEXTS_KEPT = 2


class TransformersEngine(TokenizerEngine, Engine):
    """A model and tokenizer of the transformers library.

    It computes one prompt or one batch of chunks at a time; only tokenising is thread-safe.
    """

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
        """Wrap a loaded causal language model, and test that ragcache can compute with it.

        ``codec``: how its KV is stored. ``weights``: their digest; "" to compute it. ``kernels``:
        see :func:`ragcache.engine.kernels.choose.choose`. ``stock``: the model is an unmodified one
        of transformers, so the result of the self-test is cached on disk. Raises ModelError if
        ragcache cannot compute with the model.
        """
        self.model, self.tokenizer = model.eval(), tokenizer
        use_onednn(model)
        self.name = name or model.config.name_or_path or type(model).__name__
        refuse_length_dependent_rope(model.config, self.name)
        modules = _decoder_layers(model, self.name)
        layers, self.spec = probe_layers(model, modules, self.name)
        heads, dtype = (self.heads, self.spec.kv_heads), _DTYPES[self.spec.dtype]
        shape = AttentionShape(*heads, self.spec.head_dim, dtype, self.device)
        chosen = choose(kernels, shape, layers.rope)
        self.kernels, self.kernel_names = chosen.about, chosen.names
        self._forward = Forward(model, replace(layers, kernels=chosen), BufferPool(SPARE_BYTES))
        self._formats: JsonFormats | None = None
        self._contexts: dict[Tokens, PlacedKV] = {}  # of the last chunks, the latest last
        self.upload = Uploader(self.device) if self.device.type == "cuda" else None
        self.bos: int | None = tokenizer.bos_token_id
        self.context_tokens = context_tokens(model.config)
        self.sliding_window = _sliding_window(model.config.get_text_config())
        self.plain_text = PlainText(tokenizer, self.name)
        self.template = split_chat_template(tokenizer, self.tokenize)
        own = fingerprint(model, tokenizer, self.name, codec=codec, weights=weights)
        self.fingerprint = replace(own, spec=self.spec)
        key = self._self_test_key()
        found = cached_text("check", key, self._self_test) if stock else self._self_test()
        self.exposes_attention = self.repairs = _ATTENTION in found.split()
        self.packs_chunks = _PACKING in found.split()  # several chunks in one forward

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
        """Load a model by its hub name, or from a local folder or GGUF file.

        ``device`` and ``dtype`` as in :mod:`ragcache.engine.hf.device`; ``codec`` and ``kernels``
        as for the constructor. Raises ConfigError for unknown ones, and ModelError if the model
        cannot be loaded or used.
        """
        resolved = resolve_device(device)
        dtype = resolve_dtype(dtype, resolved.type)
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype {dtype!r} is unknown: use auto, {', '.join(_DTYPES)}")
        checkpoint = Checkpoint.of(name)
        with ensure_unchanged(checkpoint.folder, checkpoint.files) as identity:
            tokenizer = load_tokenizer(checkpoint)
            model = load_model(checkpoint, _DTYPES[dtype])
            weights = cached_weights_digest(model, identity)
            model = model.to(device=resolved)
            copy_to_memory(model)
        return cls(
            model,
            tokenizer,
            name=checkpoint.name,
            codec=codec,
            weights=weights,
            kernels=kernels,
            stock=True,
        )

    def _self_test(self) -> str:
        """Names of the optional features that the model supports, separated by spaces.

        Raises ModelError if the model cannot be used.
        """
        vocabulary = self.model.get_input_embeddings().num_embeddings
        check_engine(self, vocabulary, self.context_tokens)
        supported = {
            _ATTENTION: supports_attention_rules(self),
            _PACKING: supports_packing(self._encode, self.spec.dtype),
        }
        return " ".join(feature for feature, works in supported.items() if works)

    def _self_test_key(self) -> list[str]:
        """Everything that the result of the self-test depends on."""
        on = self.device
        name = torch.cuda.get_device_name(on) if on.type == "cuda" else platform.processor()
        return [
            self.fingerprint.digest.hex(),
            _code_digest(),
            *(f"{name} {version(name)}" for name in ("torch", "transformers")),
            f"{type(self.model).__module__}.{type(self.model).__qualname__}",
            f"attention {self._forward.config._attn_implementation}",
            f"{on.type} {platform.machine()} {name}",
            re.sub(r" \([^)]*\)", "", self.kernels),  # without measured times
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

    def encode(self, chunks: Sequence[Tokens], *, context: Tokens = ()) -> list[ChunkKV]:
        if not all(chunks):
            raise PromptError("a chunk has no tokens: leave it out")
        longest = max(map(len, chunks), default=0)
        self._check_length(len(context) + longest, "a chunk and its context")
        together = len(chunks) > 1 and self.packs_chunks
        batches = [chunks] if together else [[chunk] for chunk in chunks]
        return [kv for batch in batches for kv in self._encode(batch, context)]

    @torch.inference_mode()
    def _encode(self, chunks: Sequence[Tokens], context: Tokens) -> list[ChunkKV]:
        """KV of chunks, computed in one forward after ``context``."""
        pack = PackedForward(self._forward.config, [len(chunk) for chunk in chunks], len(context))
        ids = [token for chunk in chunks for token in chunk]
        kv, capture, dtype = self._continued(context, len(ids)), CaptureKV(), self.model.dtype
        override = pack if len(chunks) > 1 else None
        with self._forward.driven(kv, ids, pack.positions, capture, override=override) as arguments:
            self.model(**arguments)
        return [
            ChunkKV(
                chunk,
                tuple(copy_to_host(k[:, first:end], dtype) for k in capture.keys),
                tuple(copy_to_host(v[:, first:end], dtype) for v in capture.values),
            )
            for chunk, (first, end) in zip(chunks, pack.spans, strict=True)
        ]

    def _continued(self, context: Tokens, room: int) -> PlacedKV:
        """KV of ``context``, from the cache or computed, with ``room`` for more rows."""
        if not context:
            return self._forward.cache(room)
        kv = self._contexts.pop(context, None)
        if kv is None:
            kv = self._forward.cache(len(context))
            with self._forward.driven(kv, context, range(len(context))) as arguments:
                self.model(**arguments)
        self._contexts[context] = kv
        for earlier in list(self._contexts)[:-_CONTEXTS_KEPT]:
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
        kept: tuple[Prefilled, int] | None = None,
        placed: PlacedKV | None = None,
    ) -> Prefilled:
        positions = range(len(tokens)) if positions is None else positions
        if not tokens:
            raise PromptError("the prompt is empty: give it a question")
        self._check_length(max(len(tokens), positions[-1] + 1) + room, "prompt and answer")
        if placed is None:
            kv = self._rows_for(len(tokens) + room, kept)
        else:
            kv = placed
            kv.crop(0)  # the rows of the earlier forward are now rows in place
        with self._forward.driven(kv, tokens, positions, callbacks, attend=attend) as arguments:
            logits = self.model(**arguments).logits
        return Prefilled(logits[0, -1].float(), kv, len(tokens), positions[-1] + 1, attend)

    def _rows_for(self, capacity: int, kept: tuple[Prefilled, int] | None) -> PlacedKV:
        """A cache of ``capacity`` rows, which begins with those that are kept."""
        if kept is None:
            return self._forward.cache(capacity)
        earlier, rows = kept
        begun: PlacedKV = earlier.kv.beginning(rows, capacity)
        return begun

    @torch.inference_mode()
    def probe(
        self,
        tokens: Tokens,
        callbacks: PrefillCallbacks,
        attend: AttentionRule,
        *,
        positions: Sequence[int],
        layers: int,
        room: int = 1,
        kept: tuple[Prefilled, int] | None = None,
    ) -> PlacedKV:
        self._check_length(max(len(tokens), positions[-1] + 1), "the prompt")
        kv = self._rows_for(len(tokens) + room, kept)
        with (
            suppress(StopForward),
            self._forward.driven(
                kv, tokens, positions, callbacks, attend=attend, until=layers
            ) as arguments,
        ):
            self.model(**arguments)
        return kv

    def decode(
        self, prefilled: Prefilled, sampling: Sampling, *, draft: Draft | None = None
    ) -> Iterator[Step]:
        ends = end_tokens(self.model, self.tokenizer)
        prefilled.kv.crop(prefilled.rows)
        schema = sampling.schema_text
        constraint = None if schema is None else self._json_formats().constraint(schema)
        known = None if draft is None or prefilled.repair is not None else DraftReader(draft)
        answer: list[int] = []

        def following(token: int, position: int) -> Tensor:
            answer.append(token)
            logits = None if known is None else known.after(token)
            if logits is None:
                return self._following(prefilled, answer)
            prefilled.kv.begin(1)  # the draft's forward has written this row
            return logits

        return decode(following, self.tokenizer, ends, prefilled, sampling, constraint)

    def check_sampling(self, sampling: Sampling) -> None:
        if sampling.schema_text is not None:
            self._json_formats().constraint(sampling.schema_text)

    def _json_formats(self) -> JsonFormats:
        if self._formats is None:
            self._formats = JsonFormats(self.tokenizer, end_tokens(self.model, self.tokenizer))
        return self._formats

    def continuation_logits(self, prefilled: Prefilled, tokens: Tokens) -> Tensor:
        room = prefilled.kv.capacity - prefilled.rows
        if not 0 < len(tokens) <= room + 1:
            raise ValueError(f"{len(tokens)} tokens: at least 1, and {room} rows are reserved")
        prefilled.kv.crop(prefilled.rows)
        first = prefilled.logits[None]
        if len(tokens) == 1:
            return first
        if prefilled.repair is not None:
            kv = prefilled.kv.continued(len(tokens))
            copy = replace(prefilled, kv=kv, repair=prefilled.repair.copy())
            each = [self._following(copy, tokens[:n]) for n in range(1, len(tokens))]
            return torch.stack([prefilled.logits, *each])
        rest = self._forward_logits(
            prefilled, tokens[:-1], prefilled.next_position, prefilled.attend
        )
        prefilled.kv.crop(prefilled.rows)
        return torch.cat([first, rest])

    def _following(self, prefilled: Prefilled, answer: Sequence[int]) -> Tensor:
        """Logits (vocabulary,), float32, after the last token of ``answer``. What it attends to is
        repaired first."""
        repair = prefilled.repair
        attend = prefilled.attend
        if repair is not None:
            attend = repair.see if repair.looking else None
        position = prefilled.next_position + len(answer) - 1
        logits = self._forward_logits(prefilled, answer[-1:], position, attend)[-1]
        if repair is None or not len(rows := repair.take()):
            return logits
        tokens = *repair.tokens, *answer
        return self.prefill(
            tokens,
            ComputeRows(torch.cat([rows, torch.tensor([len(tokens) - 1])])),
            positions=(*repair.positions, *range(prefilled.next_position, position + 1)),
            room=0,
            placed=prefilled.kv,
        ).logits

    @torch.inference_mode()
    def _forward_logits(
        self,
        prefilled: Prefilled,
        tokens: Sequence[int],
        position: int,
        attend: AttentionRule | None,
    ) -> Tensor:
        """Logits (tokens, vocabulary), float32, after each of ``tokens`` from ``position`` on."""
        positions = range(position, position + len(tokens))
        with self._forward.driven(prefilled.kv, tokens, positions, attend=attend) as arguments:
            logits = self.model(**arguments | {"logits_to_keep": len(tokens)}).logits
        return cast(Tensor, logits[0].float())

    def _check_length(self, tokens: int, what: str) -> None:
        if tokens > self.context_tokens:
            raise ContextError(
                f"{what} need {tokens} tokens, but {self.name} has a context of "
                f"{self.context_tokens}. Retrieve fewer chunks (--top-k), make them smaller, or "
                "ask for a shorter answer."
            )


def _code_digest() -> str:
    """blake3 over the source files that compute with a model."""
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
        raise ModelError(unsupported_model(name, "its decoder layers cannot be found"))
    return cast(Sequence[nn.Module], layers)


def _sliding_window(config: Any) -> int | None:
    if not getattr(config, "use_sliding_window", True):
        return None
    window = getattr(config, "sliding_window", None)
    return int(window) if window else None
