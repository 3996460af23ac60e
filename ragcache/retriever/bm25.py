"""Search by words: BM25 over the texts of chunks, by the library bm25s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ragcache.errors import ConfigError

if TYPE_CHECKING:
    from ragcache.retriever.index import Ids

#: Han, Hiragana and Katakana are written without spaces: each of their letters is a word.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = rf"(?u)[{_CJK}]|[^\W{_CJK}]+"


class BM25Index:
    """The texts of rows, ranked for a question by BM25 (Lucene's variant, k1 = 1.5, b = 0.75).

    Words are what Unicode counts as letters and digits, without regard to case; there are no stop
    words and no stemming, so that all languages are treated alike. A text that shares no word with
    the question is not found. Raises ConfigError if bm25s is not installed.
    """

    def __init__(self, rows: Sequence[int], texts: Sequence[str]) -> None:
        check_installed()
        import bm25s

        found = _words(texts, ids=True)
        with_words = [at for at, words in enumerate(found.ids) if words]
        self._rows: Ids = np.array([rows[at] for at in with_words], np.int64)
        self._scores = bm25s.BM25()
        if with_words:
            known = found._replace(ids=[found.ids[at] for at in with_words])
            self._scores.index(known, show_progress=False)

    def __len__(self) -> int:
        return len(self._rows)

    def search(self, question: str, k: int, among: Ids | None = None) -> list[int]:
        """At most k rows, the best first; of ties the smaller row first. ``among``: only these."""
        words = dict.fromkeys(_words([question], ids=False)[0])
        if not len(self) or not words:
            return []
        scores: NDArray[np.float32] = self._scores.get_scores([*words])
        found = scores > 0
        if among is not None:
            found &= np.isin(self._rows, among)
        scores, rows = scores[found], self._rows[found]
        best: list[int] = rows[np.lexsort((rows, -scores))[:k]].tolist()
        return best


def check_installed() -> None:
    """Raise ConfigError if bm25s is not installed."""
    try:
        import bm25s  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            "searching by words needs bm25s: pip install 'ragcache-fusion[hybrid]', or use "
            "retrieval dense"
        ) from error


def _words(texts: Sequence[str], *, ids: bool) -> Any:
    """The words of texts, as bm25s takes them: as ids with a vocabulary, or as they are."""
    import bm25s

    return bm25s.tokenize(
        list(texts), token_pattern=_WORD, stopwords=None, return_ids=ids, show_progress=False
    )
