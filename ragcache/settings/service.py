"""Settings of the service alone: addresses, API keys, limits, and the quality monitor."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import ByteSize, Field, SecretStr

from ragcache.settings.sources import SourcedSettings


class ServiceSettings(SourcedSettings):
    """What ``ragcache serve`` reads in addition to :class:`Settings`, from the same places."""

    subject: ClassVar[str] = "the service"
    hint: ClassVar[str] = ", or set it for `ragcache serve`"

    host: str = Field(
        "127.0.0.1",
        description="Address to listen at. An address that other machines can reach needs API "
        "keys.",
    )
    port: int = Field(
        8000, ge=0, le=65535, description="Port to listen at. 0 chooses one that is free."
    )
    keys: Path | None = Field(None, description="File of API keys: one `name:key` per line.")
    api_keys: SecretStr | None = Field(
        None,
        description="API keys: `name:key`, separated by commas. Set them as a variable, not in "
        "the file.",
    )
    queue: int = Field(
        64, ge=1, description="Maximum questions of a tenant that wait for an answer."
    )
    streams: int = Field(
        16, ge=1, description="Maximum answers that are generated at the same time."
    )
    timeout_s: float = Field(
        120.0, gt=0, description="Seconds that a request may take, from its arrival to its end."
    )
    read_s: float = Field(
        30.0, gt=0, description="Seconds that a client may take to send a whole request."
    )
    connections: int | None = Field(
        None,
        ge=1,
        description="Maximum open connections. Default: half of the files that the process may "
        "open.",
    )
    grace_s: float = Field(
        30.0, ge=0, description="Seconds that requests may still take when the service shuts down."
    )
    body_bytes: ByteSize = Field(ByteSize(4 << 20), description="Longest request body.")
    trust_request_templates: bool = Field(
        False,
        description="Whether requests may bring chat templates, which are programs.",
    )
    log_text: bool = Field(False, description="Whether the log contains questions and answers.")
    monitor_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of the answers that the quality monitor compares with full prefill. 0 "
        "turns it off.",
    )
    monitor_floor: float = Field(
        0.95,
        ge=0,
        lt=1,
        description="Lowest accepted share of answers whose first token is that of full prefill. "
        "Below it the service recomputes more tokens.",
    )
