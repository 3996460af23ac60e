"""Decisions that need no vLLM: manifests, salts, slots, plans, refusals, replies."""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ragcache.errors import ConfigError, PromptError, StoreError
from ragcache.types import Prompt
from ragcache.vllm.handoff import WorkerReplies, new_ticket
from ragcache.vllm.manifest import FIELD, Manifest
from ragcache.vllm.planner import PlannedRequest, Planner, merge_failures
from ragcache.vllm.salt import cache_salt, check_salt, tenant_salt
from ragcache.vllm.slots import blocks_before, contiguous_runs, slot_mapping
from ragcache.vllm.support import VERSIONS, VllmSetup, check_vllm

MODEL = bytes(range(32))
PROMPT = Prompt.of((1, 5), ((10, 11, 12), (20, 21)), (30, 31, 32))
MANIFEST = Manifest.fuse(PROMPT, "fused:recompute_ratio=0.3", MODEL, tenant="acme")


def asked(manifest: Manifest | None = MANIFEST, **changes: Any) -> PlannedRequest:
    params = None if manifest is None else manifest.params()
    name = None if manifest is None else cache_salt(manifest)
    return replace(PlannedRequest("r", params, PROMPT.tokens, name), **changes)


def test_a_manifest_survives_json() -> None:
    given = replace(MANIFEST, behind=(1,), compiled="bos", ticket=new_ticket())
    assert Manifest.read(json.loads(json.dumps(given.params()))) == given
    assert Manifest.read(None) is None
    assert Manifest.read({"other": 1}) is None


def test_a_manifest_gives_the_prompt_back() -> None:
    assert MANIFEST.prompt(list(PROMPT.tokens)) == PROMPT
    with pytest.raises(PromptError, match="11 tokens, but its manifest is for 10"):
        MANIFEST.prompt((*PROMPT.tokens, 9))
    with pytest.raises(PromptError, match="not those"):
        MANIFEST.prompt((2, *PROMPT.tokens[1:]))


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"task": "drop"},
        {"model": "xyz"},
        {"tokens": "../" + "0" * 61},
        {"parts": [-2, 3, 2, 3]},
        {"parts": [True, 3, 2, 3]},
        {"parts": "2323"},
        {"chunks": 3},
        {"chunks": "33"},
        {"chunks": [1.5]},
        {"tenant": "../other"},
        {"ticket": "../../etc/passwd"},
        {"behind": [-1]},
        {"more": 1},
    ],
    ids=str,
)
def test_a_manifest_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    params = MANIFEST.params()[FIELD] | change
    with pytest.raises(PromptError, match="manifest"):
        Manifest.read({FIELD: params})


def test_a_manifest_must_be_an_object() -> None:
    with pytest.raises(PromptError, match="must be an object"):
        Manifest.read({FIELD: "yes"})


def test_every_part_of_the_recipe_is_in_the_salt() -> None:
    others: dict[str, Any] = {
        "task": "keep",
        "model": "0" * 64,
        "tokens": "0" * 64,
        "parts": (3, 2, 2, 3),
        "chunks": (1, 3),
        "tails": ((), (4,)),
        "mode": "reuse",
        "compiled": "bos",
        "behind": (1,),
        "most": 9,
        "tenant": "other",
    }
    assert others.keys() == {f.name for f in fields(Manifest)} - {"ticket"}
    del others["task"]
    salts = {cache_salt(replace(MANIFEST, **{name: value})) for name, value in others.items()}
    assert len(salts | {cache_salt(MANIFEST)}) == len(others) + 1


def test_a_ticket_is_in_the_salt_only_where_kv_is_handed_back() -> None:
    assert cache_salt(replace(MANIFEST, ticket=new_ticket())) == cache_salt(MANIFEST)
    first, second = (Manifest.keep((5, 6), (1,), MODEL, new_ticket()) for _ in range(2))
    assert cache_salt(first) != cache_salt(second)


