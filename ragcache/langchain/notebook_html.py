"""An answer's report as HTML for notebooks: a bar and a table of its chunks."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any


def report_html(text: str, report: Mapping[str, Any]) -> str:
    """The answer above a bar of its chunks, each as wide as its number of tokens.

    A chunk's colour is the share of its KV that was computed, a mean over layers: green where all
    of it was loaded, red where all was computed. The table below has the numbers. All text of
    documents and models is escaped.
    """
    chunks = report.get("chunks", ())
    bar = "".join(
        f'<div title="{escape(_tooltip(chunk))}" style="flex:{max(1, chunk["tokens"])};height:20px;'
        f'border-right:1px solid #fff;background:{_colour(chunk["charged"])}"></div>'
        for chunk in chunks
    )
    rows = "".join(
        f'<tr><td style="background:{_colour(chunk["charged"])}">&nbsp;</td>'
        f"<td>{escape(str(chunk['id']))}</td><td>{chunk['tokens']}</td>"
        f"<td>{chunk['recomputed']}</td><td>{chunk['charged']:.0%}</td>"
        f"<td>{escape(_origin(chunk))}</td></tr>"
        for chunk in chunks
    )
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in report.get("fallbacks", ()))
    head = "".join(
        f"<th>{name}</th>" for name in ("", "chunk", "tokens", "recomputed", "charged", "KV")
    )
    return (
        f'<div class="ragcache"><p>{escape(text)}</p>'
        f"<p><small>{escape(_summary(report))}</small></p>"
        f'<div style="display:flex;max-width:720px">{bar}</div>'
        f'<table cellpadding="4"><tr>{head}</tr>{rows}</table><ul>{notes}</ul></div>'
    )


def _summary(report: Mapping[str, Any]) -> str:
    return (
        f"{report.get('mode', '')}: {report.get('reused_tokens', 0)} of "
        f"{report.get('chunk_tokens', 0)} chunk tokens reused; "
        f"first token after {1e3 * report.get('ttft_s', 0.0):.0f} ms"
    )


def _tooltip(chunk: Mapping[str, Any]) -> str:
    return f"{chunk['id']}: {chunk['recomputed']} of {chunk['tokens']} tokens recomputed"


def _origin(chunk: Mapping[str, Any]) -> str:
    return chunk.get("miss") or ("stored, but computed" if chunk.get("cheaper") else "stored")


def _colour(charged: float) -> str:
    return f"hsl({round(130 * (1 - min(1.0, max(0.0, charged))))},65%,60%)"
