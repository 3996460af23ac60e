"""Drive a model that vLLM has loaded, layer by layer, over vLLM's paged KV cache.

vLLM's modules do all computation; this module chooses the rows. Rows to compute form contiguous
runs, each of which is passed to the attention backend as a sequence over the same block table. So
vLLM's kernels attend to loaded and computed rows alike, and write computed ones to their slots.
Loaded rows are written by the backend's own function, so any page layout works. Nothing is patched:
hooks on the attention modules last for one prefill.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata

from ragcache.engine.base import AttentionRule, LayerView, PrefillCallbacks, Prefilled, Prefiller
from ragcache.engine.hf.attention_hook import EagerAttentionCall
from ragcache.engine.hf.layer_hooks import DecoderLayers, PlacedLayerView
from ragcache.engine.hf.prompt_cache import PlacedKV, StopAfterKV
from ragcache.engine.hf.rope import Rope
from ragcache.engine.hf.rope_scaling import refuse_length_dependent_rope
from ragcache.engine.self_test import check_engine, supports_attention_rules
from ragcache.errors import ModelError, PromptError
from ragcache.types import ChunkKV, KVSpec, Tokens
from ragcache.util.buffer_pool import SPARE_BYTES, BufferPool
from ragcache.vllm.slots import contiguous_runs, slot_mapping

_SUPPORTED = (
    "ragcache supports vLLM's decoders of the Llama family: Llama, Qwen, Mistral, Gemma, Phi."
)
_SELF_TEST_ROWS = 64  # the most that ragcache.engine.self_test needs


class VllmModel(Prefiller):
    """``model`` and its paged KV cache in a worker. Not thread-safe.

    Raises ModelError for a model whose layers cannot be driven, or give different results when they
    are: the embedded engine's self-test runs on a few random tokens. ``spec`` describes this
    worker's heads. KV is written to the blocks of :meth:`using_blocks`. ``fingerprint`` is set by
    the connector.
    """

    def __init__(self, model: Any, config: Any, group: Any) -> None:
        self.model, self.config, self.group = model, config, group
        self.name = str(config.model_config.model)
        refuse_length_dependent_rope(config.model_config.hf_config, self.name)
        self.decoder = getattr(model, "model", None)
        self.layers: Sequence[nn.Module] = list(getattr(self.decoder, "layers", ()))
        self.attention = [_single_module(layer, Attention, self.name) for layer in self.layers]
        self.device = self.attention[0].kv_cache.device
        self.block_size: int = group.kv_cache_spec.block_size
        self._blocks = torch.empty(0, dtype=torch.int64)
        self._row_metadata: tuple[Tensor, Any, Tensor] | None = (
            None  # rows, metadata and slots of the last call
        )
        self._memory = BufferPool(SPARE_BYTES)
        rotary = [_rotary(layer, self.name) for layer in self.layers]
        self._angles = [None if r is None else r.cos_sin_cache for r in rotary]
        partial = next((r for r in rotary if r is not None), None)
        if partial is None:
            raise ModelError(
                f"{self.name} cannot be used: no layer of vLLM's model has RoPE. {_SUPPORTED}"
            )
        width = None if partial.rotary_dim == partial.head_size else int(partial.rotary_dim)
        rope = Rope(apply_rotary_pos_emb, width, halves=True)
        self._rope = DecoderLayers(self.layers, rope, [r is not None for r in rotary])
        heads, dim = self.attention[0].num_kv_heads, self.attention[0].head_size
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        self.spec = KVSpec(len(self.layers), heads, dim, dtype)
        backend = self.attention[0].get_attn_backend()
        self._metadata = backend.get_builder_cls()(
            group.kv_cache_spec, list(group.layer_names), config, self.device
        )
        self._check()

    def _check(self) -> None:
        blocks = range(
            1, 2 + _SELF_TEST_ROWS // self.block_size
        )  # still unused; vLLM reserves block 0
        with self.using_blocks(list(blocks)):
            try:
                model = self.config.model_config
                angles = [len(cache) for cache in self._angles if cache is not None]
                check_engine(self, model.get_vocab_size(), min([model.max_model_len, *angles]))
                self.exposes_attention = supports_attention_rules(self)
            except (TypeError, AttributeError, RuntimeError) as error:
                raise ModelError(
                    f"{self.name} cannot be used: its layers cannot be driven ({error}). "
                    f"{_SUPPORTED}"
                ) from error

    @contextmanager
    def using_blocks(self, blocks: Sequence[int]) -> Iterator[None]:
        """In the ``with`` block, rows are those of the prompt with these ``blocks``."""
        before, self._blocks = self._blocks, torch.tensor(blocks, device=self.device)
        self._row_metadata = None
        try:
            yield
        finally:
            self._blocks, self._row_metadata = before, None

    def encode(self, chunks: Sequence[Tokens], *, context: Tokens = ()) -> list[ChunkKV]:
        if not all(chunks):
            raise PromptError("a chunk has no tokens: leave it out")
        return [self._encode(chunk, context) for chunk in chunks]

    def _encode(self, chunk: Tokens, context: Tokens) -> ChunkKV:
        callbacks = _CollectKV(len(context), len(context) + len(chunk))
        self.prefill(context + chunk, callbacks)
        keys, values = zip(*callbacks.taken, strict=True)
        return ChunkKV(chunk, keys, values)

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
        placed: int | None = None,
    ) -> Prefilled:
        if kept is not None:
            raise NotImplementedError("vLLM keeps the KV of earlier prompts itself")
        positions = range(len(tokens)) if positions is None else positions
        if callbacks is None and attend is None:
            hidden = self._forward(tokens, positions)
        else:
            hidden = self._prefill_layers(
                tokens, callbacks or PrefillCallbacks(), positions, attend, placed=placed or 0
            )
        logits = self.model.compute_logits(hidden[-1:])
        return Prefilled(
            logits[0].float(), len(self.layers), len(tokens), positions[-1] + 1, attend
        )

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
    ) -> int:
        """As in the contract. The KV is in the prompt's blocks: the number of layers is
        returned."""
        if kept is not None:
            raise NotImplementedError("vLLM keeps the KV of earlier prompts itself")
        self._prefill_layers(tokens, callbacks, positions, attend, until=layers)
        return layers

    def _forward(self, tokens: Tokens, positions: Sequence[int]) -> Tensor:
        """The model's own forward pass over all rows; returns hidden states (n, width)."""
        rows = torch.arange(len(tokens), device=self.device)
        with self._forward_context(rows):
            return cast(
                Tensor,
                self.model(torch.tensor(tokens, device=self.device), self._to_tensor(positions)),
            )

    def _prefill_layers(
        self,
        tokens: Tokens,
        callbacks: PrefillCallbacks,
        positions: Sequence[int],
        attend: AttentionRule | None,
        until: int | None = None,
        placed: int = 0,
    ) -> Tensor:
        """Hidden states, after the last norm, of the rows that the last layer computed; no rows if
        the forward stops before layer ``until``. All rows of the first ``placed`` layers are in the
        blocks."""
        assert self.decoder is not None
        state = _HiddenState(
            torch.arange(len(tokens), device=self.device),
            self.decoder.embed_input_ids(torch.tensor(tokens, device=self.device)),
        )
        place = self._to_tensor(positions)
        for index in range(len(self.layers) if until is None else until):
            state = self._layer(index, state, callbacks, place, attend, index < placed)
        if until is not None:
            return state.hidden
        hidden, _ = self.decoder.norm(state.hidden, state.residual)
        return cast(Tensor, hidden)

    def _layer(
        self,
        index: int,
        state: _HiddenState,
        callbacks: PrefillCallbacks,
        place: Tensor,
        attend: AttentionRule | None,
        placed: bool,
    ) -> _HiddenState:
        """Compute one layer for the rows that ``callbacks`` choose among those of ``state``."""
        kv = PlacedKV(len(self.layers), len(place), self._memory)
        kv.begin(len(place))
        view = PlacedLayerView(self._rope, kv, index, self._rope_angles(index, place))
        kv.on_fresh = callbacks.after
        state = state.select(callbacks.before(index, view))
        if not placed:
            self._write_rows(index, kv, _complement(state.rows, len(place)))
        call = _AttentionHooks(index, kv, attend)
        if callbacks.narrows(index):
            self._run_until_kv(index, state, place, call)
            state, all_rows = state.select(callbacks.narrowed(index)), state.rows
            self._write_rows(index, kv, all_rows[~torch.isin(all_rows, state.rows)])
        kv.rows = state.rows
        with call.hooked(self.attention[index], state.rows), self._forward_context(state.rows):
            hidden, residual = self.layers[index](place[state.rows], state.hidden, state.residual)
        return _HiddenState(state.rows, hidden, residual)

    def _run_until_kv(
        self, index: int, state: _HiddenState, place: Tensor, call: _AttentionHooks
    ) -> None:
        """Run a layer until its new KV is known, and pass it on; other results are discarded."""
        call.kv.rows, call.kv.stop_after_kv = state.rows, True
        residual = None if state.residual is None else state.residual.clone()
        try:
            with call.hooked(self.attention[index], state.rows), self._forward_context(state.rows):
                self.layers[index](place[state.rows], state.hidden.clone(), residual)
        except StopAfterKV:
            pass
        finally:
            call.kv.stop_after_kv, call.kv.on_fresh = False, None

    def _write_rows(self, index: int, kv: PlacedKV, rows: Tensor) -> None:
        """Write rows that are not computed into their pages."""
        if not len(rows):
            return
        keys, values = (
            t[0].index_select(1, rows).transpose(0, 1).contiguous() for t in kv.buffers(index)
        )
        layer = self.attention[index]
        at = slot_mapping(rows, self._blocks, self.block_size)
        layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, at)

    def _rope_angles(self, index: int, place: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of every row, (1, n, rotary_dim) each; vLLM stores half of both."""
        cache = self._angles[index]
        if cache is None:
            cache = next(c for c in self._angles if c is not None)  # not used by this layer
        cos, sin = cache[place].float().chunk(2, dim=-1)
        return cos.repeat(1, 2)[None], sin.repeat(1, 2)[None]

    def _to_tensor(self, positions: Sequence[int]) -> Tensor:
        return torch.tensor(positions, device=self.device)

    @contextmanager
    def _forward_context(self, rows: Tensor) -> Iterator[None]:
        """vLLM's forward context for the sorted ``rows``."""
        if self._row_metadata is None or self._row_metadata[0] is not rows:
            self._row_metadata = rows, *self._build_metadata(rows)
        _, metadata, at = self._row_metadata
        names = self.group.layer_names
        with set_forward_context(
            dict.fromkeys(names, metadata),
            self.config,
            num_tokens=len(rows),
            slot_mapping=dict.fromkeys(names, at),
            skip_compiled=True,
        ):
            yield

    def _build_metadata(self, rows: Tensor) -> tuple[Any, Tensor]:
        """The backend's attention metadata of ``rows``, and their slots."""
        at = slot_mapping(rows, self._blocks, self.block_size)
        made = contiguous_runs(rows)
        starts = made.starts.cpu()
        table = self._blocks.to(torch.int32)[None].repeat(len(made), 1)
        metadata = self._metadata.build(
            0,
            CommonAttentionMetadata(
                query_start_loc=made.starts,
                query_start_loc_cpu=starts,
                seq_lens=made.lengths,
                num_reqs=len(made),
                num_actual_tokens=len(rows),
                max_query_len=made.longest,
                max_seq_len=int(made.lengths.max()),
                block_table_tensor=table,
                slot_mapping=at,
                causal=True,
                positions=rows,
            ),
        )
        return metadata, at


class _HiddenState:
    """Hidden states and residual of ``rows`` between two layers."""

    def __init__(self, rows: Tensor, hidden: Tensor, residual: Tensor | None = None) -> None:
        self.rows, self.hidden, self.residual = rows, hidden, residual

    def select(self, rows: Tensor) -> _HiddenState:
        """Only ``rows``, which are a subset."""
        rows = rows.to(self.rows.device)
        if len(rows) == len(self.rows):
            return self
        local = torch.searchsorted(self.rows, rows)
        residual = None if self.residual is None else self.residual[local]
        return _HiddenState(rows, self.hidden[local], residual)


class _AttentionHooks:
    """Hooks on one layer's attention, which collect its new KV and apply an attention rule."""

    def __init__(self, layer: int, kv: PlacedKV, attend: AttentionRule | None) -> None:
        self.layer, self.kv, self.attend = layer, kv, attend

    @contextmanager
    def hooked(self, module: Any, rows: Tensor) -> Iterator[None]:
        """Register the hooks in the ``with`` block, in which the layer is computed for ``rows``."""

        def before(module: Any, args: Any, kwargs: Any) -> None:
            _, keys, values = _inputs(module, args, kwargs)
            self.kv.update(keys[None], values[None], self.layer)

        def after(module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            assert self.attend is not None
            queries, _, _ = _inputs(module, args, kwargs)
            answer = self.attend(self._call(module, queries, rows))
            return None if answer is None else answer.transpose(0, 1).reshape(output.shape)

        with ExitStack() as stack:
            handles = [module.register_forward_pre_hook(before, with_kwargs=True)]
            if self.attend is not None:
                handles.append(module.register_forward_hook(after, with_kwargs=True))
            for handle in handles:
                stack.callback(handle.remove)
            yield

    def _call(self, module: Any, queries: Tensor, rows: Tensor) -> EagerAttentionCall:
        keys, values = self.kv.buffers(self.layer)
        return EagerAttentionCall(
            layer=self.layer,
            rows=rows,
            queries=queries,
            keys=keys[0],
            values=values[0],
            mask=None,
            scale=module.impl.scale,
            softcap=getattr(module.impl, "logits_soft_cap", None) or None,
            sinks=getattr(module.impl, "sinks", None),
        )


class _CollectKV(PrefillCallbacks):
    """Computes every row and keeps the KV of those from ``start`` on."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self.taken: list[tuple[Tensor, Tensor]] = []

    def before(self, layer: int, kv: LayerView) -> Tensor:
        self.view = kv
        return kv.all_rows

    def after(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.taken.append(self.view.take(self.start, self.stop))


def _inputs(module: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Queries, keys and values of a call of an attention module, (heads, n, head_dim) each."""
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    sizes = (module.num_heads, module.num_kv_heads, module.num_kv_heads)
    return [
        given[name].view(-1, heads, module.head_size).transpose(0, 1)
        for name, heads in zip(("query", "key", "value"), sizes, strict=True)
    ]


def _complement(rows: Tensor, total: int) -> Tensor:
    """The rows below ``total`` that are not in ``rows``."""
    left = torch.ones(total, dtype=torch.bool, device=rows.device)
    left[rows] = False
    return left.nonzero()[:, 0]


def _single_module(layer: nn.Module, kind: type, model: str) -> Any:
    found = [module for module in layer.modules() if isinstance(module, kind)]
    if len(found) != 1:
        raise ModelError(
            f"{model} cannot be used: a layer has {len(found)} attention modules of vLLM's usual "
            "kind, and ragcache needs exactly one."
        )
    return found[0]


def _rotary(layer: nn.Module, model: str) -> Any:
    """The module that applies RoPE in a layer; None without one."""
    found = {id(m): m for m in layer.modules() if hasattr(m, "is_neox_style")}
    rotary = [m for m in found.values() if hasattr(m, "rotary_dim")]
    if not rotary:
        return None
    if len(rotary) > 1 or not rotary[0].is_neox_style or not hasattr(rotary[0], "cos_sin_cache"):
        raise ModelError(
            f"{model} cannot be used: its RoPE ({type(rotary[0]).__name__}) does not rotate halves "
            "of keys by a table, as Llama's does"
        )
    return rotary[0]
