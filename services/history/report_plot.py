"""The curves of a report as pictures: one PNG of all, or one SVG each, in light or dark."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from datetime import datetime, timedelta
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

from kvplane.services.history.report import OTHERS, readable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes

    from kvplane.services.history.report import Chart, Report

COLORS = ("#4c8fd6", "#e8743b", "#2fa572", "#c9a227", "#a06cd5", "#d6568c", "#3fb8c4", "#8d6e55")
_OTHERS_COLOR = "#8a8f98"
_LOST_COLOR = "#d64545"
_NAME_CHARACTERS = 24
_MARKED_POINTS = 20
"""Lines of no more points have a dot at each."""
_GAP_STEPS = 5
"""After so many steps without a value a line is broken."""
_LOG_RATIO = 10
"""Times whose largest is so many times the smallest are drawn on a logarithmic scale."""


class Theme(NamedTuple):
    """Colors of what is no data."""

    back: str
    text: str
    line: str


LIGHT = Theme("#ffffff", "#24292f", "#d0d7de")
DARK = Theme("#161b22", "#e6edf3", "#3d444d")


class _Line(NamedTuple):
    """One line of a chart: values by step."""

    name: str
    color: str
    rows: dict[datetime, list[Any]]


def png(report: Report) -> bytes:
    """All curves in one picture."""
    with _drawing():
        from matplotlib.figure import Figure  # noqa: PLC0415 - seldom asked for and slow to load

        charts = report.charts
        figure = Figure(figsize=(12, 3.1 * len(charts) + 0.5), layout="constrained", facecolor=LIGHT.back)
        seen = report.overview
        figure.suptitle(
            f"fleet {readable('', report.fleet)}: {readable('', seen.first)} to {readable('', seen.last)} UTC",
            color=LIGHT.text, fontsize=12, ha="left", x=0.01,
        )  # fmt: skip
        for axes, chart in zip(figure.subplots(len(charts), 1, squeeze=False)[:, 0], charts, strict=True):
            _draw(axes, report, chart, LIGHT)
            axes.set_title(chart.title, loc="left", color=LIGHT.text, fontsize=11)
        sink = BytesIO()
        figure.savefig(sink, format="png", dpi=110)
    return sink.getvalue()


def svg(report: Report, chart: Chart, theme: Theme) -> bytes:
    """One curve."""
    with _drawing():
        from matplotlib.figure import Figure  # noqa: PLC0415 - the same

        figure = Figure(figsize=(7.2, 3.2), layout="constrained", facecolor=theme.back)
        _draw(figure.subplots(), report, chart, theme)
        sink = BytesIO()
        figure.savefig(sink, format="svg", metadata={"Date": None})
    return sink.getvalue()


@contextmanager
def _drawing() -> Iterator[None]:
    """Names may hold what is a formula or has no glyph: both are drawn as they can be."""
    from matplotlib import rc_context  # noqa: PLC0415 - the same

    with rc_context({"text.parse_math": False, "svg.hashsalt": "kvplane"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def _draw(axes: Axes, report: Report, chart: Chart, theme: Theme) -> None:
    lines = _lines(chart)
    steps = _steps(chart)
    _DRAWN[chart.name](axes, chart, lines, steps)
    wide = timedelta(seconds=chart.step)
    begin, end = report.overview.first, max(report.overview.last, report.overview.first + wide)
    if steps:
        begin, end = min(begin, steps[0]), max(end, steps[-1] + wide)
    axes.set_xlim(begin, end)  # type: ignore[arg-type]
    for time in report.lost:
        axes.axvline(time, color=_LOST_COLOR, linestyle="--", linewidth=1)  # type: ignore[arg-type]
    if not chart.rows:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color=theme.text)
    _dress(axes, theme)


def _dress(axes: Axes, theme: Theme) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter  # noqa: PLC0415 - the same
    from matplotlib.ticker import EngFormatter  # noqa: PLC0415 - the same

    locator = AutoDateLocator(minticks=3, maxticks=8)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    if axes.get_yscale() == "linear" and axes.get_ylim()[1] > 1000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_facecolor(theme.back)
    axes.grid(axis="y", color=theme.line, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.text, labelsize=9)
    axes.xaxis.get_offset_text().set_color(theme.text)
    for side, spine in axes.spines.items():
        spine.set_visible(side in {"left", "bottom"})
        spine.set_color(theme.line)
    legend = axes.get_legend()
    if legend is not None:
        for text in legend.get_texts():
            text.set_color(theme.text)


def _lines(chart: Chart) -> list[_Line]:
    """The lines of a chart, those with most rows first, the others last."""
    rows: dict[str | None, dict[datetime, list[Any]]] = {}
    for begins, line, *values in chart.rows:
        rows.setdefault(line, {})[begins] = values
    names = sorted((name for name in rows if name is not None), key=lambda name: (-len(rows[name]), name))
    made = [_Line(_short(name), COLORS[place % len(COLORS)], rows[name]) for place, name in enumerate(names)]
    return made + ([_Line(OTHERS, _OTHERS_COLOR, rows[None])] if None in rows else [])


def _short(name: str) -> str:
    name = readable("", name)
    return name if len(name) <= _NAME_CHARACTERS else name[: _NAME_CHARACTERS - 1] + "…"


def _steps(chart: Chart) -> list[datetime]:
    return sorted({row[0] for row in chart.rows})


def _legend(axes: Axes, drawn: list[tuple[Any, str]]) -> None:
    if drawn:
        # Given explicitly: a name that begins with an underscore would be left out.
        axes.legend(
            [handle for handle, _ in drawn], [name for _, name in drawn], loc="center left", bbox_to_anchor=(1.0, 0.5),
            fontsize=9, frameon=False,
        )  # fmt: skip


def _trace(axes: Axes, chart: Chart, points: list[tuple[datetime, Any]], color: str, style: str = "-") -> Any:  # noqa: ANN401
    """A line through values by step, broken where nothing happened for long; what is alone is a dot."""
    times: list[Any] = []
    values: list[float] = []
    dots = []
    for place, (step, value) in enumerate(points):
        near = [
            abs((other[0] - step).total_seconds()) <= _GAP_STEPS * chart.step
            for other in (*points[max(0, place - 1) : place], *points[place + 1 : place + 2])
        ]
        if place and not near[0]:
            times.append(step)
            values.append(float("nan"))
        if len(points) <= _MARKED_POINTS or not any(near):
            dots.append(len(times))
        times.append(step + timedelta(seconds=chart.step / 2))
        values.append(value)
    (handle,) = axes.plot(times, values, style, color=color, marker="o", markersize=3, markevery=dots)
    return handle


def _rates(axes: Axes, chart: Chart, lines: list[_Line], _: list[datetime]) -> None:
    from matplotlib.ticker import PercentFormatter  # noqa: PLC0415 - the same

    drawn = []
    for line in lines:
        points = [(step, values[0]) for step, values in sorted(line.rows.items()) if values[0] is not None]
        drawn.append((_trace(axes, chart, points, line.color), line.name))
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(axes, drawn)


def _times(axes: Axes, chart: Chart, lines: list[_Line], _: list[datetime]) -> None:
    from matplotlib.ticker import LogLocator  # noqa: PLC0415 - the same

    drawn = []
    for line in lines:
        for place, style in ((1, ":"), (0, "-")):
            points = [(step, values[place]) for step, values in sorted(line.rows.items())]
            handle = _trace(axes, chart, points, line.color, style)
        drawn.append((handle, line.name))
    every = [value for *_, low, high in chart.rows for value in (low, high)]
    if every and 0 < _LOG_RATIO * min(every) < max(every):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda _value, _place: "")
    else:
        axes.set_ylim(bottom=0)
    _legend(axes, drawn)


def _counts(axes: Axes, chart: Chart, lines: list[_Line], steps: list[datetime]) -> None:
    below = [0] * len(steps)
    drawn = []
    for line in lines:
        values = [line.rows.get(step, [0])[0] for step in steps]
        drawn.append((_bars(axes, chart, steps, values, line.color, below=below), line.name))
        below = [one + other for one, other in zip(below, values, strict=True)]
    _legend(axes, drawn)


def _pairs(axes: Axes, chart: Chart, lines: list[_Line], steps: list[datetime]) -> None:
    """Two values a step, side by side."""
    if not lines:
        return
    rows, drawn = lines[0].rows, []
    for place, name in enumerate(chart.columns):
        values = [rows[step][place] or 0 for step in steps]
        drawn.append((_bars(axes, chart, steps, values, COLORS[place], place=place, of=len(chart.columns)), name))
    _legend(axes, drawn)


def _bars(
    axes: Axes, chart: Chart, steps: list[datetime], values: list[int], color: str, *, below: list[int] | None = None,
    place: int = 0, of: int = 1,
) -> Any:  # noqa: ANN401 - what a legend takes  # fmt: skip
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - the same

    width = timedelta(seconds=chart.step * 0.9 / of)
    begins: list[Any] = [step + timedelta(seconds=chart.step * 0.05) + place * width for step in steps]
    wide: Any = width
    axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return axes.bar(begins, values, width=wide, bottom=below, align="edge", color=color, linewidth=0)


_DRAWN = {
    "hit_rate": _rates,
    "ttft": _times,
    "requests": _counts,
    "blocks": _pairs,
    "sessions": _pairs,
    "predicted": _pairs,
}
