"""Draws the curves of ``strategies.py`` as SVG: validation loss against bytes.

One panel a federation. Makes no run and computes no figure but the mean over seeds.
"""

import math
import statistics
from collections.abc import Iterator, Sequence

from strategies_figures import CEILING, FLOOR, PEER, Field, Finished

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BASE = 400, 340, 60, 130, 60, 110
LINE = 16
"""Least distance of two labels."""
INK, GRID, GREY, PALE = "#23272e", "#e6e8eb", "#6b7079", "#b9bdc4"
COLOURS = {
    PEER: "#c8560d",
    "alternating": "#1f5fa8",
    "ffa": "#2e8b57",
    "fedsvd": "#7aa63c",
    "flexlora": "#8a4fb0",
    "fedex": "#b5305f",
    "flora": "#7a5230",
    "fedsa": "#0f8f9c",
}
"""Curves of their own colour and label; the others are pale."""
TITLES = {"embedded": "embedded federation", "clinics": "ten clinics"}
NOTES = (
    "Curves: a dot a round, runs as long as the bytes of fedavg allow, mean over seeds. "
    "Rings: where runs of equal rounds end.",
    "Pale: FedProx, server optimisers and robust strategies. fedsa: with the factors that "
    "clinics keep.",
)
Curve = list[tuple[float, float]]
"""Megabytes and loss, a point a round."""


def draw(fields: Sequence[Field], default: str) -> str:
    """Return the picture; the curve of ``default`` is thicker."""
    panels = [line for place, field in enumerate(fields) for line in _panel(place, field, default)]
    width, height = len(fields) * (LEFT + WIDTH + RIGHT), TOP + HEIGHT + BASE
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" fill="{INK}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">'
        '<rect width="100%" height="100%" fill="#ffffff"/>'
    )
    notes = [
        f'<text x="{LEFT}" y="{height - 34 + 18 * at}" fill="{GREY}">{note}</text>'
        for at, note in enumerate(NOTES)
    ]
    return "\n".join([head, *panels, *notes, "</svg>"]) + "\n"


def mean_curve(runs: Sequence[Finished]) -> Curve:
    """Return megabytes and loss after each round, means over runs of one length."""
    curve: Curve = []
    for points in zip(*(run.curve[1:] for run in runs), strict=True):
        size = statistics.fmean(point.bytes for point in points) / 1e6
        loss = statistics.fmean(point.loss for point in points)
        if math.isfinite(loss):
            curve.append((size, loss))
    return curve


def spread(wanted: Sequence[float], least: float) -> list[float]:
    """Return places in the order of ``wanted``, ``least`` apart, about where they are wanted."""
    order = sorted(range(len(wanted)), key=lambda at: wanted[at])
    groups: list[list[int]] = []
    for at in order:
        groups.append([at])
        while len(groups) > 1 and _top(groups[-1], wanted, least) < (
            _top(groups[-2], wanted, least) + len(groups[-2]) * least
        ):
            last = groups.pop()
            groups[-1] += last
    places = [0.0] * len(wanted)
    for group in groups:
        for step, at in enumerate(group):
            places[at] = _top(group, wanted, least) + step * least
    return places


def _top(group: list[int], wanted: Sequence[float], least: float) -> float:
    """Return where the first label of a group stands that is centred on what it is about."""
    return statistics.fmean(wanted[at] for at in group) - (len(group) - 1) * least / 2


def ticks(low: float, high: float) -> list[float]:
    """Return five to eleven round numbers between ``low`` and ``high``."""
    least = (high - low) / 5 * (1 + 1e-9)
    power = 10.0 ** math.floor(math.log10(least))
    step = max(size for size in (1, 2, 5) if size * power <= least) * power
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(number * step, 9) for number in range(first, last + 1)]


class _Axes:
    """Where megabytes (on a logarithmic scale) and losses lie in one panel."""

    def __init__(self, place: int, field: Field, curves: Sequence[Curve]) -> None:
        sizes = [size for curve in curves for size, _ in curve]
        losses = [loss for curve in curves for _, loss in curve]
        self.levels = {
            name: statistics.fmean(level)
            for name in (FLOOR, CEILING)
            if (level := [run.end.loss for run in field.whole(name)])
        }
        losses += self.levels.values()
        self.left = LEFT + place * (LEFT + WIDTH + RIGHT)
        self.first, self.last = math.log2(min(sizes)) - 0.15, math.log2(max(sizes)) + 0.15
        start = [run.curve[0].loss for run in field.runs if run.curve[0].round == 0]
        # What has become worse than the start is cut off at the upper edge.
        top = min(max(losses), statistics.fmean(start)) if start else max(losses)
        room = 0.04 * (top - min(losses)) or 0.1
        self.low, self.high = min(losses) - room, top + room

    def x(self, size: float) -> float:
        share = (math.log2(size) - self.first) / (self.last - self.first)
        return round(self.left + share * WIDTH, 1)

    def y(self, loss: float) -> float:
        share = (self.high - min(loss, self.high)) / (self.high - self.low)
        return round(TOP + HEIGHT * share, 1)


