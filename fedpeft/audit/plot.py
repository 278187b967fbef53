"""The figures of an audit as one SVG picture: ROC curves, and exposure by repetition.

Written by hand, so that a picture needs no plotting library. Sizes are in pixels.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias

from jinja2 import Environment, StrictUndefined

from fedpeft.audit.report import AuditReport, Canaries, Members

_WIDTH, _HEIGHT = 960, 500
_RATES = (1e-3, 1e-2, 1e-1, 1.0)
"""Marks on the logarithmic axes of the ROC, which begin at the first."""
_Content: TypeAlias = dict[str, object]
"""What the template is filled with: a panel, line, dot, tick or entry of a legend."""
_BLUE, _ORANGE, _GREY = "#1f5fa8", "#c8560d", "#8a8f98"


@dataclass(frozen=True, slots=True)
class _Panel:
    """A plotting area; ``x`` and ``y`` turn 0..1 into pixels."""

    left: float
    top: float = 96
    width: float = 350
    height: float = 310

    def x(self, share: float) -> float:
        return round(self.left + share * self.width, 1)

    def y(self, share: float) -> float:
        return round(self.top + (1 - share) * self.height, 1)


_ROC = _Panel(left=78)
_EXPOSURE = _Panel(left=560)

_TEMPLATE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ width }} {{ height }}" \
width="{{ width }}" height="{{ height }}" font-family="Helvetica, Arial, sans-serif" \
font-size="13" fill="#23272e">
<rect width="100%" height="100%" fill="#ffffff"/>
{% for panel in panels -%}
<text x="{{ panel.area.left }}" y="34" font-size="16" font-weight="bold">{{ panel.title }}</text>
<text x="{{ panel.area.left }}" y="54" fill="#5b616b">{{ panel.subtitle }}</text>
{% for tick in panel.y_ticks -%}
<line x1="{{ panel.area.x(0) }}" x2="{{ panel.area.x(1) }}" y1="{{ panel.area.y(tick.at) }}" \
y2="{{ panel.area.y(tick.at) }}" stroke="#e6e8eb"/>
<text x="{{ panel.area.x(0) - 8 }}" y="{{ panel.area.y(tick.at) + 4 }}" text-anchor="end">\
{{ tick.label }}</text>
{% endfor -%}
{% for tick in panel.x_ticks -%}
<line x1="{{ panel.area.x(tick.at) }}" x2="{{ panel.area.x(tick.at) }}" \
y1="{{ panel.area.y(0) }}" y2="{{ panel.area.y(0) + 5 }}" stroke="#5b616b"/>
<text x="{{ panel.area.x(tick.at) }}" y="{{ panel.area.y(0) + 21 }}" text-anchor="middle">\
{{ tick.label }}</text>
{% if tick.note -%}
<text x="{{ panel.area.x(tick.at) }}" y="{{ panel.area.y(0) + 39 }}" text-anchor="middle" \
fill="#5b616b">{{ tick.note }}</text>
{% endif -%}
{% endfor -%}
<line x1="{{ panel.area.x(0) }}" x2="{{ panel.area.x(1) }}" y1="{{ panel.area.y(0) }}" \
y2="{{ panel.area.y(0) }}" stroke="#5b616b"/>
<text x="{{ panel.area.x(0.5) }}" y="{{ panel.area.y(0) + 64 }}" text-anchor="middle">\
{{ panel.x_label }}</text>
<text transform="translate({{ panel.area.left - 54 }} {{ panel.area.y(0.5) }}) rotate(-90)" \
text-anchor="middle">{{ panel.y_label }}</text>
{% for line in panel.lines -%}
<polyline points="{{ line.points }}" fill="none" stroke="{{ line.colour }}" \
stroke-width="{{ line.weight }}"{% if line.dashed %} stroke-dasharray="5 4"{% endif %} \
stroke-linejoin="round"/>
{% endfor -%}
{% for dot in panel.dots -%}
<circle cx="{{ dot.x }}" cy="{{ dot.y }}" r="4" stroke="{{ dot.colour }}" \
fill="{{ dot.colour if dot.filled else '#ffffff' }}" fill-opacity="0.65"/>
{% endfor -%}
{% for entry in panel.legend -%}
<rect x="{{ entry.x }}" y="{{ entry.y - 9 }}" width="14" height="4" rx="2" \
fill="{{ entry.colour }}"/>
<text x="{{ entry.x + 20 }}" y="{{ entry.y - 3 }}">{{ entry.label }}</text>
{% endfor -%}
{% endfor -%}
</svg>
"""


