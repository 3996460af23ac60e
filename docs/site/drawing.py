"""Boxes, arrows and text as SVG. A drawing has its own background and follows dark mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

#: Opaque, so that a drawing can be read on a page of either colour, whatever the browser prefers.
STYLE = """\
svg { font-family: system-ui, sans-serif; font-size: 13px; color-scheme: light dark }
.back { fill: #ffffff; stroke: #d0d7de }
.box { fill: #eef4fb; stroke: #5b7ea6 }
.plain { fill: #f6f8fa; stroke: #8c959f }
.panel { fill: none; stroke: #8c959f; stroke-dasharray: 5 4 }
.line { fill: none; stroke: #6e7781; stroke-width: 1.2 }
.dashed { stroke-dasharray: 5 4 }
.head { fill: #6e7781 }
.name { fill: #1f2328; font-weight: 600 }
.note { fill: #57606a; font-size: 11px }
@media (prefers-color-scheme: dark) {
  .back { fill: #0d1117; stroke: #30363d }
  .box { fill: #132338; stroke: #4f7cac }
  .plain { fill: #161b22; stroke: #6e7681 }
  .panel { stroke: #6e7681 }
  .line { stroke: #8b949e }
  .head { fill: #8b949e }
  .name { fill: #e6edf3 }
  .note { fill: #9198a1 }
}"""

_ARROW = (
    '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
    ' orient="auto"><path class="head" d="M0 0L8 4L0 8z"/></marker></defs>'
)


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle with a name and lines of notes. ``x`` and ``y`` are its centre, in pixels."""

    x: float
    y: float
    width: float
    height: float
    name: str
    notes: tuple[str, ...] = ()
    kind: str = "box"  # or plain

    @property
    def top(self) -> tuple[float, float]:
        return self.x, self.y - self.height / 2

    @property
    def bottom(self) -> tuple[float, float]:
        return self.x, self.y + self.height / 2

    @property
    def left(self) -> tuple[float, float]:
        return self.x - self.width / 2, self.y

    @property
    def right(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y

    def svg(self) -> str:
        x, y = self.x - self.width / 2, self.y - self.height / 2
        first = self.y + 4.5 - 7.5 * len(self.notes)
        lines = [text(self.x, first, self.name, "name")]
        lines += [text(self.x, first + 15 * (n + 1), note) for n, note in enumerate(self.notes)]
        return f"{rectangle(x, y, self.width, self.height, self.kind)}\n" + "\n".join(lines)


def rectangle(x: float, y: float, width: float, height: float, kind: str) -> str:
    size = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect class="{kind}" {size} rx="6"/>'


def text(x: float, y: float, words: str, kind: str = "note", anchor: str = "middle") -> str:
    where = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {where}>{escape(words)}</text>'


def arrow(*points: tuple[float, float], dashed: bool = False) -> str:
    """Straight lines from point to point, with a head at the last."""
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
    return _line(path, dashed)


def curve(points: Sequence[tuple[float, float]]) -> str:
    """A smooth line that leaves every point downwards, with a head at the last."""
    path = "M{:g} {:g}".format(*points[0])
    for (x, y), (to_x, to_y) in zip(points, points[1:], strict=False):
        middle = (y + to_y) / 2
        path += f"C{x:g} {middle:g} {to_x:g} {middle:g} {to_x:g} {to_y:g}"
    return _line(path, dashed=False)


def _line(path: str, dashed: bool) -> str:
    kind = "line dashed" if dashed else "line"
    return f'<path class="{kind}" d="{path}" marker-end="url(#arrow)"/>'


def drawing(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """A whole SVG file. ``title`` is what a screen reader reads."""
    head = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img"'
    size = f'width="{width:g}" height="{height:g}"'
    back = rectangle(0.5, 0.5, width - 1, height - 1, "back")
    lines = [f"<svg {head} {size}>", f"<title>{escape(title)}</title>"]
    lines += [f"<style>\n{STYLE}\n</style>", _ARROW, back, *parts, "</svg>"]
    return "\n".join(lines) + "\n"
