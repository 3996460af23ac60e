"""Ask questions in several modes over the same stored chunks, and score every answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ragcache.blend import Blender
from ragcache.core.calibration import first_token_margin
from ragcache.core.generate import LocalGenerator
from ragcache.core.precompute import precompute, store_variants
from ragcache.core.request import PromptRequest
from ragcache.engine.base import Engine
from ragcache.eval.dataset import AnswerLength, EvalContext, Question, answer_length
from ragcache.eval.metrics import (
    answer_agreement,
    exact_match,
    f1,
    first_line,
    first_token_kl,
    rouge_l,
)
from ragcache.eval.no_context import NoContext
from ragcache.eval.outcomes import AskedQuestion, QuestionOutcome
from ragcache.planning.context import DEFAULT_CONTEXT, EncodingContext, encoding_context
from ragcache.store.base import ChunkStore
from ragcache.store.key import ChunkKey
from ragcache.types import START_TOKENS, Answer, Prompt, Sampling, Tokens

_PRECEDING = 2, 3, 4  # distances, in chunks, of the chunks before a variant's chunk


def ask_questions(
    engine: Engine,
    store: ChunkStore,
    contexts: Sequence[EvalContext],
    modes: Mapping[str, Blender],
    *,
    compile_mode: str = DEFAULT_CONTEXT,
    max_tokens: int = 32,
    instruction: str = "",
    length: AnswerLength | None = None,
) -> Iterator[AskedQuestion]:
    """Every question of ``contexts``, in order, answered greedily in every mode.

    See :func:`ragcache.eval.evaluate.evaluate`. ``length``: how long the data set's answers are;
    None: as in ``contexts``.
    """
    encoding = encoding_context(compile_mode, engine)
    length = answer_length(contexts) if length is None else length
    asking = _Asking(engine, store, encoding, dict(modes), max_tokens, instruction, length)
    numbers: dict[tuple[str, ...], int] = {}  # entries with the same chunks are one context
    for context in contexts:
        number = numbers.setdefault(context.chunks, len(numbers))
        keys = _precompute(engine, store, context, encoding)
        if any(made.reuses == "variant" for made in modes.values()):
            keys += _variants(engine, store, context)
        for question in context.questions:
            outcomes = asking.outcomes(number, context.chunks, question)
            yield AskedQuestion(engine.fingerprint.digest.hex(), outcomes)
        for key in keys:
            store.delete(key)


@dataclass(frozen=True, slots=True)
class _Reply:
    """An answer, the part of its text that is scored, and the logits that it was chosen from."""

    answer: Answer
    text: str
    first: Tensor  # (vocabulary,), of the first token
    forced: Tensor | None  # (tokens, vocabulary), of the tokens of full prefill's answer


@dataclass(slots=True)
class _Asking:
    engine: Engine
    store: ChunkStore
    encoding: EncodingContext
    modes: dict[str, Blender]
    max_tokens: int
    instruction: str
    length: AnswerLength
    _asked: int = field(default=0, init=False)

    def outcomes(
        self, context: int, chunks: Sequence[str], question: Question
    ) -> dict[str, QuestionOutcome]:
        """The outcome of every mode, by label. Full prefill comes first, because the others are
        compared with its answer; the others come in an order that rotates."""
        template, instruction = self.engine.template, self.instruction
        prompt = template.prompt(chunks, question.text, instruction)
        alone = template.prompt((), question.text, instruction)
        full = next((label for label, made in self.modes.items() if made.name == "full"), None)
        replies: dict[str, _Reply] = {}
        reference, forced = None, None
        if full is not None:
            reference = replies[full] = self._reply(prompt, self.modes[full], ())
            forced = reference.answer.tokens
        for label in _rotated([label for label in self.modes if label != full], self._asked):
            mode = self.modes[label]
            asked = alone if isinstance(mode, NoContext) else prompt
            replies[label] = self._reply(asked, mode, forced)
        self._asked += 1
        return {
            label: self._outcome(context, question, replies[label], reference)
            for label in self.modes
        }

    def _reply(self, prompt: Prompt, mode: Blender, forced: tuple[int, ...] | None) -> _Reply:
        generator = LocalGenerator(self.engine, self.store, self.encoding, store_misses=False)
        short = self.length == "short"
        request = PromptRequest(
            prompt,
            mode,
            Sampling(max_tokens=self.max_tokens),
            until=_has_first_line if short else None,
            forced=forced,
        )
        stream = generator.stream(request)
        answer = stream.answer
        text = first_line(answer.text) if short else answer.text
        logits = None if forced is None else stream.forced_logits
        return _Reply(answer, text, stream.first_logits, logits)

    def _outcome(
        self, context: int, question: Question, given: _Reply, full: _Reply | None
    ) -> QuestionOutcome:
        """Score an answer, and compare it with that of full prefill."""
        text, report = given.text, given.answer.report
        answer_kl = answer_top1 = None
        if full is not None and full.forced is not None and given.forced is not None:
            answer_kl, answer_top1 = answer_agreement(full.forced, given.forced)
        return QuestionOutcome(
            context=context,
            kind=question.kind,
            exact=exact_match(text, question.answers),
            f1=f1(text, question.answers),
            rouge_l=rouge_l(text, question.answers) if self.length == "long" else None,
            kl=None if full is None else first_token_kl(full.first, given.first),
            agrees=None if full is None else bool(full.first.argmax() == given.first.argmax()),
            answer_kl=answer_kl,
            answer_top1=answer_top1,
            same=None if full is None else exact_match(text, [full.text]),
            ttft_s=report.ttft_s,
            speedup=None if full is None else full.answer.report.ttft_s / report.ttft_s,
            recomputed=report.recomputed_share if report.chunk_tokens else 0.0,
            charged=report.charged_share,
            bytes_loaded=report.bytes_loaded,
            same_start=None if full is None else _start(given.answer) == _start(full.answer),
            margin=first_token_margin(given.first),
        )


def _start(answer: Answer) -> Tokens:
    return answer.tokens[:START_TOKENS]


def _has_first_line(text: str) -> bool:
    """Whether the first line that is not blank is complete."""
    return "\n" in text.lstrip()


def _precompute(
    engine: Engine,
    store: ChunkStore,
    context: EvalContext,
    encoding: EncodingContext,
) -> list[ChunkKey]:
    """Store the KV of the prefix and of the context's chunks; returns their keys."""
    template = engine.template
    tokens = [template.chunk(chunk) for chunk in context.chunks]
    keys = [encoding.key(engine.fingerprint, ids) for ids in tokens]
    keys.append(ChunkKey(engine.fingerprint, template.prefix))
    precompute(engine, store, keys)
    return keys


def _variants(engine: Engine, store: ChunkStore, context: EvalContext) -> list[ChunkKey]:
    """Store a variant of each chunk; returns their keys."""
    chunks, count = context.chunks, len(context.chunks)
    keys = []
    for number, chunk in enumerate(chunks):
        others = dict.fromkeys((number + step) % count for step in _PRECEDING)
        before = [chunks[other] for other in others if other not in (number, number - 1)]
        prompt = engine.template.prompt([*before, chunk], context.questions[0].text)
        keys += store_variants(engine, store, prompt, [len(before)])
    return keys


def _rotated(labels: list[str], by: int) -> Iterator[str]:
    if labels:
        by %= len(labels)
        yield from labels[by:] + labels[:by]
