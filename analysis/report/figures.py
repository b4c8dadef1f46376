"""Figures as inline SVG without scripts, fonts or files; every mark has a title with its value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from attlas.extract.printable import printable

RAMP = 20  # steps of the sequential scale
Point = tuple[float, float]


@dataclass(frozen=True)
class Cell:
    """A head in a heat map or in the atlas."""

    id: int
    label: str
    layer: int
    head: int
    value: float | None
    title: str
    kind: str = "mixed"
    profile: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Curve:
    """A line of a chart; `band` is (low, high) at each point, `style` a class of the style sheet."""

    label: str
    points: Sequence[Point]
    style: str
    band: Sequence[tuple[float | None, float | None]] = ()
    titles: Sequence[str] = ()
    id: int | None = None


def step(value: float, low: float, high: float) -> int:
    """The step of the sequential scale, 0 to RAMP − 1."""
    share = (value - low) / (high - low) if high > low else 0.0
    return max(0, min(RAMP - 1, int(share * RAMP)))


def heat_map(cells: Sequence[Cell], *, title: str, low: float, high: float) -> Markup:
    """Layers down, heads across, the value as colour; cells without a value are hatched."""
    layers, heads = _extent(cells)
    size = max(5.0, min(21.0, 300 / max(heads, 1)))
    left, gap = 26.0, 2.0 if size > 9 else 0.5
    width, height = left + heads * size + 2, layers * size + 18
    marks = [_map_axes(layers, heads, left, size, size)]
    for cell in cells:
        style = "none" if cell.value is None else f"r{step(cell.value, low, high)}"
        x, y = left + cell.head * size, cell.layer * size
        marks.append(
            f'<rect class="cell {style}" data-h="{cell.id}" x="{x:.1f}" y="{y:.1f}" width="{size - gap:.1f}" '
            f'height="{size - gap:.1f}" rx="2"><title>{_text(cell.title)}</title></rect>'
        )
    return _svg(width, height, title, marks)


def atlas(cells: Sequence[Cell], *, title: str) -> Markup:
    """Every head as a small profile of its attention over signed distance, coloured by kind."""
    layers, heads = _extent(cells)
    across = max(14.0, min(82.0, 990 / max(heads, 1)))
    down = max(14.0, min(46.0, across * 0.62))
    left, gap = 28.0, 4.0 if across > 30 else 2.0
    marks = [_map_axes(layers, heads, left, across, down)]
    reach = max((abs(b) for cell in cells for b, _ in cell.profile), default=1)
    for cell in cells:
        x, y = left + cell.head * across, cell.layer * down
        w, h = across - gap, down - gap
        shape = _sparkline(cell.profile, reach, x, y, w, h) if across > 24 else ""
        full = "" if across > 24 else " solid"
        marks.append(
            f'<g class="plate k-{cell.kind}{full}" data-h="{cell.id}"><title>{_text(cell.title)}</title>'
            f'<rect class="cell" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="3"/>{shape}</g>'
        )
    return _svg(left + heads * across, layers * down + 18, title, marks)


def _sparkline(profile: Sequence[tuple[int, float]], reach: int, x: float, y: float, w: float, h: float) -> str:
    """Share of the mass by distance bin, on a square-root scale that keeps faint tails visible beside a peak of 1."""
    if not profile:
        return ""
    slot = w / (2 * reach + 1)
    bars = "".join(
        f"M{x + (b + reach) * slot:.1f} {y + h:.1f}v{-math.sqrt(max(mass, 0)) * (h - 4):.1f}h{slot:.2f}V{y + h:.1f}z"
        for b, mass in profile
        if mass > 1e-4
    )
    middle = x + w / 2
    return f'<path class="zero" d="M{middle:.1f} {y + 3:.1f}V{y + h:.1f}"/><path class="shape" d="{bars}"/>'


def _extent(cells: Sequence[Cell]) -> tuple[int, int]:
    return max((c.layer for c in cells), default=0) + 1, max((c.head for c in cells), default=0) + 1


def _map_axes(layers: int, heads: int, left: float, across: float, down: float) -> str:
    every = max(1, math.ceil(12 / down))
    rows = "".join(
        f'<text class="tick end" x="{left - 6:.1f}" y="{(i + 0.5) * down + 2:.1f}">L{i}</text>'
        for i in range(0, layers, every)
    )
    sparse = max(1, math.ceil(14 / across))
    columns = "".join(
        f'<text class="tick mid" x="{left + (i + 0.5) * across - 1:.1f}" y="{layers * down + 12:.1f}">{i}</text>'
        for i in range(0, heads, sparse)
    )
    return rows + columns


@dataclass(frozen=True)
class Frame:
    """The plotting area of a chart and its scales."""

    x_range: Point
    y_range: Point
    width: float = 320
    height: float = 190
    left: float = 40
    right: float = 10
    top: float = 8
    bottom: float = 26

    def x(self, value: float) -> float:
        low, high = self.x_range
        share = (value - low) / (high - low) if high > low else 0.5
        return self.left + share * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        share = (value - low) / (high - low) if high > low else 0.5
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)


def chart(
    curves: Sequence[Curve],
    *,
    title: str,
    x_ticks: Sequence[tuple[float, str]],
    x_label: str,
    y_ticks: Sequence[tuple[float, str]] | None = None,
    baseline: float | None = None,
    markers: bool = True,
    pad: float = 0.0,
) -> Markup:
    """Lines with bands; `baseline` draws a reference line at that height."""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    ys += [v for curve in curves for pair in curve.band for v in pair if v is not None]
    ticks = y_ticks or [(t, f"{t:g}".replace("-", "−")) for t in nice_ticks(min(ys, default=0), max(ys, default=1))]
    frame = Frame(
        x_range=(min(xs, default=0) - pad, max(xs, default=1) + pad),
        y_range=(ticks[0][0], ticks[-1][0]),
    )
    marks = [_chart_axes(frame, x_ticks, ticks, x_label)]
    if baseline is not None:
        marks.append(f'<path class="base" d="M{frame.left} {frame.y(baseline):.1f}H{frame.width - frame.right}"/>')
    marks += [_band(curve, frame) for curve in curves]
    marks += [_line(curve, frame, markers=markers) for curve in curves]
    return _svg(frame.width, frame.height, title, marks)


def _chart_axes(
    frame: Frame, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]], x_label: str
) -> str:
    ground = frame.height - frame.bottom
    right = frame.width - frame.right
    lines = "".join(
        f'<path class="grid" d="M{frame.left} {frame.y(t):.1f}H{right}"/>'
        f'<text class="tick end" x="{frame.left - 5}" y="{frame.y(t) + 3:.1f}">{_text(text)}</text>'
        for t, text in y_ticks
    )
    labels = "".join(
        f'<text class="tick mid" x="{frame.x(x):.1f}" y="{ground + 12:.1f}">{_text(text)}</text>' for x, text in x_ticks
    )
    name = (
        f'<text class="tick axis mid" x="{(frame.left + right) / 2:.1f}" y="{frame.height - 2}">{_text(x_label)}</text>'
    )
    return lines + labels + name


def _band(curve: Curve, frame: Frame) -> str:
    points = [
        (frame.x(x), frame.y(low), frame.y(high))
        for (x, _), (low, high) in zip(curve.points, curve.band, strict=False)
        if low is not None and high is not None
    ]
    if not points:
        return ""
    if len(points) == 1:
        x, low, high = points[0]
        return f'<path class="whisker {curve.style}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'
    upper = "L".join(f"{x:.1f} {high:.1f}" for x, _, high in points)
    lower = "L".join(f"{x:.1f} {low:.1f}" for x, low, _ in reversed(points))
    return f'<path class="band {curve.style}" d="M{upper}L{lower}z"/>'


def _line(curve: Curve, frame: Frame, *, markers: bool) -> str:
    if not curve.points:
        return ""
    path = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in curve.points)
    head = "" if curve.id is None else f' data-h="{curve.id}"'
    hit = "" if curve.id is None else f'<path class="hit" d="M{path}"/>'
    dots = ""
    if markers:
        dots = "".join(
            f'<circle class="dot" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.6"><title>{_text(text)}</title></circle>'
            for (x, y), text in zip(curve.points, curve.titles, strict=False)
        )
    return (
        f'<g class="curve {curve.style}"{head}><title>{_text(curve.label)}</title>'
        f'{hit}<path class="line" d="M{path}"/>{dots}</g>'
    )


def nice_ticks(low: float, high: float, *, wanted: int = 4) -> list[float]:
    """Round numbers from at most low to at least high."""
    if not high > low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    raw = (high - low) / wanted
    magnitude = 10 ** math.floor(math.log10(raw))
    size = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [round(i * size, 12) for i in range(first, last + 1)]


def _text(text: str) -> Markup:
    return escape(printable(text))


def _svg(width: float, height: float, title: str, marks: Sequence[str]) -> Markup:
    body = "".join(marks)
    # safe: every text in the marks has already been escaped
    return Markup(
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px" role="img" '
        f'aria-label="{_text(title)}">{body}</svg>'
    )
