"""Where settings come from: flags or keywords, then the environment, then a file."""

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

#: Variables that say to clients where a service answers: no settings, and no mistakes either.
_CLIENTS = {"base_url", "api_key"}

#: What Kubernetes sets in every container for a Service called ragcache, or ragcache-SOMETHING.
_SERVICE = re.compile(
    r"RAGCACHE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_PORT = re.compile(r"RAGCACHE_(\w+_)?PORT")
_ADDRESS = re.compile(r"(tcp|udp|sctp)://", re.IGNORECASE)


class SourcedSettings(BaseSettings):
    """Settings of one ``subject``. Each class directly below this one has settings of its own, and
    all share the environment and the file: there, a class passes over what belongs to another."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, allow_inf_nan=False
    )
    subject: ClassVar[str]
    hint: ClassVar[str] = ""  # how else they are given, for messages

    @classmethod
    def load(cls, **given: Any) -> Self:
        """Merge flags, environment and ``ragcache.toml`` of the working directory.

        ``None`` means not given. Raises ConfigError naming the key, its value and what is
        allowed.
        """
        known = set(_owners()) - RENAMED.keys()
        for name, value in os.environ.items():
            key = name.removeprefix(PREFIX).lower()
            if not name.startswith(PREFIX) or _of_kubernetes(name, value):
                continue
            if key not in known | RENAMED.keys() | _CLIENTS:
                raise ConfigError(
                    f"the environment sets {name}, which is no setting. Known: "
                    + ", ".join(sorted(PREFIX + key.upper() for key in known))
                )
        try:
            return cls(**{key: value for key, value in given.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0]) if first["loc"] else FILE
            if first["type"] == "extra_forbidden":
                near = get_close_matches(key, known, 1)
                meant = f"did you mean {near[0]}?" if near else "docs/settings.md has them all."
                where = "a flag" if key in given else FILE
                raise ConfigError(
                    f"there is no setting {key}, which {where} gives: {meant}"
                ) from error
            wrong = [_said(e) for e in error.errors() if e["loc"][:1] == first["loc"][:1]]
            raise ConfigError(
                f"setting {key} = {first.get('input')!r} cannot be: {', or '.join(wrong)}. "
                f"It comes from a flag, {PREFIX}{key.upper()}, or {FILE}."
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
    """Every setting, old names too, and the class that has it."""
    owners = {key: kind for kind in SourcedSettings.__subclasses__() for key in kind.model_fields}
    return owners | {old: owners[new] for old, new in RENAMED.items()}


class _Environment(EnvSettingsSource):
    """Variables that somebody has set, and not Kubernetes."""

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
    """Whether a variable tells of a Service, and sets nothing."""
    if _SERVICE.fullmatch(name):
        return True
    return bool(_SERVICE_PORT.fullmatch(name) and _ADDRESS.match(value))


def _said(error: Mapping[str, Any]) -> str:
    if error["type"] == "path_type":
        return "input should be a path, in quotes"
    return str(error["msg"]).lower()


def _file() -> dict[str, Any]:
    """What ``ragcache.toml`` of the working directory says; nothing where there is none.

    Raises ConfigError where it cannot be read, or holds a table: no setting is one.
    """
    path = Path(FILE)
    fix = "Correct it, or move it away."
    try:
        text = path.read_bytes().decode("utf-8-sig")
        found = tomllib.loads(text)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(
            f"cannot read the settings in {path.absolute()}: {error.strerror}. Make it a file that "
            "this user may read, or move it away."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path.absolute()} is not UTF-8: byte {error.start} cannot be read. Save it as UTF-8, "
            "or move it away."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path.absolute()} is not valid TOML: {error}. {fix}") from None
    except (ValueError, RecursionError) as error:  # a date, a number or a nesting too far out
        raise ConfigError(f"{path.absolute()} cannot be read as TOML: {error}. {fix}") from None
    for key, value in found.items():
        if isinstance(value, (dict, list)):
            kind = f"a table, [{key}]" if isinstance(value, dict) else "a list"
            raise ConfigError(
                f"{path.absolute()} has {kind}, where settings are single values: write "
                "top_k = 6, and so on, with no heading above"
            )
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(
                f"{path.absolute()}: {key} has a character of code 0, which no setting may have: "
                "leave it out"
            )
    return found
