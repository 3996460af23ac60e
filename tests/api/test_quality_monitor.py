"""If answers fall short of full prefill's, more is recomputed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ragcache.api import quality_monitor as module
from ragcache.api.metrics import Metrics
from ragcache.api.quality_monitor import RATIOS, MonitorLevel, QualityMonitor
from ragcache.api.scheduler import Scheduler
from ragcache.api.service import Service
from ragcache.core.request import Request
from ragcache.engine.hf.engine import TransformersEngine
from ragcache.eval.dataset import load_dataset
from ragcache.models import world_file
from ragcache.rag import RagCache
from ragcache.retriever.embed import HashEmbedder
from ragcache.settings import Ratio, Settings
from ragcache.store.disk.store import DiskStore
from ragcache.types import Sampling
from tests import scene
from tests.api.scene import asked, given, small

RIGHT, WRONG = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
QUESTION = "Where does Mira Holt live?"


class Played:
    """A quality monitor of a service with these settings, over made-up answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        settings = Settings.load(**{"mode": "fused"} | options.pop("settings", {}))
        self.guard = QualityMonitor(settings, **options)
        self.below = RIGHT
        monkeypatch.setattr(module, "_first_logits", self._first)

    def _first(self, cache: object, ask: Request) -> Tensor:
        return self.below

    def see(self, *answers: Tensor, ratio: float | None = None) -> str:
        """What the service does after such answers."""
        for answer in answers:
            level = self.guard.level
            used = level.ratio if level.ratio is not None else 0.15
            self.guard._compare(
                None,  # type: ignore[arg-type]
                Request(QUESTION),
                level,
                RIGHT,
                RIGHT if level.mode == "full" else answer,
                used if ratio is None else ratio,
            )
        return self.guard.level.name


