"""Figures as inline SVG. Colours are CSS classes, so a figure follows the page into the dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from mmseq.errors import TaskError
from mmseq.evaluation.report.wording import task_title
from mmseq.grammar import Group, Segment
from mmseq.tasks import Task

WIDTH = {"vision": 74, "vector": 96, "text": 62}  # of a block in the picture of the tasks, by the stream's kind
COLOUR = {"text": "text", "vision": "vision", "scalar": "scalar", "outcome": "scalar"}  # others have their stream's


def number(value: float, digits: int = 3) -> str:
    """Three significant digits, without an exponent where one can read it."""
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:#.{digits}g}".rstrip(".")


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between two limits."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** np.floor(np.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = np.ceil(low / step - 1e-9) * step
    return [float(v) for v in np.arange(first, high + step * 1e-6, step)]


def plot(
    lines: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    *,
    width: int = 300,
    height: int = 170,
    x_label: str = "",
    y_label: str = "",
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    points: Sequence[tuple[float, float]] = (),
    diagonal: bool = False,
    least_height: float = 0.0,
    title: str = "",
) -> str:
    """Lines (CSS class, x, y) and points over labelled axes.

    least_height: the smallest span of the y axis, so that noise does not fill the figure.
    """
    xs = [float(v) for _, x, _ in lines for v in x] + [p[0] for p in points] or [0.0, 1.0]
    ys = [float(v) for _, _, y in lines for v in y] + [p[1] for p in points] or [0.0, 1.0]
    x0, x1 = x_range or (min(xs), max(xs))
    y0, y1 = y_range or (min(ys), max(ys))
    pad = 0.06 * (y1 - y0) or 0.5
    if y_range is None:
        more = max(0.0, least_height - (y1 - y0)) / 2
        y0, y1 = y0 - pad - more, y1 + pad + more
    x1 = x1 if x1 > x0 else x0 + 1
    left, right, top, bottom = 40, 14, 8, 34 if x_label else 20
    at_x = lambda v: left + (float(v) - x0) / (x1 - x0) * (width - left - right)
    at_y = lambda v: height - bottom - (float(v) - y0) / (y1 - y0) * (height - top - bottom)
    out = [f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title or y_label)}">']
    for v in ticks(y0, y1):
        out.append(f'<path class="grid" d="M{left} {at_y(v):.1f}H{width - right}"/>')
        out.append(f'<text class="tick end" x="{left - 5}" y="{at_y(v) + 3.5:.1f}">{_tick(v)}</text>')
    for v in ticks(x0, x1):
        out.append(f'<text class="tick mid" x="{at_x(v):.1f}" y="{height - bottom + 13}">{_tick(v)}</text>')
    out.append(f'<path class="axis" d="M{left} {top}V{height - bottom}H{width - right}"/>')
    if diagonal:
        low, high = max(x0, y0), min(x1, y1)
        out.append(f'<path class="guide" d="M{at_x(low):.1f} {at_y(low):.1f}L{at_x(high):.1f} {at_y(high):.1f}"/>')
    if points:
        dots = "".join(f"M{at_x(x):.1f} {at_y(y):.1f}h0" for x, y in points)
        out.append(f'<path class="dots" d="{dots}"/>')
    for css, x, y in lines:
        path = "L".join(f"{at_x(a):.1f} {at_y(b):.1f}" for a, b in zip(x, y))
        if path:
            out.append(f'<path class="line {css}" d="M{path}"/>')
        if "marked" in css:
            dots = "".join(f"M{at_x(a):.1f} {at_y(b):.1f}h0" for a, b in zip(x, y))
            out.append(f'<path class="dots big" d="{dots}"/>')
    if x_label:
        out.append(
            f'<text class="label mid" x="{(left + width - right) / 2}" y="{height - 4}">{escape(x_label)}</text>'
        )
    if y_label:
        y = (height - bottom) / 2
        out.append(f'<text class="label mid" transform="translate(10 {y}) rotate(-90)">{escape(y_label)}</text>')
    return "".join(out) + "</svg>"


def _tick(value: float) -> str:
    value = 0.0 if abs(value) < 1e-12 else value  # no minus zero
    if abs(value) >= 10000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


def track(
    value: float,
    baseline: float | None,
    low: float,
    high: float,
    verdict: str,
    interval: tuple[float, float] | None = None,
    others: Sequence[float] = (),
) -> str:
    """A bar from the left to the value, a tick at the baseline, faint ones at others, a thin line over the interval."""
    share = lambda v: 100 * float(np.clip((v - low) / (high - low) if high > low else 0, 0, 1))
    parts = [f'<i class="{verdict}" style="width:{share(value):.1f}%"></i>']
    if interval:
        a, b = share(interval[0]), share(interval[1])
        parts.append(f'<s style="left:{a:.1f}%;width:{b - a:.1f}%"></s>')
    parts += [f'<b class="soft" style="left:{share(other):.1f}%"></b>' for other in others]
    if baseline is not None:
        parts.append(f'<b style="left:{share(baseline):.1f}%"></b>')
    return f'<div class="track">{"".join(parts)}</div>'


def tasks_picture(arrows: Mapping[str, str]) -> str:
    """Every task as a row of tokens: what is given is filled, what the model writes is outlined."""
    rows = []
    for name, arrow in arrows.items():
        try:
            rows.append((name, Task.parse(arrow)))
        except TaskError:
            continue
    if not rows:
        return ""
    left, line, width = 190, 46, 1000
    body, y = [], 66
    for name, task in rows:
        body.append(f'<text class="name end" x="{left - 18}" y="{y + 21}">{escape(task_title(name))}</text>')
        blocks = _blocks(task)
        need = sum(w for _, _, w in blocks) + 8 * len(blocks)
        scale = min(1.0, (width - left - 12) / need)
        x = float(left)
        for segment, text, w in blocks:
            w *= scale
            if segment is None:
                body.append(f'<text class="arrow mid" x="{x + w / 2:.1f}" y="{y + 22}">{text}</text>')
            else:
                body.append(_block(segment, text, x, y, w))
            x += w + 8 * scale
        y += line
    top = (
        f'<rect class="model" x="{left}" y="8" width="{width - left - 12}" height="40" rx="9"/>'
        f'<text class="model mid" x="{(left + width - 12) / 2}" y="33">one transformer, one set of weights</text>'
    )
    label = 'role="img" aria-label="tasks as token sequences"'
    return f'<svg class="tasks" viewBox="0 0 {width} {y}" {label}>{top}{"".join(body)}</svg>'


def _blocks(task: Task) -> list[tuple[Segment | None, str, float]]:
    """(segment, its text, width); a None segment is the arrow or the dots between repetitions."""
    out: list[tuple[Segment | None, str, float]] = []
    for part in task.parts:
        repeats = min(part.count, 2) if isinstance(part, Group) else 1
        for _ in range(repeats):
            for segment in part.segments if isinstance(part, Group) else (part,):
                before = next((s for s, _, _ in reversed(out) if s is not None), None)
                if segment.predicted and (before is None or not before.predicted):
                    out.append((None, "→", 22))
                out.append(
                    (segment, str(segment), max(WIDTH.get(segment.row.kind.name, 66), 8.2 * len(str(segment)) + 16))
                )
        if isinstance(part, Group) and part.count > repeats:
            out.append((None, f"… × {part.count}", 56))
    return out


def _block(segment: Segment, text: str, x: float, y: float, width: float) -> str:
    css = f"s-{COLOUR.get(segment.row.kind.name, segment.stream)} {'out' if segment.predicted else 'in'}"
    return (
        f'<g class="{css}"><rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="32" rx="6"/>'
        f'<text class="mid" x="{x + width / 2:.1f}" y="{y + 20.5}">{escape(text)}</text></g>'
    )
