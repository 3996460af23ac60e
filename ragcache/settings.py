"""Settings from flags, environment (``RAGCACHE_*``) and a file, in that order of precedence."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ByteSize, Field, SecretStr, TypeAdapter, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from ragcache.errors import ConfigError

PREFIX = "RAGCACHE_"
FILE = "ragcache.toml"

#: A share of the chunk tokens, or as many as loading the others leaves time for.
Ratio = Annotated[float, Field(ge=0, le=1)] | Literal["auto"]

#: Variables that say to clients where a service answers: no settings, and no mistakes either.
_CLIENTS = {"base_url", "api_key"}

#: What Kubernetes sets in every container for a Service called ragcache, or ragcache-SOMETHING.
_SERVICE = re.compile(
    r"RAGCACHE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_PORT = re.compile(r"RAGCACHE_(\w+_)?PORT")
_ADDRESS = re.compile(r"(tcp|udp|sctp)://", re.IGNORECASE)

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def seconds(text: str) -> float:
    """A length of time such as ``90s``, ``12h`` or ``30d``. Raises ConfigError for another."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is no length of time: give one such as 90s, 15m, 12h, 30d, 2w")
    return float(match[1]) * _UNITS[match[2]]


def size(text: str) -> int:
    """A number of bytes such as ``50GB``. Raises ConfigError for another text."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ConfigError(f"{text!r} is no size: give one such as 500MB, 20GiB, 1TB") from None


class Settings(BaseSettings):
    """Everything that can be set. Unknown keys are errors wherever they stand."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, allow_inf_nan=False
    )

    store: Path = Field(Path("ragcache-store"), description="folder of the store")
    model: str = Field("", description="folder or hub name; empty: what the store was built with")
    device: str = Field("auto", description="auto, cpu or cuda")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16")
    kernels: Literal["auto", "torch", "triton"] = Field(
        "auto", description="what a GPU places KV and attends with: auto, torch or triton"
    )
    embedder: str = Field("", description="sentence-transformers model; empty: the store's own")
    index: Literal["faiss", "numpy"] = Field("faiss", description="vector index")
    chunk_tokens: int | None = Field(
        None,
        ge=8,
        description="longest chunk; default: the store's own, or the smaller of 256 "
        "and a 32nd of the model's context",
    )
    compile: str = Field(
        "",
        description="context that chunks are computed in: prefix, bos or link0; empty: the "
        "store's own",
    )
    prompt_date: date | Literal["", "today"] = Field(
        "",
        description="date in the prompt, for a chat template that puts one there: today, or such "
        "as 2026-11-30; empty: the store's own, that of its first use",
    )
    codec: str = Field(
        "",
        description="how KV is stored, such as raw, bfloat16, int8 or cachegen; empty: the store's "
        "own; a new one's is the model's published precision",
    )
    layout: Literal["auto", "records", "files"] = Field(
        "auto", description="where KV is stored: in LMDB, in a file per chunk, or by its size"
    )
    max_bytes: ByteSize | None = Field(
        None,
        description="KV that the store may hold, such as 50GB; a full one evicts; empty: no bound",
    )
    tenant_bytes: ByteSize | None = Field(
        None, description="KV that each tenant may hold; empty: no bound"
    )
    ram_bytes: ByteSize = Field(
        ByteSize(0), description="KV held in RAM in front of the store, such as 4GB; 0: none"
    )
    remote: str = Field(
        "",
        description="object store that machines share: s3://bucket/prefix, gs://bucket/prefix, "
        "az://container/prefix or file:///folder; empty: none",
    )
    levels: str = Field(
        "",
        description="codecs in which chunks are sent there too, for slow links, those that lose "
        "least first, separated by commas, such as int8,cachegen",
    )
    eviction: Literal["lru", "pgdsf", "craft"] = Field(
        "pgdsf", description="which chunks go first when the store is full"
    )
    engine: Literal["embedded", "vllm"] = Field(
        "embedded", description="what runs the model: this process, or vLLM servers"
    )
    vllm_url: str = Field("", description="addresses of vLLM servers, separated by commas")
    vllm_key: SecretStr | None = Field(None, description="their API key; for the environment")
    mode: str = Field("fused", description="fusion method and its parameters")
    ratio: Ratio = Field(
        "auto",
        description="share of chunk tokens recomputed; auto: at least the mode's own, and as many "
        "as loading the others leaves time for",
    )
    top_k: int = Field(4, ge=1, le=1000, description="chunks retrieved, at most 1000")
    neighbours: int = Field(1, ge=0, description="chunks before and after each that come along")
    require_chunks: bool = Field(
        False,
        description="whether a question is refused for which there are no chunks, and not "
        "answered from nothing",
    )
    max_tokens: int = Field(64, ge=1, description="longest answer")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling")
    guard_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of a service's answers that are compared with full prefill; 0: none",
    )
    guard_floor: float = Field(
        0.95,
        ge=0,
        lt=1,
        description="agreement with full prefill on the first token below which the service "
        "recomputes more",
    )
    host: str = Field("127.0.0.1", description="address to serve at; other than loopback: keys")
    port: int = Field(8000, ge=0, le=65535, description="port to serve at; 0: any that is free")
    keys: Path | None = Field(None, description="file of API keys: name:key, one a line")
    api_keys: SecretStr | None = Field(
        None, description="API keys: name:key, separated by commas; for the environment"
    )
    queue: int = Field(64, ge=1, description="questions of a tenant that may wait")
    streams: int = Field(16, ge=1, description="answers under way at a time")
    timeout_s: float = Field(120.0, gt=0, description="seconds that an answer may take")
    read_s: float = Field(30.0, gt=0, description="seconds to send a whole request in")
    connections: int | None = Field(
        None,
        ge=1,
        description="connections at a time; default: half of the files that the process may open",
    )
    grace_s: float = Field(30.0, ge=0, description="seconds to finish what was begun, at the end")
    body_bytes: ByteSize = Field(ByteSize(4 << 20), description="longest request body")
    log_text: bool = Field(False, description="whether logs have questions and answers")

    @classmethod
    def load(cls, **given: Any) -> Self:
        """Merge flags, environment and ``ragcache.toml`` of the working directory.

        ``None`` means not given. Raises ConfigError naming the key, its value and what is
        allowed.
        """
        known = set(cls.model_fields)
        for name, value in os.environ.items():
            key = name.removeprefix(PREFIX).lower()
            if not name.startswith(PREFIX) or _of_kubernetes(name, value):
                continue
            if key not in known | _CLIENTS:
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
        return init_settings, _Environment(settings_cls), InitSettingsSource(settings_cls, _file())


class _Environment(EnvSettingsSource):
    """Variables that somebody has set, and not Kubernetes."""

    def _load_env_vars(self) -> Mapping[str, str | None]:
        found = super()._load_env_vars()
        return {k: v for k, v in found.items() if not _of_kubernetes(k.upper(), v or "")}


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