def test_the_level_rises_step_by_step_to_full_prefill(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    played = Played(monkeypatch)
    assert played.see(*[WRONG] * 3) == "as set"  # too few to say
    played.below = WRONG
    names = [played.see(WRONG), *(played.see(*[WRONG] * 4) for _ in range(3))]
    assert names == [
        "mode fused at ratio 0.3",
        "mode fused at ratio 0.5",
        "full prefill",
        "full prefill",
    ]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert caplog.messages[0] == (
        "0 of 4 answers had the first token of full prefill, the floor is 0.95: the quality "
        "monitor raises the level from as set to mode fused at ratio 0.3"
    )
    status = played.guard.status()
    assert (status["level"], status["name"]) == (3, "full prefill")
    assert (status["agreement"], status["kl"]) == (1.0, 0.0)
    assert status["sampled"] == 16 and status["window"] == 4


@pytest.mark.parametrize(
    ("mode", "used", "level"),
    [
        ("fused", 0.4, MonitorLevel("mode fused at ratio 0.5", "fused", 0.5)),
        ("cacheblend:check_layer=2", 0.15, None),
        ("reuse", 0.0, MonitorLevel("mode fused at ratio 0.15", "fused", 0.15)),
        ("fused", 0.9, MonitorLevel("full prefill", "full")),
    ],
)
def test_it_rises_above_what_was_used(
    monkeypatch: pytest.MonkeyPatch, mode: str, used: float, level: MonitorLevel | None
) -> None:
    played = Played(monkeypatch, settings={"mode": mode})
    played.see(*[WRONG] * 8, ratio=used)
    assert played.guard.level == (level or MonitorLevel(f"mode {mode} at ratio 0.3", mode, 0.3))


def test_a_few_failures_are_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """97 in 100 agree, the floor is 95: for 5,000 answers nothing happens."""
    played = Played(monkeypatch)
    drawn = torch.rand(5000, generator=torch.Generator().manual_seed(1)) < 0.97
    assert played.see(*(RIGHT if good else WRONG for good in drawn)) == "as set"
    assert 0.94 < played.guard.status()["agreement"] <= 1


def test_it_goes_back_once_the_level_below_is_good_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(monkeypatch)
    played.see(*[WRONG] * 4)
    played.below = WRONG
    assert played.see(*[RIGHT] * 300) == "mode fused at ratio 0.3"  # good itself: no reason
    played.below = RIGHT
    assert played.see(*[RIGHT] * 100) == "mode fused at ratio 0.3"  # too few to be sure
    assert played.see(*[RIGHT] * 300) == "as set"


def test_what_a_client_names_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(monkeypatch)
    played.see(*[WRONG] * 4)
    for named in (Request("q", mode="reuse"), Request("q", ratio=0.2), Request("q", mode="full")):
        assert played.guard.adjust(named) == named and played.guard.note(named) is None
    for plain in (Request("q"), Request("q", ratio="auto", top_k=3)):
        adjusted = played.guard.adjust(plain)
        assert (adjusted.mode, adjusted.ratio, adjusted.top_k) == ("fused", 0.3, plain.top_k)
        assert "the service uses mode fused at ratio 0.3" in (played.guard.note(plain) or "")


def test_only_the_share_is_compared_and_never_what_is_exact(tmp_path: Path) -> None:
    texts = given(*(document.text for document in scene.DOCUMENTS))
    guard = QualityMonitor(Settings.load(mode="fused"), share=0.5, seed=3)
    with small(tmp_path, guard) as service:
        asked(service, QUESTION, chunks=texts)  # nothing is loaded
        asked(service, QUESTION, chunks=texts, mode="reuse")
        assert guard.status()["sampled"] == 0 and guard.status()["agreement"] is None
        for _ in range(30):
            asked(service, QUESTION, chunks=texts)
        assert 5 < guard.status()["sampled"] < 25


def test_answers_from_filtered_documents_are_compared_too(tmp_path: Path) -> None:
    guard = QualityMonitor(Settings.load(mode="fused"), share=1.0)
    with small(tmp_path, guard) as service:
        cache = service.cache("")
        service.scheduler.call(lambda: cache.add(scene.DOCUMENTS)).result()
        for _ in range(3):
            asked(service, QUESTION, filter={"absent": {"$exists": False}})
        assert guard.status()["sampled"] == 3


def test_nothing_of_a_tenant_is_in_the_status(tmp_path: Path) -> None:
    guard = QualityMonitor(Settings.load(mode="fused"), share=1.0)
    with small(tmp_path, guard) as service:
        for _ in range(2):
            asked(service, QUESTION, tenant="secret", chunks=given("A secret text."))
        assert guard.status()["sampled"] == 1
        text = Metrics(service).text().decode()
        for name in ("ragcache_quality_monitor", "ragcache_guard"):
            assert f'{name}{{what="sampled"}} 1.0' in text
        assert "secret" not in text
        assert "secret" not in str(guard.status()).lower()


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> TransformersEngine:
    return TransformersEngine.load(str(tiny_model_dir), device="cpu")


def served(
    path: Path, engine: TransformersEngine, mode: str, ratio: Ratio = "auto", **options: Any
) -> Service:
    settings = Settings.load(store=path, mode=mode, ratio=ratio)
    own = RagCache(engine, DiskStore(path), HashEmbedder(), path, settings)
    guard = QualityMonitor(settings, share=1.0, **options)
    return Service(own, Scheduler(background_delay_s=0.0), guard)


def split_questions() -> Iterator[tuple[Sequence[str], str]]:
    """Those that plain reuse gets wrong, with their chunks."""
    for context in load_dataset(world_file("prompts.jsonl")):
        for question in context.questions:
            if question.kind == "split":
                yield context.chunks, question.text


def ask_all(service: Service, most: int) -> list[str]:
    """Ask so many questions, in order, chunks stored before; the levels they were answered at."""
    assert service.quality_monitor is not None
    levels: list[str] = []
    for number, (chunks, question) in enumerate(split_questions()):
        if number == most:
            break
        keys = [service.default_cache.indexing.key(chunk) for chunk in given(*chunks)]
        if not all(map(service.default_cache.store.has, keys)):
            service.precompute("", given(*chunks)).result(60)
        asked(service, question, chunks=given(*chunks), sampling=Sampling(max_tokens=1))
        levels.append(service.quality_monitor.level.name)
    return levels


def test_plain_reuse_trips_it_and_the_next_level_is_enough(
    tmp_path: Path, engine: TransformersEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with served(tmp_path, engine, "reuse") as service:
        levels = ask_all(service, 20)
        assert service.quality_monitor is not None
        assert levels[-1] == "mode fused at ratio 0.15" and set(levels[:3]) == {"as set"}
        assert service.quality_monitor.status()["agreement"] > 0.9
        assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
        chunks, question = next(split_questions())
        report = asked(service, question, chunks=given(*chunks)).report
        assert (report.mode, report.parameters["recompute_ratio"]) == ("fused", 0.15)
        assert report.fallbacks[-1] == (
            "answers fell short of full prefill's, so the service uses mode fused at ratio 0.15"
        )
        explicit = asked(service, question, chunks=given(*chunks), mode="reuse").report
        assert explicit.mode == "reuse" and not explicit.fallbacks


@pytest.mark.parametrize("questions", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_a_good_mode_never_trips_it(
    tmp_path: Path, engine: TransformersEngine, questions: int
) -> None:
    with served(tmp_path, engine, "fused", 0.15) as service:
        assert set(ask_all(service, questions)) == {"as set"}
        assert (
            service.quality_monitor is not None
            and service.quality_monitor.status()["sampled"] == questions
        )


@pytest.mark.slow
def test_a_mode_that_ratios_do_not_help_ends_at_full_prefill(
    tmp_path: Path, engine: TransformersEngine
) -> None:
    with served(tmp_path, engine, "random") as service:
        levels = ask_all(service, 150)
        rises = [f"mode random at ratio {ratio}" for ratio in RATIOS[1:]]
        assert list(dict.fromkeys(levels)) == ["as set", *rises, "full prefill"]
