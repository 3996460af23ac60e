"""Articles of an encyclopaedia that ship with the package, and questions about them.

They were written for ragcache and are under its licence. Later paragraphs of an article mostly name
its subject by a pronoun, as real text does, so a splitter separates names from facts.
"""

from __future__ import annotations

from dataclasses import dataclass

from ragcache.eval.dataset import Question
from ragcache.models import ARTICLES

__all__ = ["ARTICLES", "ARTICLE_QUESTIONS", "TOP_K"]

TOP_K = 8  # chunks to retrieve: with their neighbours, prompts of 2,000 to 3,000 tokens


@dataclass(frozen=True, slots=True)
class ArticleQuestion:
    """A question, and the file in :data:`ARTICLES` that answers it."""

    question: Question
    file: str


def _about(file: str, question: str, *answers: str) -> ArticleQuestion:
    return ArticleQuestion(Question(question, answers), file)


#: Questions that full prefill answers right with the model `smollm2`, over prompts of more than
#: 2,000 tokens. They were chosen by its answers alone, whatever other modes answer.
ARTICLE_QUESTIONS = (
    _about("vasa.md", "On which day did the Vasa sink?", "10 August 1628"),
    _about("krakatoa.md", "Where is Krakatoa?", "Sunda Strait"),
    _about(
        "wright-brothers.md", "How long did the first flight of Orville Wright last?", "12 seconds"
    ),
    _about("lake-baikal.md", "How deep is Lake Baikal?", "1,642"),
    _about("lise-meitner.md", "Where did Lise Meitner die?", "Cambridge"),
)
