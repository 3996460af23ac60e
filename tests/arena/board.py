"""A stand-in of the board's package: the names, signatures and order of calls of version 0.1.0.

Written from what that package does. Scores and the texts of prompts are simpler than the board's.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ragcache.eval.metrics import f1

_METHODS: dict[str, type[BaseRepairMethod]] = {}
EXAM = {
    "track": "re",
    "subset": "world",
    "system_prompt": "Use the notes to answer the question.",
    "pre_ctx": "\n\n",
    "mid_q": "Question: ",
    "tail": "",
    "max_new_tokens": 4,
}


@dataclass
class AnswerResult:
    text: str
    recomputed_layer_tokens: int = 0
    dense_payload_layer_tokens: int = 0
    kv_bytes: int = 0
    ttft_ms: float | None = None
    aux: dict[str, Any] = field(default_factory=dict)


class BaseRepairMethod(ABC):
    name = "base"
    track: frozenset[str] = frozenset({"re"})
    mechanism_class = 0
    provenance = "port"

    @abstractmethod
    def setup(self, model_id: str, config: dict[str, Any]) -> None: ...

    @abstractmethod
    def build_cache(self, source_text: str) -> object: ...

    @abstractmethod
    def answer(self, question: str, caches: list[Any], config: dict[str, Any]) -> AnswerResult: ...

    def teardown(self) -> None:
        return None


@dataclass
class ShareResult:
    output: str
    reuse_rate: float = 0.0
    ttft_ms: float | None = None
    prefill_ms: float | None = None
    prefill_flops: float | None = None
    transfer_ms: float | None = None
    peak_mem_mb: float | None = None
    input_tokens: int = 0
    gen_tokens: int = 0
    aux: dict[str, Any] = field(default_factory=dict)


class BaseSharingMethod(ABC):
    name = "base"
    track = "?"
    role = "method"

    @abstractmethod
    def prepare(self, producer_model: str, consumer_model: str, config: dict[str, Any]) -> None: ...

    @abstractmethod
    def run(self, sample: dict[str, Any]) -> ShareResult: ...


def register(name: str) -> Callable[[type[BaseRepairMethod]], type[BaseRepairMethod]]:
    def known(method: type[BaseRepairMethod]) -> type[BaseRepairMethod]:
        if _METHODS.setdefault(name, method) is not method:
            raise ValueError(f"{name} is taken")
        method.name = name
        return method

    return known


def pgr(method: float, floor: float, full: float) -> float | None:
    return round((method - floor) / (full - floor), 4) if full - floor > 1e-3 else None


def run(
    method_name: str,
    model_id: str,
    track: str,
    subset: str,
    n: int = 100,
    data_dir: str | None = None,
    out: str | None = None,
    method_cfg: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Sources are cached before the question is shown, in the order of the question set."""
    lines = Path(data_dir or "", f"{subset}_n100.jsonl").read_text(encoding="utf-8").splitlines()
    samples, config = [json.loads(line) for line in lines[:n]], {"exam": EXAM, **(method_cfg or {})}
    method = _METHODS[method_name]()
    assert track in method.track
    method.setup(model_id, config)
    rows = []
    for sample in samples:
        caches = [method.build_cache(chunk) for chunk in sample["chunks"]]
        result = asdict(method.answer(sample["input"], caches, config))
        text = result.pop("text")
        scored = {"pred": text, "golds": sample["answers"], "f1_raw": f1(text, sample["answers"])}
        rows.append({"_id": sample["_id"], **scored, **result})
    method.teardown()
    summary = {"method": method_name, "model": model_id, "subset": subset, "n": len(rows)}
    card = {"name": method.name, "provenance": method.provenance, "class": method.mechanism_class}
    document = {"schema": "kva.result.v1", "summary": summary, "results": rows, "method_card": card}
    json.dumps(document)
    return document