def test_another_salt_is_refused() -> None:
    check_salt(MANIFEST, cache_salt(MANIFEST))
    for wrong in (None, "", "mine", cache_salt(replace(MANIFEST, tenant="other"))):
        with pytest.raises(PromptError, match="cache_salt"):
            check_salt(MANIFEST, wrong)


def test_tenants_have_salts_of_their_own() -> None:
    assert tenant_salt("") is None
    assert len({tenant_salt("a"), tenant_salt("b"), tenant_salt("")}) == 3


def test_slots_follow_the_block_table() -> None:
    blocks = torch.tensor([7, 3, 9])
    rows = torch.arange(10)
    want = [int(blocks[r // 4]) * 4 + r % 4 for r in range(10)]
    assert slot_mapping(rows, blocks, 4).tolist() == want
    with pytest.raises(ValueError, match="beyond 3 blocks"):
        slot_mapping(torch.tensor([12]), blocks, 4)


@pytest.mark.parametrize("rows", [[0], [5], [0, 1, 2], [0, 2, 3, 7, 8, 9], [1, 3, 5]], ids=str)
def test_runs_are_the_contiguous_ones(rows: list[int]) -> None:
    made = contiguous_runs(torch.tensor(rows))
    parts = [rows[a:b] for a, b in zip(made.starts[:-1], made.starts[1:], strict=True)]
    assert sum(parts, []) == rows
    assert all(part == list(range(part[0], part[0] + len(part))) for part in parts)
    assert all(a[-1] + 1 < b[0] for a, b in zip(parts, parts[1:], strict=False))
    assert made.lengths.tolist() == [part[-1] + 1 for part in parts]
    assert (len(made), made.longest) == (len(parts), max(map(len, parts)))


def test_touched_blocks() -> None:
    assert blocks_before(9, [4, 5, 6, 7], 4) == [4, 5, 6]
    assert blocks_before(8, [4, 5, 6, 7], 4) == [4, 5]


def planner() -> Planner:
    return Planner(MODEL.hex())


def test_all_but_the_last_token_is_loaded() -> None:
    plan = planner()
    assert plan.match(asked(), 0) == len(PROMPT) - 1
    plan.allocate("r", [4, 5], len(PROMPT) - 1)
    [job] = plan.take_jobs()
    assert (job.tokens, job.first, job.stop) == (PROMPT.tokens, 0, len(PROMPT) - 1)
    assert (job.blocks, job.manifest) == ((4, 5), MANIFEST)
    assert plan.take_jobs() == []
    assert plan.finish("r") is None


def test_cached_blocks_of_the_same_recipe_are_counted() -> None:
    plan = planner()
    assert plan.match(asked(), 4) == len(PROMPT) - 5
    assert plan.match(asked(), PROMPT.question_start - 1) == 3
    for computed in range(PROMPT.question_start, len(PROMPT)):
        assert plan.match(asked(), computed) == 0
    plan.allocate("r", [4, 5], 0)
    assert plan.take_jobs() == []


def test_what_vllm_does_not_take_is_not_done() -> None:
    plan = planner()
    plan.match(asked(), 0)
    plan.allocate("r", [4], 0)
    assert plan.take_jobs() == []


def test_a_request_that_ends_early_takes_its_job_along() -> None:
    plan = planner()
    plan.match(asked(), 0)
    plan.allocate("r", [4], len(PROMPT) - 1)
    plan.finish("r")
    assert plan.take_jobs() == []


def test_a_job_that_failed_is_not_planned_again() -> None:
    plan = planner()
    assert plan.match(asked(), 0)
    plan.mark_failed({"r": "the disk is gone"})
    assert plan.match(asked(), 0) == 0
    assert plan.finish("r") == "the disk is gone"
    assert plan.match(asked(), 0), "another request may have the same name later"


def test_a_request_without_a_manifest_is_left_alone() -> None:
    plan = planner()
    assert plan.match(asked(None), 0) == 0
    assert plan.finish("r") is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"adapter": "law"}, "LoRA adapter 'law'"),
        ({"multimodal": True}, "images"),
        ({"tokens": None}, "embeddings"),
        ({"salt": None}, "no cache_salt"),
        ({"salt": "mine"}, "another cache_salt"),
        ({"tokens": PROMPT.tokens[:-1]}, "the prompt has 9 tokens"),
        ({"tokens": (*PROMPT.tokens[:-1], 9)}, "not those"),
        ({"params": {FIELD: 5}}, "must be an object"),
    ],
)
def test_what_would_be_wrong_is_refused(change: dict[str, Any], why: str) -> None:
    plan = planner()
    assert plan.match(asked(**change), 0) == 0
    assert why in (plan.finish("r") or "")


