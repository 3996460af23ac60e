"""Tenants are isolated from each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ragcache.api.service import Service
from ragcache.blend import BLENDERS
from ragcache.errors import ConfigError
from tests import scene
from tests.api.scene import asked, given, settle, small

QUESTION = "Where does Mira Holt live?"


@pytest.fixture(scope="module", params=["records", "files"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:  # type: ignore[type-arg]
    with small(tmp_path_factory.mktemp("store"), layout=request.param) as made:
        yield made


@pytest.mark.parametrize("mode", BLENDERS)
def test_own_chunks_hit_and_anothers_miss(service: Service, mode: str) -> None:
    """A prompt that tenant a has asked twice, and tenant b never."""
    texts = [f"{document.text} It is said of {mode}." for document in scene.DOCUMENTS]

    def report(tenant: str):  # type: ignore[no-untyped-def]
        return asked(service, QUESTION, tenant=tenant, chunks=given(*texts), mode=mode).report

    report("a")
    mine, others = report("a"), report("b")
    assert {chunk.miss for chunk in mine.chunks} == {"absent" if mode == "full" else None}
    assert (mine.bytes_loaded > 0) is (mode != "full")
    assert {chunk.miss for chunk in others.chunks} == {"absent"}
    assert others.reused_tokens == 0
    assert {chunk.miss for chunk in report("b").chunks} == {chunk.miss for chunk in mine.chunks}


def test_documents_are_found_by_their_tenant_alone(service: Service) -> None:
    service.add("c", scene.DOCUMENTS).result(20)
    settle(service)
    assert asked(service, QUESTION, tenant="c").passages
    assert asked(service, QUESTION, tenant="d").passages == ()
    assert service.cache("d").documents() == [] and service.cache("").documents() == []
    [key, *_] = service.cache("c").indexing.keys("holt")
    assert service.cache("c").store.has(key)
    assert not any(service.cache(name).store.has(key) for name in ("d", ""))


@pytest.mark.parametrize("name", ["..", "a/b", "A", "a" * 64, "-a", "a\n", "é"])
def test_a_name_that_cannot_be_a_tenants(service: Service, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a tenant"):
        service.cache(name)
