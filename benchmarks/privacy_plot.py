"""Draw the figures of ``privacy_utility.py`` as SVG: what is kept, and what an attacker finds.

python benchmarks/privacy_utility.py --epsilon 8 none 16 4 2 1 | tee runs.jsonl
python benchmarks/privacy_plot.py runs.jsonl docs/privacy-utility.svg
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, SIDE, TOP, BASE = 360, 260, 70, 60, 60
BLUE, ORANGE, GREY = "#1f5fa8", "#c8560d", "#8a8f98"


def main() -> None:
    """Read the lines of runs and write the picture."""
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text("utf-8").splitlines()]
    runs = [line for line in lines if "epsilon" in line]
    plain = next(run for run in runs if run["epsilon"] == "none")
    private = sorted(
        (run for run in runs if run is not plain), key=lambda run: float(run["epsilon"])
    )
    gained = plain["base_loss"] - plain["valid_loss"]

    def kept(run: dict[str, Any]) -> float:
        return (run["base_loss"] - run["valid_loss"]) / gained

    def auc(run: dict[str, Any]) -> float:
        return max(run["auc"].values())

    panels = [
        *_panel(0, "improvement of the loss that is kept", (0, 1), 0.6, private, kept, BLUE),
        *_panel(1, "AUC of the better membership attack", (0.4, 1), 0.55, private, auc, ORANGE),
    ]
    size = f"{2 * (WIDTH + SIDE) + 20} {TOP + HEIGHT + BASE}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" fill="#23272e" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">'
        '<rect width="100%" height="100%" fill="#ffffff"/>'
    )
    Path(sys.argv[2]).write_text("\n".join([head, *panels, "</svg>"]) + "\n", "utf-8")


def _panel(
    place: int,
    title: str,
    limits: tuple[float, float],
    wanted: float,
    runs: list[dict[str, Any]],
    value: Callable[[dict[str, Any]], float],
    colour: str,
) -> Iterator[str]:
    left = SIDE + place * (WIDTH + SIDE)
    low, high = limits
    first, last = (math.log2(float(runs[at]["epsilon"])) for at in (0, -1))

    def x(run: dict[str, Any]) -> float:
        share = (math.log2(float(run["epsilon"])) - first) / max(1e-9, last - first)
        return round(left + 15 + share * (WIDTH - 30), 1)

    def y(number: float) -> float:
        return round(TOP + HEIGHT * (high - number) / (high - low), 1)

    yield f'<text x="{left}" y="32" font-size="16" font-weight="bold">{title}</text>'
    for step in range(6):
        number = low + step * (high - low) / 5
        yield (
            f'<line x1="{left}" x2="{left + WIDTH}" y1="{y(number)}" y2="{y(number)}" '
            f'stroke="#e6e8eb"/><text x="{left - 8}" y="{y(number) + 4}" '
            f'text-anchor="end">{number:.2f}</text>'
        )
    yield (
        f'<line x1="{left}" x2="{left + WIDTH}" y1="{y(wanted)}" y2="{y(wanted)}" '
        f'stroke="{GREY}" stroke-dasharray="5 4"/>'
    )
    points = [(x(run), y(value(run))) for run in runs]
    path = " ".join(f"{across},{down}" for across, down in points)
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
    for run, (across, down) in zip(runs, points, strict=True):
        yield (
            f'<circle cx="{across}" cy="{down}" r="4" fill="{colour}"/>'
            f'<text x="{across}" y="{TOP + HEIGHT + 20}" text-anchor="middle">'
            f"{run['epsilon']}</text>"
        )
    middle = left + WIDTH / 2
    yield f'<text x="{middle}" y="{TOP + HEIGHT + 44}" text-anchor="middle">epsilon</text>'


if __name__ == "__main__":
    main()
