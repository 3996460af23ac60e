"""Machines that share a remote, from end to end, and the commands for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("obstore")

from ragcache.cli import app
from ragcache.errors import ConfigError
from ragcache.planning.cost_model import Speeds
from ragcache.rag import RagCache
from ragcache.retriever.embed import HashEmbedder
from ragcache.settings import Settings
from ragcache.store import DiskStore
from ragcache.store.remote.bandwidth import BandwidthMeter, LinkEstimate
from ragcache.store.remote.chunk_objects import ChunkObjects
from ragcache.store.remote.object_store import Bucket
from tests import models, scene

QUESTION = "Where does Mira Holt live?"


def machine(tmp_path: Path, name: str, *, ram_bytes: int = 0, remote_codecs: str = "") -> RagCache:
    """One of those that share the remote in ``tmp_path``."""
    remote = (tmp_path / "remote").as_uri()
    return scene.small(
        tmp_path / name, remote=remote, ram_bytes=ram_bytes, remote_codecs=remote_codecs
    )


class Slow(BandwidthMeter):
    """Of a link that is this slow, whatever is measured."""

    def __init__(self, byte_s: float) -> None:
        super().__init__()
        self.byte_s = byte_s

    @property
    def link(self) -> LinkEstimate:
        return LinkEstimate(0.0, self.byte_s)


def slow(cache: RagCache, byte_s: float) -> None:
    """Let its link be this slow."""
    assert cache.remote is not None
    cache.remote.objects.meter = Slow(byte_s)


def there(tmp_path: Path) -> int:
    """Chunks in the remote."""
    return sum(1 for _ in ChunkObjects(Bucket((tmp_path / "remote").as_uri())).names())


def test_what_one_machine_has_computed_another_does_not(tmp_path: Path) -> None:
    with machine(tmp_path, "one") as one, machine(tmp_path, "two", ram_bytes=1 << 20) as two:
        computed = one.add(scene.DOCUMENTS).precomputed
        want = one.ask(QUESTION, mode="reuse")
        assert one.remote is not None and two.remote is not None
        one.remote.flush()
        found = two.add(scene.DOCUMENTS).precomputed
        assert (found.encoded, found.stored) == (0, computed.encoded)
        for _ in range(2):
            answer = two.ask(QUESTION, mode="reuse")
            assert answer.tokens == want.tokens and not answer.report.fallbacks
            two.remote.flush()
        traffic = two.traffic()
        assert traffic is not None and traffic.kept > 0 and traffic.failed == 0
        assert two.store.stats().chunks == traffic.kept
        one.delete(["holt"])
        one.remote.flush()
        assert there(tmp_path) == one.store.stats().chunks


def test_levels_are_loaded_where_the_link_is_slow(tmp_path: Path) -> None:
    with machine(tmp_path, "one", remote_codecs="int8,fp8") as one:
        one.add(scene.DOCUMENTS)
        assert one.remote is not None
        one.remote.flush()
        want = one.ask(QUESTION, mode="fused:recompute_ratio=0.15")
    with machine(tmp_path, "two", remote_codecs="int8,fp8") as two:
        two.add(scene.DOCUMENTS)
        assert two.remote is not None
        speeds = Speeds(0, 0.001, 0, 0, 0, 0, 0.001, decode_s={"int8": 0.0, "fp8": 1.0})
        two.catalog.put_setting(two.profile.setting, speeds.as_json())
        report = want.report
        rows = report.chunk_tokens + report.question_tokens
        raw = two.engine.spec.chunk_bytes(report.chunk_tokens + report.prefix_tokens)
        slow(two, 0.0015 * rows / raw)  # 1.5 times as long as to compute
        answer = two.ask(QUESTION, mode="fused", ratio="auto")
        plan = answer.report.plan
        assert plan is not None and plan.levels and set(plan.levels.values()) == {1}
        assert any("loaded as int8" in sentence for sentence in plan.sentences)
        assert not answer.report.fallbacks and plan.prefill_s < 0.001 * rows
        assert 0 < answer.report.bytes_loaded < raw / 2
        two.remote.flush()
        kept = {header.codec for header in two.store.headers()}
        assert kept == {"raw", "int8"}  # the prefix, and the chunks
        again = two.ask(QUESTION, mode="fused", ratio="auto").report.plan
        assert again is not None and again.prefill_s <= plan.prefill_s  # levels are here by now


def test_a_level_that_is_damaged_is_planned_around(tmp_path: Path) -> None:
    with machine(tmp_path, "one", remote_codecs="int8") as one:
        one.add(scene.DOCUMENTS)
        assert one.remote is not None
        one.remote.flush()
    for path in (tmp_path / "remote").rglob("*"):
        if path.is_file() and b"int8" in path.read_bytes()[:300]:
            path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with machine(tmp_path, "two", remote_codecs="int8") as two:
        two.add(scene.DOCUMENTS)
        assert two.remote is not None
        speeds = Speeds(0, 1.0, 0, 0, 0, 0, 0.001, decode_s={"int8": 0.0})
        two.catalog.put_setting(two.profile.setting, speeds.as_json())
        slow(two, 1e-3)
        report = two.ask(QUESTION, ratio="auto").report
        assert any("corrupt" in note for note in report.fallbacks)
        assert report.reused_tokens + report.recomputed_tokens > 0
        assert all(chunk.miss is None for chunk in report.chunks)


def test_a_remote_that_is_gone_stops_no_answer(tmp_path: Path) -> None:
    with machine(tmp_path, "one") as one:
        one.add(scene.DOCUMENTS)
        assert one.remote is not None
        one.remote.flush()
    with machine(tmp_path, "two") as two:
        two.add(scene.DOCUMENTS)
        for path in sorted((tmp_path / "remote").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        answer, want = two.ask(QUESTION), two.ask(QUESTION, mode="full")
        assert answer.tokens == want.tokens
        assert all(chunk.miss == "absent" for chunk in answer.report.chunks)


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    engine, embedder = models.engine("llama"), HashEmbedder()
    remote = (tmp_path / "remote").as_uri()
    with DiskStore(tmp_path / "one") as store:
        for given, message in (
            (Settings.load(remote_codecs="int8"), "set remote too"),
            (Settings.load(remote=remote, remote_codecs="int9"), "int9"),
            (Settings.load(remote="nowhere"), "one of s3://"),
        ):
            with pytest.raises(ConfigError, match=message):
                RagCache(engine, store, embedder, tmp_path / "one", given)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store that has never had a remote."""
    with scene.small(tmp_path / "one") as cache:
        cache.add(scene.DOCUMENTS)
    return tmp_path / "one"


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_push_pull_and_stats(folder: Path, tmp_path: Path) -> None:
    remote = "--remote", (tmp_path / "remote").as_uri()
    with DiskStore(folder, readonly=True) as store:
        chunks, payload = store.stats().chunks, store.stats().payload_bytes
    assert f"{chunks} chunks pushed" in run("push", "--store", folder, *remote)
    assert f"0 chunks pushed, {chunks} were there" in run("push", "--store", folder, *remote)
    assert there(tmp_path) == chunks
    shown = run("stats", "--store", folder, *remote)
    assert f"{chunks} chunks" in shown and "llama@" in shown
    with scene.small(tmp_path / "two") as cache:
        cache.catalog.put_setting("codec", "raw")
    assert "0 chunks pulled" in run("pull", "--store", tmp_path / "two", *remote)
    assert f"{chunks} chunks pulled" in run("pull", "--all", "--store", tmp_path / "two", *remote)
    with DiskStore(tmp_path / "two", readonly=True) as store:
        assert store.verify() == {} and store.stats().payload_bytes == payload
    with scene.small(tmp_path / "three", max_bytes=payload // 2) as cache:
        assert cache.store.stats().chunks == 0


def test_pull_keeps_to_the_quota_and_to_the_documents(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = "--remote", (tmp_path / "remote").as_uri()
    run("push", "--store", folder, *remote)
    with DiskStore(folder) as store:
        payload, digests = store.stats().payload_bytes, list(store.keys())
        for digest in digests:
            store.drop_local(digest)
    monkeypatch.setenv("RAGCACHE_MAX_BYTES", str(payload // 2))
    shown = run("pull", "--store", folder, *remote)
    assert "had no room" in shown
    with DiskStore(folder, readonly=True) as store:
        assert 0 < store.stats().payload_bytes <= payload // 2
    monkeypatch.delenv("RAGCACHE_MAX_BYTES")
    run("pull", "--store", folder, *remote)
    with scene.small(folder) as cache:
        assert cache.store.stats().chunks == len(digests) - 1  # but for the prefix, of no document
        assert cache.ask(QUESTION).report.reused_tokens > 0


def test_delete_tells_the_remote(folder: Path, tmp_path: Path) -> None:
    remote = "--remote", (tmp_path / "remote").as_uri()
    run("push", "--store", folder, *remote)
    before = there(tmp_path)
    run("delete", "mill", "--store", folder, *remote)
    assert there(tmp_path) < before


def test_a_remote_must_be_set(folder: Path) -> None:
    done = CliRunner().invoke(app, ["push", "--store", str(folder)])
    assert isinstance(done.exception, ConfigError) and "give --remote" in str(done.exception)
