"""Sampling, stop strings and incomplete characters."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from ragcache.engine.decode import IncrementalDetokenizer, StopStrings, pieces
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.types import Sampling
from tests import models

IDS = tuple(range(3, 23))


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return models.engine("llama")


def generate(engine: TransformersEngine, **options: object) -> tuple[str, list[int], str]:
    sampling = Sampling(**options)  # type: ignore[arg-type]
    steps = list(engine.decode(engine.prefill(IDS, room=sampling.max_tokens), sampling))
    return "".join(s.text for s in steps), [s.token for s in steps], steps[-1].stopped


def test_greedy_is_repeatable_and_stops_at_length(engine: TransformersEngine) -> None:
    text, tokens, stopped = generate(engine, max_tokens=7)
    assert len(tokens) == 7 and stopped == "length"
    assert generate(engine, max_tokens=7) == (text, tokens, stopped)


def test_seed_repeats_a_sample_and_another_seed_does_not(engine: TransformersEngine) -> None:
    hot = {"max_tokens": 12, "temperature": 1.5}
    assert generate(engine, **hot, seed=1) == generate(engine, **hot, seed=1)
    assert generate(engine, **hot, seed=1)[1] != generate(engine, **hot, seed=2)[1]


def test_a_tiny_nucleus_is_greedy(engine: TransformersEngine) -> None:
    sampled = generate(engine, max_tokens=8, temperature=1.0, top_p=1e-6, seed=3)
    assert sampled == generate(engine, max_tokens=8)


def test_stop_string_ends_the_text_before_itself(engine: TransformersEngine) -> None:
    text, tokens, _ = generate(engine, max_tokens=10)
    stop = text[3:6]
    stopped_text, stopped_tokens, stopped = generate(engine, max_tokens=10, stop=[stop])
    assert stopped == "stop" and stop not in stopped_text
    assert stopped_text == text[: text.find(stop)]
    assert len(stopped_tokens) < len(tokens)


def test_eos_ends_without_text(engine: TransformersEngine) -> None:
    _, tokens, _ = generate(engine, max_tokens=3)
    engine.model.generation_config.eos_token_id = [2, tokens[1]]
    try:
        text, short, stopped = generate(engine, max_tokens=3)
    finally:
        engine.model.generation_config.eos_token_id = 2
    assert (short, stopped) == (tokens[:2], "eos")
    whole = engine.tokenizer.decode(tokens[:1])
    assert text == whole.rstrip("\N{REPLACEMENT CHARACTER}")  # an open character is left out


BYTES = {0xC7: "\u01e2 begins", 0xA2: "and ends", 0xBD: "and is none with this behind it"}


@pytest.fixture(scope="module")
def with_bytes() -> Any:
    """A tokenizer with a token for every byte, as those of Llama 2 and Gemma have them."""
    words = {"<unk>": 0, "\u2581sea": 1, "sea": 2}
    vocab = words | {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    bpe = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")


def test_bytes_that_undo_a_character_lose_nothing_that_comes_behind(with_bytes: Any) -> None:
    tokens = [3 + byte for byte in BYTES] + [1, 2]
    speller = IncrementalDetokenizer(with_bytes, (), Sampling(max_tokens=9))
    assert [speller.push(token).text for token in tokens] == ["", "\u01e2", "", "\ufffd sea", "sea"]
    assert pieces(with_bytes, tuple(tokens)) == ["", "\u01e2", "", "\ufffd sea", "sea"]


def test_any_sequence_of_bytes_is_spelled_to_its_end(with_bytes: Any) -> None:
    random = Random(5)
    for _ in range(300):
        tokens = [*(3 + random.randrange(0x80, 0x100) for _ in range(random.randrange(9))), 1, 2]
        assert "".join(pieces(with_bytes, tuple(tokens))).endswith(" seasea")


def test_stop_strings_hold_back_what_may_become_one() -> None:
    stops = StopStrings(("END", "\n\n"))
    assert stops.push("the E") == ("the ", False)
    assert stops.push("N") == ("", False)
    assert stops.push("d") == ("ENd", False)
    assert stops.push("\n") == ("", False)
    assert stops.flush() == "\n"
    assert stops.push("a\n\nb END") == ("a", True)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"stop": "END"},
        {"stop": ["a", ""]},
    ],
)
def test_sampling_that_cannot_be(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", "plain words", "héllo 日本 🎉!", "<eos> ends", "ends in 🎉", "a \ufffd kept"]
)
def test_pieces_are_whole_characters_and_make_the_text(
    engine: TransformersEngine, text: str
) -> None:
    tokens = engine.tokenize(text, control=True)
    pieces = engine.pieces(tokens)
    assert "".join(pieces) == text and len(pieces) == len(tokens)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_is_cut_off_has_a_piece(engine: TransformersEngine) -> None:
    assert engine.pieces(engine.tokenize("a🎉")[:3]) == ["a", "", "\ufffd"]
