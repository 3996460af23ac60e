"""The made-up world, its tokenizer and a few training steps."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from examples.train_tiny import lexicon
from examples.train_tiny.batch import collate
from examples.train_tiny.evaluate import correct
from examples.train_tiny.export import export, load_exported
from examples.train_tiny.figures import Reader, top
from examples.train_tiny.freeze import prompt_lines
from examples.train_tiny.model import TinyConfig, TinyLlama
from examples.train_tiny.tokenizer import (
    BOS,
    EOS,
    PREFIX,
    answer_text,
    chunk_text,
    question_text,
)
from examples.train_tiny.train import LEVELS, Options, Trainer
from examples.train_tiny.world import Document, Prompt, Shape, Split, World

MODEL = Path(__file__).parent.parent / "ragcache" / "models" / "tiny"
SMALL = TinyConfig(width=32, layers=12, head_size=16, hidden=32)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def prompts(split: Split, count: int = 40, documents: int = 6) -> list[Prompt]:
    world, rng = World(split), random.Random(1)
    return [world.prompt(rng, Shape((documents, documents)), 1000) for _ in range(count)]


def documents(split: Split) -> list[Document]:
    return [document for prompt in prompts(split) for document in prompt.documents]


def test_the_same_seed_writes_the_same_prompts() -> None:
    assert prompts("train", 5) == prompts("train", 5)
    lines, again, other = (list(prompt_lines(seed, 8, 2, {"split": 9})) for seed in (3, 3, 4))
    assert lines == again != other


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_kinds_are_labelled_truthfully(split: Split) -> None:
    for document in documents(split):
        for fact in document.facts:
            chunk, at = fact.spot
            text = document.chunks[chunk]
            assert text.startswith(fact.value, at)
            sentence = text[:at].rpartition(". ")[2]
            if fact.binding == "direct":
                assert document.name in sentence
            elif fact.binding == "local":
                assert document.name in text[:at] and document.name not in sentence
            else:
                assert document.name not in text and document.name in document.chunks[chunk - 1]
            named, end = fact.mention
            assert document.chunks[named][: end + 1].endswith(document.name)


def test_questions_name_their_subject_and_answers_stand_in_the_context() -> None:
    for prompt in prompts("held_out"):
        for question in prompt.questions:
            name = question.text[: question.name_end + 1]
            assert any(name.endswith(document.name) for document in prompt.documents)
            chunk, at = question.last
            assert prompt.chunks[chunk].startswith(question.answer, at)


def test_a_document_has_the_same_relation_once_and_names_are_unique() -> None:
    for prompt in prompts("held_out"):
        assert len({document.name for document in prompt.documents}) == len(prompt.documents)
        for document in prompt.documents:
            relations = [fact.relation.name for fact in document.facts]
            assert len(set(relations)) == len(relations)


def test_training_never_shows_held_out_names_or_forms() -> None:
    held = World("held_out").names
    every = (held.female, held.male, held.surnames, held.heads, held.towns)
    parts = {part for names in every for part in names.held}
    train = prompts("train", 150)
    words = {
        word.strip(".,?").removesuffix("'s")
        for prompt in train
        for text in [*prompt.chunks, *(q.text for q in prompt.questions)]
        for word in text.split()
    }
    assert not words & parts
    seen = "\n".join(question.text for prompt in train for question in prompt.questions)
    for relations in lexicon.RELATIONS.values():
        for relation in relations:
            before, after = relation.questions[-1].split("{N}")
            assert not any(
                line.startswith(before) and line.endswith(after) for line in seen.split("\n")
            )


def test_every_held_out_document_is_new() -> None:
    train = {chunk for document in documents("train") for chunk in document.chunks}
    for document in documents("held_out"):
        assert document.novel
        assert not train & set(document.chunks)


def test_tokens_round_trip_and_line_ends_are_tokens(tokenizer: Tokenizer) -> None:
    for prompt in prompts("held_out", 5):
        for chunk in prompt.chunks:
            ids = tokenizer.encode(chunk_text(chunk), add_special_tokens=False).ids
            assert tokenizer.decode(ids) == " " + chunk_text(chunk)
            assert tokenizer.id_to_token(ids[-1]) == "ĊĊ"
    question = tokenizer.encode(question_text("Where does Mira Holt live?"))
    assert question.tokens[-4:] == ["?", "Ċ", "Answer", ":"]


def test_parts_concatenate_exactly(tokenizer: Tokenizer) -> None:
    prompt = prompts("held_out", 1)[0]
    batch = collate(tokenizer, [prompt])

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    context = [BOS, *ids(PREFIX), *(t for chunk in prompt.chunks for t in ids(chunk_text(chunk)))]
    assert batch.ids[0, : batch.context].tolist() == context
    first = prompt.questions[0]
    asked, answer = ids(question_text(first.text)), [*ids(answer_text(first.answer)), EOS]
    row = batch.ids[0, batch.context :].tolist()
    assert row[: len(asked) + len(answer) - 1] == asked + answer[:-1]
    labels = batch.targets[0, len(asked) - 1 : len(asked) - 1 + len(answer)].tolist()
    assert labels == answer
    for job, pairs in batch.guides.items():
        assert pairs and all(target < source for _, source, target in pairs), job


def test_training_reduces_the_loss_and_stays_finite(tokenizer: Tokenizer, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    trainer = Trainer(Options(tmp_path, tokens=600, warmup=1), tokenizer, SMALL)
    losses = []
    for _ in range(8):
        trainer.train_step()
        losses.append(trainer.loss)
    assert losses[-1] < losses[0]
    assert all(bool(torch.isfinite(weight).all()) for weight in trainer.model.parameters())


def test_a_run_that_was_ended_goes_on_as_if_it_had_not_been(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    options = Options(tmp_path, steps=6, tokens=600, final=0.5)
    ended = Trainer(options, tokenizer, SMALL)
    for step in range(6):
        if step == 2:
            ended.save()
        ended.train_step()
    resumed = Trainer(options, tokenizer, SMALL)
    assert resumed.step == 2
    resumed.run()
    assert (resumed.step, resumed.tokens, resumed.running) == (6, ended.tokens, ended.running)
    for name, tensor in ended.tensors().items():
        torch.testing.assert_close(resumed.tensors()[name], tensor, rtol=0, atol=0)
    with pytest.raises(ValueError, match="other options"):
        Trainer(replace(options, seed=1), tokenizer, SMALL)


def test_the_last_part_of_a_run_has_whole_batches_wherever_the_curriculum_got(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    trainer = Trainer(Options(tmp_path), tokenizer, SMALL)
    trainer.final_step = 0
    sizes = set()
    for trainer.level in (0, len(LEVELS) - 1):
        sizes.add(trainer.batch().ids.shape)
    assert len(sizes) == 1


def test_isolated_batches_drop_what_they_cannot_answer(tokenizer: Tokenizer) -> None:
    level = LEVELS[4]
    prompt = World("train").prompt(random.Random(2), level.shape, 1000)
    kinds = {question.binding for question in prompt.questions}
    answered = correct(TinyLlama(SMALL), collate(tokenizer, [prompt], isolated=True))
    assert "split" in kinds and not answered["split"] and answered["direct"]


@pytest.fixture(scope="module")
def reader(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """A random model, written and read back in the shipped format."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = TinyConfig(width=32, layers=4, hidden=32)
    Trainer(Options(folder), tokenizer, config).save()
    export(folder, folder)
    return Reader(load_exported(folder), tokenizer)


def test_recomputing_every_token_is_full_prefill(reader: Reader) -> None:
    chunks = [reader.ids(chunk_text(chunk)) for chunk in prompts("held_out", 1)[0].chunks[:3]]
    ids = reader.prefix + [token for chunk in chunks for token in chunk]
    full, cache = reader.prefill(ids), reader.isolated(chunks)
    blended = reader.prefill(ids, cache, top(1.0))
    for (k, v), (k_full, v_full) in zip(blended, full, strict=True):
        torch.testing.assert_close(k, k_full)
        torch.testing.assert_close(v, v_full)
    assert float((cache[-1][1] - full[-1][1]).abs().max()) > 1e-3


def test_frozen_prompts_are_what_the_generator_writes() -> None:
    lines = (MODEL / "world" / "prompts.jsonl").read_text().splitlines()
    kinds = [q["kind"] for line in lines for q in json.loads(line)["questions"]]
    assert all(kinds.count(kind) >= 1000 for kind in ("direct", "local", "split"))
