"""Read messages (.eml): the text, with subject, sender and date as metadata."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import EmailPolicy
from pathlib import Path
from typing import Any

from ragcache.errors import SourceError
from ragcache.retriever.encoding import decode_source
from ragcache.retriever.extraction import ExtractedText, Omitted, TimeLimit
from ragcache.retriever.readers import Found, clean_text, make_document, read_contents
from ragcache.retriever.webpage import extract_html

_MAX_HEADER = 10_000  # characters; the library's time grows with their square


class _ShortHeaders(EmailPolicy):
    """Reads the beginning of longer headers."""

    def header_fetch_parse(self, name: str, value: str) -> Any:
        return super().header_fetch_parse(name, value[:_MAX_HEADER])


_POLICY = _ShortHeaders()


def read_mail(name: str, path: Path) -> Iterator[Found]:
    """One document; its title is the subject, metadata has ``from``, ``to`` and ``date``.

    The text is that of the part that is plain text, else the text of the HTML part. Attachments,
    and messages in it, are left out and counted.
    """
    clock = TimeLimit()
    raw = read_contents(path)
    try:
        message = message_from_bytes(raw, policy=_POLICY)
        assert isinstance(message, EmailMessage)
        body = message.get_body(("plain", "html"))
        attached = [part.get_filename() or "" for part in message.iter_attachments()]
        found = _text(body, str(path), clock) if isinstance(body, EmailMessage) else None
        subject = str(message["subject"] or "")
        about = {key: str(message[key] or "") for key in ("from", "to")} | {"date": _date(message)}
    # For damaged headers, the library raises almost any built-in error.
    except (
        *(ValueError, TypeError, AttributeError, LookupError, AssertionError, RecursionError),
    ) as error:
        raise SourceError(
            f"{path} is not a readable message: {str(error) or type(error).__name__}. Save its "
            "text as .txt or .html."
        ) from error
    if found is not None:
        yield from found.omitted(str(path))
    if attached:
        named = next(filter(None, attached), "one without a name")
        why = f"attachments, such as {named}. Save those that you need beside it."
        yield Omitted(str(path), len(attached), int(body is not None), "parts", why)
    metadata = {"source": name, "format": "mail"} | {k: v for k, v in about.items() if v}
    text = found.text if found is not None else ""
    yield make_document(name, " ".join(subject.split()), text, **metadata)


def _text(body: EmailMessage, place: str, clock: TimeLimit) -> ExtractedText:
    """Raises SourceError for text that is in no encoding."""
    raw = body.get_payload(decode=True)
    assert isinstance(raw, bytes)
    try:
        text = raw.decode(body.get_content_charset("utf-8"))
    except (LookupError, UnicodeDecodeError):  # it declares none, an unknown or the wrong one
        text = decode_source(raw, place)
    if body.get_content_subtype() == "html":
        return extract_html(clean_text(text), clock)
    return ExtractedText("", clean_text(text).strip())


def _date(message: EmailMessage) -> str:
    """The date as ISO 8601, or as it stands if it is none."""
    header = message["date"]
    moment = getattr(header, "datetime", None)
    return moment.isoformat() if isinstance(moment, datetime) else str(header or "")
