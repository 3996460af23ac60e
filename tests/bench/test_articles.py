"""Questions about the shipped articles."""

from __future__ import annotations

from bench.articles import QUESTIONS
from ragcache.eval.articles import ARTICLES


def test_every_question_is_about_an_article_that_answers_it() -> None:
    texts = [file.read_text(encoding="utf-8") for file in ARTICLES.glob("*.md")]
    for question, answers in QUESTIONS.items():
        subject = [word for word in question.rstrip("?").split()[1:] if word[0].isupper()]
        about = [text for text in texts if not subject or all(word in text for word in subject)]
        words = [answer.split()[-1] for answer in answers]
        assert any(word in text for text in about for word in words), question
