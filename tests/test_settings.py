"""Settings from flags, environment and file, in this order; unknown ones are errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ragcache.errors import ConfigError
from ragcache.settings import ServiceSettings, Settings
from ragcache.settings.renamed import RENAMED, RenamedWarning


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_flags_beat_environment_beats_file(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty_folder / "ragcache.toml").write_text('top_k = 7\nratio = 0.1\nmode = "reuse"\n')
    monkeypatch.setenv("RAGCACHE_TOP_K", "8")
    monkeypatch.setenv("RAGCACHE_RATIO", "0.2")
    settings = Settings.load(top_k=9, ratio=None)
    assert (settings.top_k, settings.ratio, settings.mode) == (9, 0.2, "reuse")
    monkeypatch.setenv("RAGCACHE_RATIO", "auto")
    assert Settings.load().ratio == "auto"


def test_the_ratio_suits_the_machine_by_default() -> None:
    assert Settings.load().ratio == "auto" and Settings.load(ratio=0.3).ratio == 0.3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratio": 1.5}, "setting ratio = 1.5 is not valid: .*less than or equal to 1"),
        ({"ratio": "fast"}, "setting ratio = 'fast' is not valid: .*or input should be 'auto'"),
        ({"top_k": 0}, "setting top_k = 0 is not valid"),
        ({"index_recall": 1.5}, "setting index_recall = 1.5 is not valid"),
        ({"layout": "annoy"}, "setting layout = 'annoy' is not valid"),
        ({"colour": "red"}, "colour in the arguments is not a setting. docs/settings.md lists"),
    ],
)
def test_values_that_cannot_be(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings.load(**given)


def test_unknown_keys_in_file_and_environment(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty_folder / "ragcache.toml").write_text("topk = 7\n")
    with pytest.raises(
        ConfigError, match="topk in ragcache.toml is not a setting. Did you mean top_k"
    ):
        Settings.load()
    (empty_folder / "ragcache.toml").unlink()
    monkeypatch.setenv("RAGCACHE_TOPK", "7")
    with pytest.raises(
        ConfigError, match="the environment variable RAGCACHE_TOPK is not.*RAGCACHE_TOP_K"
    ):
        Settings.load()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'store = "caf\xe9"', "ragcache.toml is not UTF-8: byte 12 is not valid. Save it as"),
        (
            b"[model]\nname = 'x'",
            r"ragcache.toml contains a table, \[model\], but settings are single",
        ),
        (b"store = {a = 1}", r"contains a table, \[store\], but settings are single values: write"),
        (b"ratio = [1]", "ragcache.toml contains a list, but settings are single values: write"),
        (
            b"port = " + b"9" * 5000,
            "cannot be read as TOML: .*digits.* Correct it, or remove it",
        ),
        (b"a = " + b"[" * 9000, "cannot be read as TOML: .*recursion.* Correct it, or remove it"),
        (b'store = "\\u0000"', "store contains a null character: remove it"),
        (b"store = 5", "setting store = 5 is not valid: input should be a path, in quotes"),
        (b"top_p = nan", "setting top_p = nan is not valid: input should be a finite number"),
    ],
)
def test_files_that_cannot_be(empty_folder: Path, text: bytes, message: str) -> None:
    (empty_folder / "ragcache.toml").write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        Settings.load()


def test_a_folder_or_a_circle_in_the_place_of_the_file(empty_folder: Path) -> None:
    file = empty_folder / "ragcache.toml"
    file.mkdir()
    with pytest.raises(ConfigError, match="cannot read the settings in .*Make it a file that"):
        Settings.load()
    file.rmdir()
    file.symlink_to(file)
    with pytest.raises(ConfigError, match="cannot read the settings in .*Make it a file that"):
        Settings.load()


def test_a_byte_order_mark_is_no_fault(empty_folder: Path) -> None:
    (empty_folder / "ragcache.toml").write_bytes(b"\xef\xbb\xbftop_k = 7\n")
    assert Settings.load().top_k == 7


def test_a_damaged_file_is_named(empty_folder: Path) -> None:
    (empty_folder / "ragcache.toml").write_text("ratio = = 0.2\n")
    with pytest.raises(ConfigError, match="ragcache.toml is not valid TOML: .*line 1"):
        Settings.load()


@pytest.mark.parametrize("name", ["RAGCACHE", "RAGCACHE_API", "RAGCACHE_STORE"])
def test_what_kubernetes_says_of_a_service_is_no_setting(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """For a Service called ragcache, ragcache-api or ragcache-store, in every container."""
    for end, value in {
        "SERVICE_HOST": "10.0.0.11",
        "SERVICE_PORT": "8000",
        "SERVICE_PORT_HTTP": "8000",
        "PORT": "tcp://10.0.0.11:8000",
        "PORT_8000_TCP": "tcp://10.0.0.11:8000",
        "PORT_8000_TCP_PROTO": "tcp",
        "PORT_8000_TCP_PORT": "8000",
        "PORT_8000_TCP_ADDR": "10.0.0.11",
        "PORT_53_UDP": "udp://10.0.0.11:53",
    }.items():
        monkeypatch.setenv(f"{name}_{end}", value)
    service = ServiceSettings.load()
    assert (service.port, service.host) == (8000, "127.0.0.1")
    assert Settings.load().store == Path("ragcache-store")


@pytest.mark.parametrize(
    "name", ["RAGCACHE_SERVICE", "RAGCACHE_PORTS", "RAGCACHE_PORT_TCP", "RAGCACHE_API_PORT"]
)
def test_what_only_looks_like_it_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "8000")
    with pytest.raises(ConfigError, match=f"the environment variable {name} is not a setting"):
        Settings.load()


def test_a_port_of_ones_own_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAGCACHE_PORT", "9000")
    assert ServiceSettings.load().port == 9000


def test_both_kinds_read_one_file_and_one_environment(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty_folder / "ragcache.toml").write_text('top_k = 7\nport = 9000\nhost = "::1"\n')
    monkeypatch.setenv("RAGCACHE_PORT", "9001")
    monkeypatch.setenv("RAGCACHE_RATIO", "0.2")
    settings, service = Settings.load(), ServiceSettings.load(queue=3)
    assert (settings.top_k, settings.ratio) == (7, 0.2)
    assert (service.port, service.host, service.queue) == (9001, "::1", 3)


def test_no_setting_is_of_both_kinds() -> None:
    assert not Settings.model_fields.keys() & ServiceSettings.model_fields.keys()


@pytest.mark.parametrize("make", [Settings, Settings.load])
def test_a_setting_of_the_service_is_told_from_those_of_a_store(
    make: Callable[..., object],
) -> None:
    message = (
        "port is a setting of the service, not of a store: give it to ServiceSettings, or set it "
        "for `ragcache serve`"
    )
    with pytest.raises(ConfigError, match=message):
        make(port=9000)
    message = "top_k is a setting of a store, not of the service: give it to Settings"
    with pytest.raises(ConfigError, match=message):
        ServiceSettings.load(top_k=2)


def test_a_value_of_the_service_that_cannot_be(empty_folder: Path) -> None:
    (empty_folder / "ragcache.toml").write_text("timeout_s = inf\n")
    with pytest.raises(ConfigError, match="setting timeout_s = inf is not valid: .*finite number"):
        ServiceSettings.load()
    (empty_folder / "ragcache.toml").write_text("prot = 1\n")
    for kind in (Settings, ServiceSettings):
        with pytest.raises(
            ConfigError, match="prot in ragcache.toml is not a setting. Did you mean port"
        ):
            kind.load()


RENAMED_HERE = [
    (Settings, "levels", "remote_codecs", "int8"),
    (Settings, "compile", "encoding_context", "bos"),
    (ServiceSettings, "guard_share", "monitor_share", 0.5),
    (ServiceSettings, "guard_floor", "monitor_floor", 0.5),
]


def test_every_old_name_is_tried_here() -> None:
    assert {old: new for _, old, new, _ in RENAMED_HERE} == RENAMED


@pytest.mark.parametrize(("kind", "old", "new", "value"), RENAMED_HERE)
def test_an_old_name_still_works_and_warns_of_the_new_one(
    empty_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Settings | ServiceSettings],
    old: str,
    new: str,
    value: object,
) -> None:
    makers: list[Callable[..., object]] = [kind, kind.load]
    for make in makers:
        with pytest.warns(RenamedWarning, match=f"^{old} is now called {new}: .* not accept {old}"):
            assert getattr(make(**{old: value}), new) == value
    (empty_folder / "ragcache.toml").write_text(f"{old} = {json.dumps(value)}\n")
    message = f"^in ragcache.toml, {old} is now called {new}: "
    with pytest.warns(RenamedWarning, match=message):
        assert getattr(kind.load(), new) == value
    (empty_folder / "ragcache.toml").unlink()
    monkeypatch.setenv(f"RAGCACHE_{old.upper()}", str(value))
    message = f"^RAGCACHE_{old.upper()} is now called RAGCACHE_{new.upper()}: "
    with pytest.warns(RenamedWarning, match=message):
        assert getattr(kind.load(), new) == value
    other = ServiceSettings if kind is Settings else Settings
    other.load()  # says nothing: it has no such setting


def test_an_old_and_a_new_name_of_one_setting_must_agree(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(RenamedWarning):
        assert Settings.load(compile="bos", encoding_context="bos").encoding_context == "bos"
    with pytest.warns(RenamedWarning):
        assert Settings.load(compile="bos", encoding_context=None).encoding_context == "bos"
    both = "are two names of one setting and have different values: leave"
    with pytest.raises(ConfigError, match=f"^compile and encoding_context {both} compile out"):
        Settings.load(compile="bos", encoding_context="prefix")
    (empty_folder / "ragcache.toml").write_text('levels = "int8"\nremote_codecs = "fp8"\n')
    with pytest.raises(
        ConfigError, match=f"^in ragcache.toml, levels and remote_codecs {both} levels out"
    ):
        Settings.load()
    (empty_folder / "ragcache.toml").unlink()
    monkeypatch.setenv("RAGCACHE_LEVELS", "int8")
    monkeypatch.setenv("RAGCACHE_REMOTE_CODECS", "fp8")
    with pytest.raises(ConfigError, match=f"and RAGCACHE_REMOTE_CODECS {both} RAGCACHE_LEVELS out"):
        Settings.load()


def test_an_old_name_has_the_precedence_of_its_place(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty_folder / "ragcache.toml").write_text('encoding_context = "prefix"\n')
    monkeypatch.setenv("RAGCACHE_COMPILE", "bos")
    with pytest.warns(RenamedWarning):
        assert Settings.load().encoding_context == "bos"
    with pytest.warns(RenamedWarning):
        assert Settings.load(encoding_context="link0").encoding_context == "link0"


def test_an_old_name_of_the_service_is_none_of_a_store() -> None:
    with pytest.raises(ConfigError, match="guard_share is a setting of the service, not of a st"):
        Settings.load(guard_share=0.5)


def test_the_old_name_of_a_flat_index_is_taken_once_more(empty_folder: Path) -> None:
    with pytest.warns(RenamedWarning, match="index faiss is now called flat: use that name"):
        assert Settings.load(index="faiss").index == "flat"
    assert Settings.load(index="IVF64,Flat").index == "IVF64,Flat"
