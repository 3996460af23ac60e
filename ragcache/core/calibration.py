"""The calibration of a store: what may be promised about its answers, and for which of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from ragcache.blend import Blender, blender, with_ratio
from ragcache.errors import ConfigError, StoreError
from ragcache.store.catalog.catalog import Catalog
from ragcache.types import START_TOKENS, Certificate, Disagreement, Fingerprint, Plan, Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from ragcache.planning.context import EncodingContext

__all__ = [
    "Calibration",
    "certified",
    "drop_calibration",
    "first_token_margin",
    "is_uncertain",
    "recorded_calibration",
]

_SETTING = "calibration"


@dataclass(frozen=True, slots=True)
class Calibration:
    """The result of ``ragcache calibrate --epsilon``: with ``confidence``, answers to questions as
    it was made on disagree with full prefill's in at most a share ``epsilon`` of cases, in ``mode``
    at ``ratio``.

    With a ``least_margin``, those are escalated whose first token's margin is below it: they are
    computed by full prefill, and agree. That answers at higher ratios do not disagree more often
    was tested for some of them without escalation, and is assumed of all others. It holds for the
    model, codec, encoding context and revision of the method that it was made with, for prompts of
    no more chunks, and until a service finds that too many answers disagree.
    """

    epsilon: float
    confidence: float
    disagreement: Disagreement
    max_tokens: int  # of the compared answers
    mode: str  # as :func:`ragcache.blend.blender` reads it, without the ratio
    ratio: float | None  # None: the mode takes none
    questions: int
    failures: int  # questions whose answers disagreed
    model: str  # its name and the beginning of its fingerprint, for display
    fingerprint: str  # digest of the model's, in hex
    codec: str
    encoding_context: str
    date: str  # in ISO format
    least_margin: float = 0.0  # 0: no answer is escalated
    context_digest: str = ""  # of the encoding context's tokens
    revision: int = 0  # of the method; 0: it was not recorded
    most_chunks: int = 0  # of a prompt
    refuted: str = ""  # what showed that the promise is not kept; empty: nothing

    def record(self, catalog: Catalog) -> None:
        """Record it in a store, in place of an earlier one."""
        catalog.put_setting(_SETTING, json.dumps(asdict(self)))

    def expired(self, fingerprint: Fingerprint, encoding: EncodingContext) -> str:
        """Why it says nothing about answers with this model, encoding context and version of
        ragcache; empty if it does."""
        if fingerprint.codec != self.codec:
            return f"it was calibrated with codec {self.codec}, and this is {fingerprint.codec}"
        if encoding.mode != self.encoding_context:
            return (
                f"it was calibrated with encoding context {self.encoding_context}, and this is "
                f"{encoding.mode}"
            )
        if fingerprint.digest.hex() != self.fingerprint:
            return f"it was calibrated with the model {self.model}, and this is {fingerprint}"
        if not self.context_digest:
            return "it was calibrated with an earlier version of ragcache: calibrate again"
        if encoding.digest != self.context_digest:
            return (
                f"it was calibrated with other text in the encoding context {encoding.mode}: "
                "calibrate again"
            )
        if self.blender.revision != self.revision:
            return (
                f"it was calibrated with an earlier version of ragcache, whose mode {self.mode} "
                "computed other tokens: calibrate again"
            )
        return ""

    @property
    def blender(self) -> Blender:
        """The calibrated mode at the calibrated ratio."""
        made = blender(self.mode)
        return made if self.ratio is None else with_ratio(made, self.ratio)

    def matches(self, made: Blender) -> bool:
        """Whether ``made`` is the calibrated mode, at any ratio."""
        if self.ratio is None or made.ratio is None:
            return made == self.blender
        return with_ratio(made, self.ratio) == self.blender

    def certificate(
        self, made: Blender, sampling: Sampling, chunks: int, reason: str = ""
    ) -> Certificate:
        """The certificate of an answer by ``made``, to a prompt of so many ``chunks``. ``reason``:
        why the promise is not made for it, whatever its mode; empty if nothing speaks against
        it."""
        why = reason or self._uncovered(made, sampling, chunks)
        return Certificate(
            not why,
            why,
            self.epsilon,
            self.confidence,
            self.disagreement,
            self.mode,
            self.ratio,
            self.questions,
            self.date,
            self.least_margin,
        )

    def issued(self, certificate: Certificate) -> bool:
        """Whether it still makes the promise of ``certificate``, and it is its own."""
        own = self.epsilon, self.mode, self.ratio, self.questions, self.date, self.least_margin
        its = certificate.epsilon, certificate.mode, certificate.ratio, certificate.questions
        return not self.refuted and own == (*its, certificate.date, certificate.least_margin)

    def _uncovered(self, made: Blender, sampling: Sampling, chunks: int) -> str:
        if sampling.temperature > 0:
            return "greedy answers were calibrated, and this one is sampled"
        if sampling.json_schema is not None:
            return "free answers were calibrated, and this one follows a JSON schema"
        if made.reuses == "nothing":  # full prefill agrees with itself
            return ""
        if self.refuted:
            return self.refuted
        if not self.matches(made):
            return f"mode {self.mode} was calibrated, and this is {made.mode}"
        if made.ratio is not None and self.ratio is not None and made.ratio < self.ratio:
            return f"a ratio of {self.ratio:g} was calibrated, and this is {made.ratio:g}"
        if chunks > self.most_chunks:
            return (
                f"prompts of up to {self.most_chunks} chunks were calibrated, and this has {chunks}"
            )
        whole = self.disagreement == "answer" or self.max_tokens < START_TOKENS
        if whole and sampling.max_tokens > self.max_tokens:
            return (
                f"answers of {self.max_tokens} tokens were calibrated, and this may have "
                f"{sampling.max_tokens}"
            )
        return ""


_RECORD = TypeAdapter(Calibration)


def recorded_calibration(catalog: Catalog) -> Calibration | None:
    """That of a store; None without one. Raises StoreError for a malformed record."""
    text = catalog.get_setting(_SETTING)
    if text is None:
        return None
    try:
        found = _RECORD.validate_json(text)
        _ = found.blender
    except (ValidationError, ConfigError) as error:
        raise StoreError(
            f"the calibration that is recorded in the store cannot be read: {error}. Calibrate "
            "again: `ragcache calibrate QUESTIONS --epsilon 0.05 --save` replaces it."
        ) from error
    return found


def drop_calibration(catalog: Catalog) -> bool:
    """Delete that of a store; True if there was one."""
    return catalog.drop_setting(_SETTING)


def first_token_margin(logits: Tensor) -> float:
    """The highest of ``logits`` (vocabulary,) minus the second highest: the logarithm of how many
    times more likely the most likely token is than the next."""
    first, second = logits.float().topk(2).values.tolist()
    return float(first - second)


def is_uncertain(margin: float, least: float) -> bool:
    """Whether an answer with this margin is escalated."""
    return not margin >= least  # NaN is not


def certified(
    given: Certificate | None, plan: Plan | None, logits: Tensor | None, *, is_full: bool
) -> Certificate | None:
    """The certificate ``given`` to a request, once its prompt is prefilled; None without one.

    ``logits``: of the first token; None: they cannot be known. ``is_full``: no KV of a chunk was
    loaded, so that this was full prefill. The caller must escalate an answer of which the
    certificate says so.
    """
    if given is None or not given.covered:
        return given
    if plan is not None and plan.levels:
        reason = f"{len(plan.levels)} chunks were loaded in another codec than the calibrated one"
        return replace(given, covered=False, reason=reason)
    if is_full or not given.least_margin:
        return given
    if logits is None:
        reason = (
            "answers are to be escalated by the margin of their first token, and its logits are "
            "not known here"
        )
        return replace(given, covered=False, reason=reason)
    margin = first_token_margin(logits)
    return replace(given, margin=margin, escalated=is_uncertain(margin, given.least_margin))
