"""Answer scores, and the KL divergence of a mode's first token from full prefill's."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from ragcache.errors import ConfigError

__all__ = ["exact_match", "first_token_kl"]


def _normalise_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (SQuAD's, as CacheBlend uses it).

    A text of nothing else ("A", "?!") is only lowered, so that it does not equal an empty one.
    """
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split()) or text.strip().lower()


def exact_match(text: str, answers: Iterable[str]) -> bool:
    """Whether ``text`` equals one of the answers, after normalisation."""
    return _normalise_answer(text) in {_normalise_answer(a) for a in answers}


def f1(text: str, answers: Iterable[str]) -> float:
    """The best F1 over words with one of the answers, after normalisation, in [0, 1]."""
    return _best(text, answers, lambda t: _normalise_answer(t).split(), _common)


def rouge_l(text: str, answers: Iterable[str]) -> float:
    """The best Rouge-L F-measure with one of the answers, in [0, 1] (Lin, 2004).

    Words are runs of a-z and 0-9 in lower case; those of more than 3 letters are reduced to their
    Porter stem, as Google's ``rouge_score`` does with ``use_stemmer=True``. Raises ConfigError if
    the stemmer is not installed.
    """
    return _best(text, answers, _stems, _longest_common_subsequence)


@cache
def load_stemmer() -> Callable[[str], str]:
    """A function that returns a word's Porter stem. Raises ConfigError if it is not installed."""
    try:
        import snowballstemmer
    except ImportError as error:
        raise ConfigError(
            "Rouge-L, which is for long answers, needs a stemmer that is not installed. "
            "Run `pip install 'ragcache-fusion[rouge]'`."
        ) from error
    stem: Callable[[str], str] = snowballstemmer.stemmer("porter").stemWord
    return stem


def first_line(text: str) -> str:
    """The first line that is not blank, stripped.

    This is what CacheBlend's evaluation scores of an answer, and LongBench's for its few-shot
    tasks: a base model goes on with the next question, and a chat model explains itself.
    """
    return text.strip().partition("\n")[0].strip()


def first_token_kl(full: Tensor, mode: Tensor) -> float:
    """KL(full || mode) in nats of two rows of logits (vocabulary,), in double precision."""
    return float(_kl(full, mode))


def answer_agreement(full: Tensor, mode: Tensor) -> tuple[float, float]:
    """Of logits (tokens, vocabulary): the mean of KL(full || mode) over tokens in nats, and the
    share of tokens at which both have the same most likely one."""
    same = full.argmax(-1) == mode.argmax(-1)
    return float(_kl(full, mode).mean()), float(same.double().mean())


def _kl(full: Tensor, mode: Tensor) -> Tensor:
    """KL(full || mode) over the last dimension, in double precision; rounding is not negative."""
    p, q = (Categorical(logits=logits.cpu().double()) for logits in (full, mode))
    return kl_divergence(p, q).clamp(min=0)


def _best(
    text: str,
    answers: Iterable[str],
    words: Callable[[str], list[str]],
    common: Callable[[list[str], list[str]], int],
) -> float:
    """The best F-measure over the answers; 1 if the text and an answer are empty."""
    got = words(text)
    wanted = (words(answer) for answer in answers)
    return max((_f_measure(common(got, w), len(got) + len(w)) for w in wanted), default=0.0)


def _f_measure(common: int, words: int) -> float:
    """``2 common / words``: the F-measure, with ``words`` counted on both sides."""
    return 2 * common / words if words else 1.0


def _common(got: list[str], want: list[str]) -> int:
    return sum((Counter(got) & Counter(want)).values())


def _stems(text: str) -> list[str]:
    stem = load_stemmer()
    return [stem(w) if len(w) > 3 else w for w in re.findall("[a-z0-9]+", text.lower())]


def _longest_common_subsequence(got: Sequence[str], want: Sequence[str]) -> int:
    """Its length, by dynamic programming with one row."""
    row = [0] * (len(want) + 1)
    for word in got:
        diagonal = 0
        for j, other in enumerate(want, 1):
            longer = diagonal + 1 if word == other else max(row[j], row[j - 1])
            diagonal, row[j] = row[j], longer
    return row[-1]