def draw(report: AuditReport) -> str:
    """Return the picture as SVG text, 960 by 500 pixels on white."""
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_TEMPLATE)
    panels = [_roc(report.membership), _exposure(report.canaries)]
    return template.render(width=_WIDTH, height=_HEIGHT, panels=panels)


def _roc(found: Members | None) -> _Content:
    area = _ROC
    diagonal = f"{area.x(0)},{area.y(0)} {area.x(1)},{area.y(1)}"
    lines: list[_Content] = [
        {"points": diagonal, "colour": _GREY, "weight": 1.5, "dashed": True},
    ]
    legend: list[_Content] = [{"label": "guessing", "colour": _GREY}]
    attacks = () if found is None else (("loss", found.loss), ("calibrated loss", found.calibrated))
    for (label, attack), colour in zip(attacks, (_BLUE, _ORANGE), strict=False):
        points = _log_curve(attack.roc, area)
        lines.append({"points": points, "colour": colour, "weight": 2.5, "dashed": False})
        legend.append({"label": f"{label}: AUC {attack.auc:.2f}", "colour": colour})
    for number, entry in enumerate(reversed(legend)):
        entry |= {"x": area.x(0.46), "y": area.y(0.05) - 20 * number}
    ticks = [{"at": _log_share(rate), "label": f"{100 * rate:g} %", "note": ""} for rate in _RATES]
    return {
        "area": area,
        "title": "Which records were trained on?",
        "subtitle": "no record was held out"
        if found is None
        else f"{found.members} records trained on, {found.nonmembers} held out",
        "x_label": "others taken for members",
        "y_label": "members found",
        "x_ticks": ticks,
        "y_ticks": ticks,
        "lines": lines,
        "dots": [],
        "legend": legend,
    }


def _log_share(rate: float) -> float:
    """Return where a rate stands on a logarithmic axis from 0.1 % to 100 %."""
    return 1 - math.log10(max(rate, _RATES[0])) / math.log10(_RATES[0])


def _log_curve(roc: tuple[tuple[float, float], ...], area: _Panel) -> str:
    """Return the points of a curve, with straight lines of rates bent as the axes bend them."""
    points: list[str] = []
    for (x0, y0), (x1, y1) in itertools.pairwise(roc):
        for step in range(12):
            share = step / 12
            x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
            points.append(f"{area.x(_log_share(x))},{area.y(_log_share(y))}")
    points.append(f"{area.x(1)},{area.y(1)}")
    return " ".join(dict.fromkeys(points))


def _exposure(found: Canaries) -> _Content:
    area = _EXPOSURE
    top = 1.05 * max(1.0, found.bits)
    lines: list[_Content] = []
    dots: list[_Content] = []
    x_ticks: list[_Content] = []
    for number, each in enumerate(found.by_repetition):
        middle = (number + 0.5) / len(found.by_repetition)
        note = f"{each.extracted} of {len(each.included)}"
        x_ticks.append({"at": middle, "label": str(each.repetitions), "note": note})
        for shift, values, colour in ((-0.07, each.left_out, _GREY), (0.07, each.included, _BLUE)):
            heights = [value / top for value in values]
            dots.extend(_dots(area, middle + shift, heights, colour))
            if heights:
                lines.append(_bar(area, middle + shift, median(heights), colour))
    return {
        "area": area,
        "title": "How exposed are planted secrets?",
        "subtitle": f"at {found.bits:.1f} bits a secret is known; bars are medians",
        "x_label": "copies of the record, and how many secrets were extracted",
        "y_label": "exposure, bits",
        "x_ticks": x_ticks,
        "y_ticks": [
            {"at": bits / top, "label": str(bits), "note": ""}
            for bits in range(0, math.floor(top) + 1, 5)
        ],
        "lines": lines,
        "dots": dots,
        "legend": [
            {"label": "planted", "colour": _BLUE, "x": area.x(0), "y": area.top - 10},
            {"label": "drawn, not planted", "colour": _GREY, "x": area.x(0.3), "y": area.top - 10},
        ],
    }


def _dots(area: _Panel, at: float, heights: Sequence[float], colour: str) -> Iterator[_Content]:
    for index, height in enumerate(heights):
        # Steps of the golden ratio keep dots of like height from covering each other.
        aside = (index * 0.618034) % 1 * 2 - 1
        yield {
            "x": area.x(at + 0.035 * aside),
            "y": area.y(height),
            "colour": colour,
            "filled": colour != _GREY,
        }


def _bar(area: _Panel, at: float, height: float, colour: str) -> _Content:
    points = f"{area.x(at - 0.055)},{area.y(height)} {area.x(at + 0.055)},{area.y(height)}"
    return {"points": points, "colour": colour, "weight": 3, "dashed": False}