def test_another_model_is_refused() -> None:
    plan = Planner("ff" * 32)
    assert plan.match(asked(), 0) == 0
    assert "fingerprint 00010203, but this model's is ffffffff" in (plan.finish("r") or "")


def test_reports_of_several_workers() -> None:
    assert merge_failures([{"a": "1"}, {"a": "2", "b": "3"}]) == {"a": "1", "b": "3"}


def test_a_plain_setup_is_fine() -> None:
    check_vllm(VllmSetup(VERSIONS[0] + ".1"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": "0.19.2"}, "its version is 0.19.2"),
        ({"cache_dtype": "fp8"}, "KV cache is fp8"),
        ({"kv_groups": 2}, "2 groups"),
        ({"mla": True}, "MLA"),
        ({"windows": True}, "sliding window"),
        ({"pipeline": 2}, "stages"),
        ({"context": 2}, "stages"),
        ({"lora": True}, "adapter"),
        ({"multimodal": True}, "images"),
        ({"quantization": "awq"}, "quantized (awq)"),
        ({"speculative": True}, "speculative"),
        ({"load_format": "dummy"}, "load format dummy"),
        ({"elsewhere": ("--tokenizer",)}, "started with --tokenizer, but the fingerprint"),
    ],
    ids=str,
)
def test_a_setup_that_would_be_wrong_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_vllm(replace(VllmSetup(VERSIONS[0] + ".0"), **change))
    assert why in str(error.value)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match="MLA.*adapter"):
        check_vllm(VllmSetup(VERSIONS[0], mla=True, lora=True))


def test_letters_are_taken_once(tmp_path: Path) -> None:
    box, name = WorkerReplies(tmp_path / "mailbox"), new_ticket()
    assert box.take_report(name) is None
    box.write_report(name, {"rows": 3})
    assert (box.folder.stat().st_mode & 0o777, os.listdir(box.folder)) == (0o700, [f"{name}.json"])
    assert (box.folder / f"{name}.json").stat().st_mode & 0o777 == 0o600
    assert box.take_report(name) == {"rows": 3}
    assert box.take_report(name) is None


def test_heads_of_several_workers_come_together(tmp_path: Path) -> None:
    box, name = WorkerReplies(tmp_path / "mailbox"), new_ticket()
    keys, values = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    for rank in range(2):
        heads = slice(2 * rank, 2 * rank + 2)
        box.write_kv(name, rank, 2, keys[:, heads], values[:, heads])
    got = box.take_kv(name)
    assert torch.equal(got[0], keys) and torch.equal(got[1], values)
    with pytest.raises(StoreError, match="worker 0 of vLLM has returned no KV"):
        box.take_kv(name)


def test_old_letters_are_thrown_away(tmp_path: Path) -> None:
    box, old, new = WorkerReplies(tmp_path / "mailbox"), new_ticket(), new_ticket()
    box.delete_expired()
    for name in (old, new):
        box.write_report(name, {})
    os.utime(box.folder / f"{old}.json", (0, 0))
    box.delete_expired()
    assert (box.take_report(old), box.take_report(new)) == (None, {})
