"""Write a data set of questions about the articles that ship with the package, over the chunks that
``ragcache demo`` retrieves for them, in their order: ``python -m bench.articles --out SETS``.

Chunks are paragraphs of an article that belong together. Most name their subject by a pronoun; so a
fact and its subject are often in two chunks, as in documents that a splitter has cut. The questions
and answers were written before anything was measured on them. Needs the extra ``demo``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from ragcache.eval.articles import ARTICLE_QUESTIONS, ARTICLES, TOP_K
from ragcache.models import SMOLLM2
from ragcache.rag import RagCache
from ragcache.retriever.source import read
from ragcache.settings import Settings

#: Besides those of the demo. Right answers of each.
QUESTIONS = {
    "How long did it take to build the Forth Bridge?": ("seven years",),
    "In which year did Alfred Wegener become a professor in Graz?": ("1924",),
    "What did John Harrison build?": ("clocks", "a sea clock"),
    "What is Surtsey named after?": ("Surtr", "the giant of fire", "Surtr, the giant of fire"),
    "What was the Great Eastern used for?": ("laying cables", "to lay cables"),
    "When did Krakatoa erupt?": ("1883", "27 August 1883"),
    "When was the Brooklyn Bridge opened?": ("24 May 1883", "1883"),
    "When was the Suez Canal opened?": ("17 November 1869", "1869"),
    "Where is the Rosetta Stone kept?": ("the British Museum",),
    "Where was Ada Lovelace buried?": ("Hucknall", "Hucknall in Nottinghamshire"),
    "Which elements did Marie Curie discover?": ("polonium and radium",),
    "Which tug rescued the men of the Endurance?": ("the Yelcho",),
    "Who designed the Iron Bridge?": ("Thomas Farnolls Pritchard", "Pritchard"),
    "Who discovered penicillin?": ("Alexander Fleming", "Fleming"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of data sets")
    given = parser.parse_args()
    asked = {one.question.text: one.question.answers for one in ARTICLE_QUESTIONS} | QUESTIONS
    with tempfile.TemporaryDirectory(prefix="ragcache-") as folder:
        settings = Settings.load(store=folder, model=SMOLLM2)
        with RagCache.open(folder, settings=settings) as cache:
            cache.add(list(read([ARTICLES])))
            found = {text: cache.retrieve(text, top_k=TOP_K) for text in asked}
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "articles.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for text, answers in asked.items():
            chunks = [passage.chunk.text for passage in found[text]]
            question = {"question": text, "answers": answers}
            file.write(json.dumps({"chunks": chunks, "questions": [question]}) + "\n")
    print(f"wrote {len(asked)} questions to {path}")


if __name__ == "__main__":
    main()