def _panel(place: int, field: Field, default: str) -> Iterator[str]:
    names = [name for name in field.names() if name not in (FLOOR, CEILING)]
    whole = {name: mean_curve(field.whole(name)) for name in names}
    curves = {name: mean_curve(field.equal_bytes(name)) or whole[name] for name in names}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return
    axes = _Axes(place, field, [*curves.values(), *whole.values()])
    yield (
        f'<text x="{axes.left}" y="32" font-size="16" font-weight="bold">'
        f"{TITLES[field.federation]}: validation loss</text>"
    )
    yield from _grid(axes)
    for name in sorted(curves, key=lambda each: (each == default, each in COLOURS)):
        yield from _curve(axes, curves[name], COLOURS.get(name, PALE), thick=name == default)
    for name in curves:
        yield from _rings(axes, whole[name][-1:], COLOURS.get(name, PALE))
    ends = {name: curves[name][-1] for name in curves if name in COLOURS}
    yield from _labels(axes, ends, default)


def _grid(axes: _Axes) -> Iterator[str]:
    right, bottom = axes.left + WIDTH, TOP + HEIGHT
    for loss in ticks(axes.low, axes.high):
        yield (
            f'<line x1="{axes.left}" x2="{right}" y1="{axes.y(loss)}" y2="{axes.y(loss)}" '
            f'stroke="{GRID}"/><text x="{axes.left - 8}" y="{axes.y(loss) + 4}" '
            f'text-anchor="end">{loss:g}</text>'
        )
    for power in range(math.ceil(axes.first), math.floor(axes.last) + 1):
        across = axes.x(2.0**power)
        yield (
            f'<line x1="{across}" x2="{across}" y1="{TOP}" y2="{bottom}" stroke="{GRID}"/>'
            f'<text x="{across}" y="{bottom + 20}" text-anchor="middle">{2.0**power:g}</text>'
        )
    yield (
        f'<text x="{axes.left + WIDTH / 2}" y="{bottom + 44}" text-anchor="middle">'
        "MB up and down, all clinics</text>"
    )
    for level in axes.levels.values():
        yield (
            f'<line x1="{axes.left}" x2="{right}" y1="{axes.y(level)}" y2="{axes.y(level)}" '
            f'stroke="{GREY}" stroke-dasharray="5 4"/>'
        )


def _curve(axes: _Axes, curve: Curve, colour: str, *, thick: bool) -> Iterator[str]:
    points = [(axes.x(size), axes.y(loss)) for size, loss in curve]
    path = " ".join(f"{across},{down}" for across, down in points)
    width, radius = (3, 3.5) if thick else (1.5, 2)
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'
    for across, down in points:
        yield f'<circle cx="{across}" cy="{down}" r="{radius}" fill="{colour}"/>'


def _rings(axes: _Axes, ends: Curve, colour: str) -> Iterator[str]:
    for size, loss in ends:
        yield (
            f'<circle cx="{axes.x(size)}" cy="{axes.y(loss)}" r="5" fill="#ffffff" '
            f'stroke="{colour}" stroke-width="1.5"/>'
        )


def _labels(axes: _Axes, ends: dict[str, tuple[float, float]], default: str) -> Iterator[str]:
    """Write names on the right, each joined to its curve's end or its dashed line."""
    right = axes.left + WIDTH
    targets = {name: (axes.x(size), axes.y(loss)) for name, (size, loss) in ends.items()}
    targets |= {name: (right, axes.y(level)) for name, level in axes.levels.items()}
    places = spread([down for _, down in targets.values()], LINE)
    for (name, (across, down)), place in zip(targets.items(), places, strict=True):
        colour = COLOURS.get(name, GREY)
        weight = "bold" if name == default else "normal"
        yield (
            f'<line x1="{across}" y1="{down}" x2="{right + 12}" y2="{place:.1f}" '
            f'stroke="{colour}" stroke-width="0.8" stroke-dasharray="1 2"/>'
            f'<text x="{right + 16}" y="{place + 4:.1f}" fill="{colour}" '
            f'font-weight="{weight}">{name}</text>'
        )
