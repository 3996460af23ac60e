"""``ragcache serve`` from its start to its end: what it says, and that it closes what it opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from ragcache.api.security import Keys
from ragcache.api.serve import empty_stores
from ragcache.settings import Settings
from tests import scene
from tests.api.conftest import ANN, BOB, served
from tests.api.scene import small

ITSELF = "own-" + "o" * 32


def test_empty_stores_are_told_of(tmp_path: Path) -> None:
    with small(tmp_path) as service:
        [none] = empty_stores(service, Keys())
        assert none.startswith("the store holds no documents")
        service.own.add(scene.DOCUMENTS)
        assert list(empty_stores(service, Keys())) == []
        service.cache("bob").add(scene.DOCUMENTS[:1])
        ann, itself = empty_stores(service, Keys([("ann", ANN), ("bob", BOB)]))
        assert (
            ann.startswith("the store of tenant ann holds no documents") and "--tenant ann" in ann
        )
        assert itself.startswith("the 3 documents of the store itself belong to no key")
        assert list(empty_stores(service, Keys([("", ANN), ("bob", BOB)]))) == []


def test_a_key_for_the_store_itself(tmp_path: Path) -> None:
    (file := tmp_path / "keys").write_text(f".:{ITSELF}\nann:{ANN}\n")
    keys = Keys.of(Settings.load(keys=file))
    assert keys.tenant(ITSELF) == "" and keys.tenants == ["", "ann"]
    with served(tmp_path / "store", keys=[("", ITSELF), ("ann", ANN)]) as one:
        one.service.own.add(scene.DOCUMENTS)
        with one.client(ITSELF) as itself, one.client(ANN) as ann:
            assert len(itself.get("/v1/documents").json()["data"]) == 3
            assert ann.get("/v1/documents").json()["data"] == []


@pytest.mark.parametrize("keys", [(), [("ann", ANN)]])
def test_the_root_leads_to_the_page(tmp_path: Path, keys: object) -> None:
    with served(tmp_path, keys=keys) as one, one.client(None) as anybody:
        root = anybody.get("/")
        assert root.status_code == 307 and root.headers["Location"] == "/demo"
        assert anybody.get("/", follow_redirects=True).status_code == 200
        assert anybody.get("/demo/" + "a" * 256).status_code == 404
        assert anybody.get("/demo/%2e%2e%2fpage.py").status_code == 404
        assert anybody.get("/nowhere").status_code == (401 if keys else 404)
        assert one.server.url == one.url


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("[::1].evil.test", 403),
        ("[::1]:80.evil.test", 403),
        ("[::1", 403),
        ("127.0.0.1:80@evil.test", 403),
        ("localhost.evil.test", 403),
        ("evil.test", 403),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("LocalHost:1", 200),
        ("127.0.0.1", 200),
    ],
)
def test_hosts(open_: object, host: str, status: int) -> None:
    with open_.client(None) as client:  # type: ignore[attr-defined]
        assert client.get("/health", headers={"Host": host}).status_code == status


@pytest.fixture(scope="module")
def open_(tmp_path_factory: pytest.TempPathFactory) -> object:
    with served(tmp_path_factory.mktemp("open"), keys=()) as one:
        yield one
