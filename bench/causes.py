"""What is wrong with reused KV, and where: what the rules of ``bench.rules`` have to work with.

``python -m bench.causes --model MODEL --set FILE --out FILE`` asks the questions of a data set
(``python -m bench.questions``) in ragcache's own prompt. Three things are measured for each:

- **Parts of the error.** The stored KV is replaced by KV with a part of its error taken away, and
  reused: exact keys with stored values and the reverse, exact KV in a third of the layers, KV
  computed after other texts, and KV without the *common* part of the error, its mean over the rows
  of a chunk. Exact KV that is stored, loaded and placed is there too, which shows what that loses.
- **Estimated errors.** The most sensitive rows are recomputed, as in ``fused:attention=0``, and the
  errors that they turn out to have are extrapolated to the other rows of their chunk, see
  :func:`extrapolated`.
- **Kinds of tokens.** For each kind, its shares of the rows, of the error of keys and values, and
  of attention times error; and equally many rows of each are recomputed.

Outcomes are saved after every question; the same command goes on where it was stopped. ``--only
TEXT`` asks only the variants whose label contains TEXT. ``python -m bench.causes --out FILE --table
PAGE`` writes the tables of what is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from bench.agreement import INSTRUCTION, Benchmark, Outcome, reply
from bench.observed import By, Observed, in_full, observe
from bench.results import table
from bench.rules import computed
from ragcache.blend import blender
from ragcache.blend.base import FixedRows
from ragcache.blend.ranking import highest
from ragcache.engine.base import Engine
from ragcache.planning.context import DEFAULT_CONTEXT, EncodingContext, encoding_context
from ragcache.store.memory import MemoryStore
from ragcache.types import ChunkKV, Prompt

RATIO = 0.15  # of the rows, recomputed where errors are estimated
KIND_RATIO = 0.05  # of the rows, recomputed of every kind
#: Of :func:`extrapolated`: tokens over which errors stay alike, and the variance of what is a row's
#: own in that of what its chunk has in common.
NEAR, OWN = 8.0, 3.0
KINDS = "first", "line break", "digit", "punctuation", "name", "word", "rest of a word"
SHARES = "rows", "key error", "value error", "attention * error"

Errors = tuple[ChunkKV, ChunkKV]  # a chunk's stored KV, and that of full prefill
Change = Callable[[Errors, int], ChunkKV]


def mixed(keys: bool, values: bool, layers: Callable[[int], range] | None = None) -> Change:
    """A change to KV that is exact in its ``keys`` and ``values``, in some layers or in all."""

    def change(errors: Errors, layers_of: int) -> ChunkKV:
        stored, exact = errors
        here = range(layers_of) if layers is None else layers(layers_of)
        return replace(
            stored,
            keys=tuple((exact if keys and n in here else stored).keys[n] for n in range(layers_of)),
            values=tuple(
                (exact if values and n in here else stored).values[n] for n in range(layers_of)
            ),
        )

    return change


def without_common(keys: bool, values: bool) -> Change:
    """A change to KV without the mean error of its rows, of every layer, head and dimension."""

    def change(errors: Errors, layers: int) -> ChunkKV:
        stored, exact = errors

        def moved(own: Sequence[Tensor], true: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(o + (t - o).mean(1, keepdim=True) for o, t in zip(own, true, strict=True))

        return replace(
            stored,
            keys=moved(stored.keys, exact.keys) if keys else stored.keys,
            values=moved(stored.values, exact.values) if values else stored.values,
        )

    return change


CHANGES: Mapping[str, Change] = {
    "reuse": mixed(False, False),
    "exact KV, stored and placed": mixed(True, True),
    "exact keys": mixed(True, False),
    "exact values": mixed(False, True),
    "exact in the first third of the layers": mixed(True, True, lambda n: range(n // 3)),
    "exact in the middle third": mixed(True, True, lambda n: range(n // 3, 2 * n // 3)),
    "exact in the last third": mixed(True, True, lambda n: range(2 * n // 3, n)),
    "keys without the common error": without_common(True, False),
    "values without the common error": without_common(False, True),
    "both without the common error": without_common(True, True),
}
#: Reused KV of other encoding contexts, and of a chunk after the one that precedes it here.
CONTEXTS = {
    "after a BOS token": "bos",
    "after the exact prefix": "prefix",
    "after the exact prefix and the chunk before": "",
}
ESTIMATES = {
    f"{RATIO:.0%} recomputed": "",
    f"{RATIO:.0%} recomputed, keys extrapolated": "keys",
    f"{RATIO:.0%} recomputed, values extrapolated": "values",
    f"{RATIO:.0%} recomputed, both extrapolated": "keys values",
}
OF_KIND = {f"{KIND_RATIO:.0%} of the rows: {kind}": kind for kind in (*KINDS, "any")}
LABELS = (*CHANGES, *CONTEXTS, *ESTIMATES, *OF_KIND)


def extrapolated(error: Tensor, place: Tensor, sensitivity: Tensor, known: Tensor) -> Tensor:
    """The errors of all rows of a chunk, estimated from those of the rows ``known``, (n,) bool.

    ``error`` is (heads, known rows, dimensions); the result is (heads, n, dimensions). Errors are
    taken for values of a Gaussian process with the covariance

        u_i^(1/4) u_j^(1/4) (1 + exp(-|place_i - place_j| / NEAR)),

    and OWN u_i^(1/2) more for each row by itself, with the sensitivities u: rows of a chunk have a
    part of their error in common, near ones more of it, and sensitive ones larger errors. The
    weights are the same for all layers, heads and dimensions.
    """
    size = sensitivity.clamp_min(1e-6) ** 0.25
    near = 1 + torch.exp(-(place[:, None] - place[known][None]).abs() / NEAR)
    among = near[known] + OWN * torch.eye(int(known.sum()))
    weights = torch.linalg.solve(among, near.T).T * size[:, None] / size[known]
    made: Tensor = weights @ error
    return made


def kinds(pieces: Sequence[str], first: int = 4) -> list[str]:
    """The kind of every token of a chunk, by its text and place; ``first`` ones are ``first``."""
    return ["first" if n < first else _kind(piece) for n, piece in enumerate(pieces)]


def _kind(piece: str) -> str:
    text = piece.strip()
    if not text:
        return "line break" if "\n" in piece else "punctuation"
    if any(letter.isdigit() for letter in text):
        return "digit"
    if not any(letter.isalpha() for letter in text):
        return "punctuation"
    if text[0].isupper():
        return "name"
    return "word" if piece[0].isspace() else "rest of a word"


def ask(
    engine: Engine, encoding: EncodingContext, prompt: Prompt, labels: Collection[str]
) -> dict[str, dict[str, float]]:
    """The agreement with full prefill of the variants ``labels``, and the shares of every kind."""
    store = computed(engine, encoding, prompt)
    keys = [encoding.key(engine.fingerprint, chunk) for chunk in prompt.chunks]
    full = reply(engine, store, encoding, prompt, blender("full"), ())
    seen = observe(engine, store, encoding, prompt, full.tokens[:-1])
    exact, _ = in_full(engine, prompt, full.tokens[:-1])
    errors = [
        (kv, one)
        for key, one in zip(keys, exact, strict=True)
        if isinstance(kv := store.get(key), ChunkKV)
    ]
    assert len(errors) == len(keys), "all chunks were computed"
    found: dict[str, dict[str, float]] = {}

    def measure(label: str, made: Sequence[ChunkKV], rows: Tensor | None = None) -> None:
        changed = MemoryStore()
        for key, kv in zip(keys, made, strict=True):
            changed.put(key, kv)
        method = blender("reuse") if rows is None else By(lambda *_: FixedRows(rows))
        found[label] = reply(engine, changed, encoding, prompt, method, full.tokens).agreement(full)

    stored, layers = [kv for kv, _ in errors], engine.spec.layers
    for label, change in CHANGES.items():
        if label in labels:
            measure(label, [change(error, layers) for error in errors])
    for label, name in CONTEXTS.items():
        if label in labels:
            measure(label, _encoded(engine, prompt, stored, name))
    count = int(RATIO * len(seen.rows))
    rows = highest(seen.rows, seen.sensitivity, count)
    for label, planes in ESTIMATES.items():
        if label in labels:
            known = torch.isin(seen.rows, rows)
            parts = [known[seen.chunk == n] for n in range(len(keys))]
            made = [
                _estimated(error, part, planes) for error, part in zip(errors, parts, strict=True)
            ]
            measure(label, made, rows)
    every = [kind for chunk in prompt.chunks for kind in kinds(engine.pieces(chunk))]
    for label, kind in OF_KIND.items():
        if label in labels:
            here = torch.tensor([kind in (one, "any") for one in every])
            measure(label, stored, _spread(seen.rows[here], int(KIND_RATIO * len(seen.rows))))
    return found | {f"kind: {kind}": shares(seen, every, kind) for kind in KINDS}


def shares(seen: Observed, kinds: Sequence[str], kind: str) -> dict[str, float]:
    """The shares of the rows of a kind in all rows, errors, and attention times error."""
    here = torch.tensor([one == kind for one in kinds])
    harm = seen.true_peak * (seen.key_error.sqrt() + seen.value_error.sqrt())
    of = torch.ones(len(here)), seen.key_error.mean(0), seen.value_error.mean(0), harm.mean(0)
    return {
        name: float(each[here].sum() / each.sum()) for name, each in zip(SHARES, of, strict=True)
    }


def _encoded(engine: Engine, prompt: Prompt, stored: Sequence[ChunkKV], name: str) -> list[ChunkKV]:
    """The chunks, computed after an encoding context, or after what precedes them: the prefix and
    one chunk. Sensitivities are the stored ones."""
    if name:
        context = encoding_context(name, engine).context
        made = engine.encode(prompt.chunks, context=context)
    else:
        before = ((), *prompt.chunks[:-1])
        pairs = zip(prompt.chunks, before, strict=True)
        made = [engine.encode([one], context=prompt.prefix + b)[0] for one, b in pairs]
    return [
        replace(new, sensitivity=old.sensitivity) for new, old in zip(made, stored, strict=True)
    ]


def _estimated(errors: Errors, known: Tensor, planes: str) -> ChunkKV:
    """Stored KV and the errors that are estimated from those of the rows ``known``."""
    stored, exact = errors
    if not known.any():
        return stored
    place, sensitivity = torch.arange(len(known)), torch.tensor(stored.sensitivity)

    def moved(own: Sequence[Tensor], true: Sequence[Tensor]) -> tuple[Tensor, ...]:
        pairs = zip(own, true, strict=True)
        return tuple(
            o + extrapolated((t - o)[:, known], place, sensitivity, known) for o, t in pairs
        )

    return replace(
        stored,
        keys=moved(stored.keys, exact.keys) if "keys" in planes else stored.keys,
        values=moved(stored.values, exact.values) if "values" in planes else stored.values,
    )


def _spread(rows: Tensor, count: int) -> Tensor:
    """At most ``count`` of ``rows``, evenly spread over them."""
    if len(rows) <= count:
        return rows
    return rows[((torch.arange(count) + 0.5) * len(rows) / count).long()]


def _asked(
    engine: Engine, chunks: Sequence[str], question: str, labels: Collection[str]
) -> Outcome:
    prompt = engine.template.prompt(chunks, question, INSTRUCTION)
    return ask(engine, encoding_context(DEFAULT_CONTEXT, engine), prompt, labels)


def _pairs(labels: Collection[str]) -> list[tuple[str, str]]:
    """Every variant minus what it changes, of those that were measured."""
    nothing, *estimates = ESTIMATES
    any_kind = [*OF_KIND][-1]
    pairs = [(one, "reuse") for one in (*CHANGES, *CONTEXTS) if one != "reuse"]
    pairs += [(one, nothing) for one in estimates]
    pairs += [(one, any_kind) for one in OF_KIND if one != any_kind]
    return [pair for pair in pairs if set(pair) <= set(labels)]


def kind_table(outcomes: Sequence[Outcome]) -> str:
    """The shares of every kind, means over questions."""
    rows = [
        [
            kind,
            *(f"{fmean(one[f'kind: {kind}'][share] for one in outcomes):.1%}" for share in SHARES),
        ]
        for kind in KINDS
    ]
    return table(["kind of token", *(f"share of {share}" for share in SHARES)], rows)


def main() -> None:
    Benchmark(__doc__, lambda: LABELS, _asked, _pairs, more=kind_table).main()


if __name__ == "__main__":
    main()
