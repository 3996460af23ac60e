"""The articles of the demo, and the questions about them."""

from __future__ import annotations

import re

from ragcache.eval.articles import ARTICLE_QUESTIONS, ARTICLES


def test_the_articles_and_their_questions() -> None:
    files = sorted(ARTICLES.iterdir())
    texts = {file.name: file.read_text(encoding="utf-8") for file in files}
    assert 15 <= len(files) <= 25 and sum(map(len, texts.values())) < 150_000
    for text in texts.values():
        assert re.match(r"# .+\n\n", text) and 250 <= len(text.split()) <= 600
    assert 4 <= len(ARTICLE_QUESTIONS) <= 6
    for one in ARTICLE_QUESTIONS:
        assert any(answer in texts[one.file] for answer in one.question.answers)
