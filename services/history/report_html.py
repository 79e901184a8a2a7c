"""A report as one HTML file that needs nothing else: style and pictures are in it, all text is escaped, no script runs."""

from __future__ import annotations

from base64 import b64encode
from datetime import datetime
from html import escape
from typing import TYPE_CHECKING

from kvplane.services.history.report import headline, readable
from kvplane.services.history.report_plot import DARK, LIGHT, svg

if TYPE_CHECKING:
    from kvplane.services.history.report import Chart, Report, Section

_STYLE = """
:root { color-scheme: light dark; --back: #f6f8fa; --card: #ffffff; --text: #24292f; --dim: #59636e; --line: #d0d7de; }
@media (prefers-color-scheme: dark) {
  :root { --back: #0d1117; --card: #161b22; --text: #e6edf3; --dim: #9198a1; --line: #3d444d; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 24px; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 2px; }
p { margin: 0 0 10px; color: var(--dim); font-size: 13px; }
dl { display: flex; flex-wrap: wrap; gap: 12px; margin: 0 0 16px; }
dl div { flex: 1 0 auto; max-width: 100%; }
dl div, section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; }
dt { color: var(--dim); font-size: 12px; }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.charts { display: grid; gap: 16px; margin-bottom: 16px; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr)); }
.charts img { width: 100%; height: auto; display: block; }
section { margin-bottom: 16px; min-width: 0; }
.charts section { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 20px 4px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--dim); font-weight: 600; white-space: nowrap; }
td { overflow-wrap: anywhere; min-width: 7em; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; min-width: 0; }
.time { white-space: nowrap; }
footer { color: var(--dim); font-size: 13px; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(report: Report, made: datetime) -> str:
    """The file's text. `made` is when, in UTC."""
    title = f"Fleet {readable('', report.fleet)}"
    cards = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in headline(report))
    charts = "".join(_chart(report, chart) for chart in report.charts)
    lost = ", a dashed line is a lost node" if report.lost else ""
    tables = "".join(_section(section) for section in report.sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main><h1>{escape(title)}</h1>\n"
        f'<dl>{cards}</dl>\n<div class="charts">{charts}</div>\n{tables}\n'
        f"<footer>Made by kvplane report on {escape(readable('', made))} UTC. Times are UTC{lost}.</footer></main>"
        "</body></html>\n"
    )


def _chart(report: Report, chart: Chart) -> str:
    dark, light = (_data(svg(report, chart, theme)) for theme in (DARK, LIGHT))
    return (
        f'<section><h2>{escape(chart.title)}</h2><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(chart.title)}"></picture></section>\n'
    )


def _data(picture: bytes) -> str:
    return f"data:image/svg+xml;base64,{b64encode(picture).decode()}"


def _section(section: Section) -> str:
    about = f"<section><h2>{escape(section.title)}</h2>"
    if not section.rows:
        return f"{about}<p>None.</p></section>\n"
    kinds = [_kind(number, row) for number, row in zip(section.numbers, section.rows[0], strict=True)]
    head = "".join(f"<th{kind}>{escape(column)}</th>" for kind, column in zip(kinds, section.columns, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{kind}>{escape(readable(column, value))}</td>"
            for kind, column, value in zip(kinds, section.columns, row, strict=True)
        )
        + "</tr>"
        for row in section.rows
    )
    more = f" The first {len(section.rows)} of {section.total:,}." if section.total > len(section.rows) else ""
    meaning = section.meaning[:1].upper() + section.meaning[1:]
    return (
        f'{about}<p>{escape(meaning)}.{more}</p><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>\n"
    )


def _kind(number: bool, value: object) -> str:  # noqa: FBT001
    """The class of a column, by one of its values."""
    return ' class="number"' if number else ' class="time"' if isinstance(value, datetime) else ""
