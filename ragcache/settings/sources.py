"""Where settings come from: arguments, then the environment, then ``ragcache.toml``."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from ragcache.errors import ConfigError
from ragcache.settings.renamed import RENAMED, by_new_names

PREFIX = "RAGCACHE_"
FILE = "ragcache.toml"

#: Variables that clients of the service read: they are no settings, and are ignored here.
_CLIENTS = {"base_url", "api_key"}

#: Variables that Kubernetes sets in containers, for Services called ragcache or ragcache-SOMETHING.
_SERVICE = re.compile(
    r"RAGCACHE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_PORT = re.compile(r"RAGCACHE_(\w+_)?PORT")
_ADDRESS = re.compile(r"(tcp|udp|sctp)://", re.IGNORECASE)


class SourcedSettings(BaseSettings):
    """Base of all settings. Direct subclasses have disjoint settings; all read the same environment
    and the same file, and each ignores the settings of the others."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, allow_inf_nan=False
    )
    subject: ClassVar[str]  # what has these settings; for messages
    hint: ClassVar[str] = ""  # how else to set them; for messages

    @classmethod
    def load(cls, **given: Any) -> Self:
        """Merge arguments, environment and ``ragcache.toml`` of the working directory, in this
        order of precedence.

        None means not given. Raises ConfigError for an unknown key, and for a value that is not
        valid.
        """
        known = set(_owners()) - RENAMED.keys()
        for name, value in os.environ.items():
            key = name.removeprefix(PREFIX).lower()
            if not name.startswith(PREFIX) or _of_kubernetes(name, value):
                continue
            if key not in known | RENAMED.keys() | _CLIENTS:
                raise ConfigError(
                    f"the environment variable {name} is not a setting. Settings are: "
                    + ", ".join(sorted(PREFIX + key.upper() for key in known))
                )
        try:
            return cls(**{key: value for key, value in given.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0]) if first["loc"] else FILE
            if first["type"] == "extra_forbidden":
                near = get_close_matches(key, known, 1)
                meant = f"Did you mean {near[0]}?" if near else "docs/settings.md lists them."
                where = "the arguments" if key in given else FILE
                raise ConfigError(f"{key} in {where} is not a setting. {meant}") from error
            wrong = [_reason(e) for e in error.errors() if e["loc"][:1] == first["loc"][:1]]
            raise ConfigError(
                f"setting {key} = {first.get('input')!r} is not valid: {', or '.join(wrong)}. It "
                f"comes from an option, {PREFIX}{key.upper()}, or {FILE}."
            ) from error

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        assert isinstance(init_settings, InitSettingsSource)
        owners, own = _owners(), cls.model_fields
        given = by_new_names(init_settings.init_kwargs, own)
        for key in given:
            if not issubclass(cls, owner := owners.get(key, cls)):
                raise ConfigError(
                    f"{key} is a setting of {owner.subject}, not of {cls.subject}: give it to "
                    f"{owner.__name__}{owner.hint}"
                )
        file = by_new_names(_file(), own, place=f"in {FILE}, ")
        others = {key for key, owner in owners.items() if not issubclass(cls, owner)}
        return (
            InitSettingsSource(settings_cls, given),
            _Environment(settings_cls),
            InitSettingsSource(settings_cls, {k: v for k, v in file.items() if k not in others}),
        )


def _owners() -> dict[str, type[SourcedSettings]]:
    """The class that has a setting, by the setting's name and by its old name."""
    owners = {key: kind for kind in SourcedSettings.__subclasses__() for key in kind.model_fields}
    return owners | {old: owners[new] for old, new in RENAMED.items()}


class _Environment(EnvSettingsSource):
    """The environment without the variables that Kubernetes sets."""

    def _load_env_vars(self) -> Mapping[str, str | None]:
        prefix = PREFIX.lower()
        found = {
            name.removeprefix(prefix): value
            for name, value in super()._load_env_vars().items()
            if name.startswith(prefix) and not _of_kubernetes(name.upper(), value or "")
        }
        named = by_new_names(
            found, self.settings_cls.model_fields, lambda key: PREFIX + key.upper()
        )
        return {prefix + key: value for key, value in named.items()}


def _of_kubernetes(name: str, value: str) -> bool:
    """Whether Kubernetes has set this variable, for a Service."""
    if _SERVICE.fullmatch(name):
        return True
    return bool(_SERVICE_PORT.fullmatch(name) and _ADDRESS.match(value))


def _reason(error: Mapping[str, Any]) -> str:
    if error["type"] == "path_type":
        return "input should be a path, in quotes"
    return str(error["msg"]).lower()


def _file() -> dict[str, Any]:
    """Keys and values of ``ragcache.toml`` in the working directory; empty if there is no file.

    Raises ConfigError for a file that cannot be read, and for tables and lists.
    """
    path = Path(FILE)
    fix = "Correct it, or remove it."
    try:
        text = path.read_bytes().decode("utf-8-sig")
        found = tomllib.loads(text)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(
            f"cannot read the settings in {path.absolute()}: {error.strerror}. Make it a file that "
            "this user may read, or remove it."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path.absolute()} is not UTF-8: byte {error.start} is not valid. Save it as UTF-8, "
            "or remove it."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path.absolute()} is not valid TOML: {error}. {fix}") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # a date or number out of range, or too deep a nesting
        raise ConfigError(f"{path.absolute()} cannot be read as TOML: {error}. {fix}") from None
    for key, value in found.items():
        if isinstance(value, (dict, list)):
            kind = f"a table, [{key}]" if isinstance(value, dict) else "a list"
            raise ConfigError(
                f"{path.absolute()} contains {kind}, but settings are single values: write lines "
                "such as top_k = 6, without a heading"
            )
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(f"{path.absolute()}: {key} contains a null character: remove it")
    return found
