"""Answers that follow a JSON schema, whatever the model would say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jsonschema_rs
import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from ragcache.engine.base import ChunkEngine
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.engine.json_format import JsonFormats, response_schema
from ragcache.errors import ConfigError
from ragcache.types import Sampling
from tests import models

IDS = tuple(range(3, 23))
SCHEMAS: list[dict[str, Any]] = [
    {"enum": ["Oslo", "Bergen", "Å", 7, None]},
    {"type": "boolean"},
    {"type": "integer", "minimum": -20, "maximum": 20},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "port": {"$ref": "#/$defs/port"},
        },
        "required": ["name", "port"],
        "additionalProperties": False,
        "$defs": {"port": {"anyOf": [{"type": "null"}, {"const": "yes"}]}},
    },
]


DEEP: dict[str, Any] = {"type": "integer"}
for _ in range(150):
    DEEP = {"type": "array", "items": DEEP, "minItems": 1}


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return models.engine("llama")


def answer(engine: TransformersEngine, **options: Any) -> tuple[str, str]:
    sampling = Sampling(**{"max_tokens": 64, **options})
    steps = list(engine.decode(engine.prefill(IDS, room=sampling.max_tokens), sampling))
    return "".join(step.text for step in steps), steps[-1].stopped


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_answer_is_valid(engine: TransformersEngine, schema: dict[str, Any]) -> None:
    valid, ended = jsonschema_rs.validator_for(schema), 0
    greedy = answer(engine, json_schema=schema)
    assert answer(engine, json_schema=json.dumps(schema)) == greedy
    for text, stopped in [
        greedy,
        *(answer(engine, json_schema=schema, temperature=5, seed=seed) for seed in range(6)),
    ]:
        ended += stopped == "eos"
        if stopped == "eos":
            assert valid.is_valid(json.loads(text)), text
    assert ended >= 4
    plain, _ = answer(engine)
    assert plain != greedy[0]


def test_what_is_allowed_is_what_the_grammar_takes(engine: TransformersEngine) -> None:
    """Against asking for every token alone."""
    formats = JsonFormats(engine.tokenizer, {2})
    constraint = formats.constraint(json.dumps(SCHEMAS[-1]))
    size = engine.model.get_input_embeddings().num_embeddings
    logits = torch.arange(size, dtype=torch.float32)
    for _ in range(12):
        allowed = constraint.allowed(logits)
        known = len(engine.tokenizer)  # the model has rows for more
        taken = [
            token < known and constraint._matcher.validate_tokens([token]) == 1
            for token in range(size)
        ]
        assert (allowed > float("-inf")).tolist() == taken and any(taken)
        assert torch.equal(allowed[torch.tensor(taken)], logits[torch.tensor(taken)])
        token = int(allowed.argmax())
        constraint.accept(token)
        if token == 2:
            break
    assert logits[0] == 0  # what was given is not changed


@pytest.mark.parametrize("multiple", [5, 0.01, 2500, 0.25])
def test_usual_multiples_are_taken(engine: TransformersEngine, multiple: float) -> None:
    schema = {"type": "number", "multipleOf": multiple, "minimum": 0, "maximum": 10**7}
    text, stopped = answer(engine, json_schema=schema)
    assert stopped == "length" or jsonschema_rs.validator_for(schema).is_valid(json.loads(text))


def test_one_of_is_any_of(engine: TransformersEngine) -> None:
    text, stopped = answer(engine, json_schema={"oneOf": [{"const": "a"}, {"const": "b"}]})
    assert stopped == "eos" and json.loads(text) in ("a", "b")


_BYTES = decoders.Sequence(
    [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
)
SPACED: list[dict[str, Any]] = [
    {"pre_tokenizer": ByteLevel(add_prefix_space=True), "decoder": decoders.ByteLevel()},
    {"pre_tokenizer": Metaspace(prepend_scheme="always"), "decoder": _BYTES},
    {
        "normalizer": normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        ),
        "decoder": _BYTES,
    },
]


@pytest.mark.parametrize("parts", SPACED)
@pytest.mark.parametrize("schema", [*SCHEMAS, {"type": "object", "maxProperties": 1}])
def test_tokenizers_that_put_a_space_before_a_text(
    parts: dict[str, Any], schema: dict[str, Any]
) -> None:
    made = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True))
    for name, part in parts.items():
        setattr(made, name, part)
    alphabet = [chr(code) for code in range(33, 127)] + ["\u2581"]
    if isinstance(parts.get("pre_tokenizer"), ByteLevel):
        alphabet = ByteLevel.alphabet()
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(
        ['{"name": "Oslo is a port"}', " Bergen, Oslo and the port"] * 3,
        BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=special),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    end = tokenizer.eos_token_id
    constraint = JsonFormats(tokenizer, {end}).constraint(json.dumps(schema))
    generator, tokens = torch.Generator().manual_seed(7), list[int]()
    while len(tokens) < 300:
        logits = torch.randn(len(tokenizer), generator=generator)
        logits[end] += 9  # as soon as it may
        token = int(constraint.allowed(logits).argmax())
        constraint.accept(token)
        if token == end:
            break
        tokens.append(token)
    assert jsonschema_rs.validator_for(schema).is_valid(json.loads(str(tokenizer.decode(tokens))))


def test_a_tokenizer_that_the_library_does_not_read() -> None:
    made = Tokenizer(BPE({"<unk>": 0, "</s>": 1}, [], unk_token="<unk>"))
    made.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    with pytest.raises(ConfigError, match="does not read its tokenizer .*choose another model"):
        JsonFormats(tokenizer, {1}).constraint("{}")


def test_the_packaged_model_follows_schemas(tiny_model_dir: Path) -> None:
    tiny = TransformersEngine.load(tiny_model_dir, device="cpu")
    for schema in SCHEMAS:
        text, stopped = answer(tiny, json_schema=schema)
        assert stopped == "eos" and jsonschema_rs.validator_for(schema).is_valid(json.loads(text))


def test_the_limit_of_tokens_ends_it_early(engine: TransformersEngine) -> None:
    whole, _ = answer(engine, json_schema=SCHEMAS[-1])
    text, stopped = answer(engine, json_schema=SCHEMAS[-1], max_tokens=3)
    assert stopped == "length" and whole.startswith(text)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "nothing"}, "Invalid type"),
        ({"properties": [1]}, "properties must be an object"),
        ({"$ref": "http://localhost/schema"}, "does not fetch resources"),
        ({"type": "string", "pattern": "("}, "follow this JSON schema"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable"),
        ({"type": "integer", "multipleOf": 99991}, "multipleOf is 99991: it takes up to four"),
        ({"type": "integer", "multipleOf": 1e6}, "multipleOf is 1000000.0"),
        ({"allOf": [{"pattern": f"{letter}.*"} for letter in "abcd"]}, "allOf and 4 patterns"),
        ({"enum": ["x" * 70_000]}, "it has 70,014 characters, more than 65,536"),
        ({"const": 10**400}, "number out of range"),
        (DEEP, "recursion limit exceeded"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    engine: TransformersEngine, schema: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=f"{said}.*Correct or simplify the schema"):
        engine.check_sampling(Sampling(json_schema=schema))


def test_what_is_no_schema_is_refused() -> None:
    for given in ("{", "[]", "null", {"type": object()}, "1"):
        with pytest.raises(ValueError, match="json_schema is no JSON schema: .* Give an object"):
            Sampling(json_schema=cast(Any, given))
    assert Sampling(json_schema={"b": 1, "a": 2}).schema_text == '{"b": 1, "a": 2}'
    assert hash(Sampling(json_schema={"a": 1})) == hash(Sampling(json_schema='{"a":1}'))


def test_response_formats_are_openais() -> None:
    schema = {"type": "array"}
    named = {"name": "list", "strict": True, "schema": schema}
    assert response_schema({"type": "json_schema", "json_schema": named}) == schema
    assert response_schema({"type": "json_object"}) == {"type": "object"}
    assert response_schema({"type": "text"}) is response_schema(None) is None
    for wrong in ({}, {"type": "xml"}, {"type": "json_schema"}, {"json_schema": {"schema": 1}}):
        with pytest.raises(ConfigError, match="response_format is one of"):
            response_schema(wrong)


def test_without_the_library_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, engine: TransformersEngine
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"pip install 'ragcache-fusion\[json\]'"):
        JsonFormats(engine.tokenizer, {2}).constraint("{}")


def test_an_engine_that_cannot_says_so() -> None:
    other = cast(ChunkEngine, SimpleNamespace(name="served"))
    ChunkEngine.check_sampling(other, Sampling())
    with pytest.raises(ConfigError, match="served does not constrain answers"):
        ChunkEngine.check_sampling(other, Sampling(json_schema={}))
