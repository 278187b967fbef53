"""The disclosures of a box as one HTML page to print and file: nothing is loaded from elsewhere.

Every value is escaped, and the page forbids scripts and all resources.
"""

import html
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fedpeft.audit_log import CANNOT_FIND
from fedpeft.data.records import count
from fedpeft_client.reports.disclosures import (
    JOINING,
    NOT_LISTED,
    Disclosure,
    Report,
    facts_of,
    sent_text,
    size_text,
)

_STYLE: Final = """
:root { color-scheme: light; }
body { font: 11pt/1.45 "DejaVu Sans", "Segoe UI", Arial, sans-serif; color: #1a1a1a;
  background: #fff; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; }
h2 { font-size: 1.1rem; margin: 1.8rem 0 .5rem; border-bottom: 1px solid #999; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .8rem 0; }
dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; margin: .4rem 0 1rem; }
th, td { border: 1px solid #bbb; padding: .3rem .5rem; text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
th { background: #f0f0f0; font-weight: 600; }
th, td:first-child { white-space: nowrap; }
td.number { text-align: right; white-space: nowrap; }
.verdict { border: 2px solid #2d6a2d; padding: .5rem .8rem; margin: 1rem 0; }
.verdict.bad { border-color: #a40000; }
.verdict strong { display: block; }
ul { margin: .2rem 0; padding-left: 1.2rem; }
code { font-family: "DejaVu Sans Mono", Consolas, monospace; font-size: .85em; }
.sign { margin-top: 3rem; display: grid; grid-template-columns: 1fr 1fr; gap: 3rem; }
.sign div { border-top: 1px solid #555; padding-top: .2rem; color: #555; }
@media print { body { margin: 0; max-width: none; font-size: 10pt; }
  section { break-inside: avoid; } h2 { break-after: avoid; } }
@page { size: A4; margin: 18mm; }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """Whose page it is: names, fingerprints, the time that it is about, and when it was made."""

    clinic: str
    federation: str
    server: str
    period: str
    made: str


def page(report: Report, heading: Heading) -> str:
    """Return the page."""
    body = [
        "<h1>What left this machine</h1>",
        _list(
            [
                ("Clinic", heading.clinic),
                ("Federation", heading.federation),
                ("Central site", f"fingerprint {heading.server}"),
                ("Time", heading.period),
                ("Made", heading.made),
            ]
        ),
        _verdict(report),
        _summary(report),
        *map(_section, report.disclosures),
        _ledger(report),
        f"<h2>Not in this list</h2><p>{_text(NOT_LISTED)}</p>",
        "<h2>How this was made</h2>"
        "<p>From the audit log of the machine, in which every message stands before it leaves. "
        f"The log ended with <code>{_text(report.end)}</code>. Limits: {_text(CANNOT_FIND)}.</p>",
        '<div class="sign"><div>Reviewed by</div><div>Date</div></div>',
    ]
    return _DOCUMENT.format(
        title=_text(f"What left {heading.clinic}"), style=_STYLE, body="\n".join(body)
    )


def _verdict(report: Report) -> str:
    if not report.doubts:
        return (
            '<div class="verdict"><strong>The list is complete.</strong>'
            "The audit log is whole, and agrees with the privacy ledger.</div>"
        )
    return (
        '<div class="verdict bad"><strong>The list may not be complete.</strong>'
        f"{_items(report.doubts)}</div>"
    )


def _summary(report: Report) -> str:
    rows = [(time[:16].replace("T", " "), "", JOINING, "") for time in report.joined]
    rows += [
        (one.day, one.run, count(one.messages, "message"), size_text(one.bytes))
        for one in report.disclosures
    ]
    if not rows:
        return "<h2>Days</h2><p>Nothing left in this time.</p>"
    lines = "".join(
        f"<tr><td>{_text(day)}</td><td><code>{_text(run)}</code></td><td>{_text(what)}</td>"
        f'<td class="number">{_text(size)}</td></tr>'
        for day, run, what, size in rows
    )
    total = (
        f'<tr><th colspan="3">All</th><td class="number">{_text(size_text(report.bytes))}</td></tr>'
    )
    return (
        "<h2>Days</h2><table><thead><tr><th>Day (UTC)</th><th>Run</th><th>What left</th>"
        f"<th>Size</th></tr></thead><tbody>{lines}{total}</tbody></table>"
    )


def _section(one: Disclosure) -> str:
    sent = [sent_text(words, sent) for words, sent in sorted(one.sent.items())]
    return (
        f"<section><h2>{_text(one.day)}, run {_text(one.run)}</h2>"
        f"<p>What left:</p>{_items(sent or ['nothing'])}"
        f"<p>Beside that:</p>{_items(facts_of(one))}</section>"
    )


def _ledger(report: Report) -> str:
    shown = _list(report.ledger) if report.ledger else "<p>Nothing was charged yet.</p>"
    return f"<section><h2>Privacy ledger, all in all</h2>{shown}</section>"


def _list(pairs: Iterable[tuple[str, str]]) -> str:
    inside = "".join(f"<dt>{_text(name)}</dt><dd>{_text(text)}</dd>" for name, text in pairs)
    return f"<dl>{inside}</dl>"


def _items(sentences: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(one)}</li>" for one in sentences) + "</ul>"


def _text(text: str) -> str:
    return html.escape(text, quote=True)


_DOCUMENT: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
