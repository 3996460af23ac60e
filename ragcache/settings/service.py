"""Settings of the service alone: who may ask, how many at a time, for how long."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import ByteSize, Field, SecretStr

from ragcache.settings.sources import SourcedSettings


class ServiceSettings(SourcedSettings):
    """What ``ragcache serve`` takes beside :class:`Settings`, from the same places."""

    subject: ClassVar[str] = "the service"
    hint: ClassVar[str] = ", or set it for `ragcache serve`"

    monitor_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of a service's answers that are compared with full prefill; 0: none",
    )
    monitor_floor: float = Field(
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
