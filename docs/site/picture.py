"""The picture of the demonstration's output: python -m docs.site.picture docs/demo.svg.

It is made of a real run, and shows some of its steps. Nothing is loaded from elsewhere: where the picture is shown, its text
takes the reader's own font.
"""

from __future__ import annotations

import re
import sys
from io import StringIO
from pathlib import Path

import anyio
from rich.console import Console
from rich.text import Text

from kvplane.services.demo.run import EVERY_STEP_HELD, Demo, Options, Result, shown
from kvplane.services.process import logs

WIDTH = 98
"""Columns: at the width of a page, letters are as large as its text."""
STEPS = (
    "one URL",
    "exact hit",
    "longest prefix",
    "traffic, with a node and both routers killed",
    "kill -9 of server, routers and coordinator",
    "history: time travel",
    "better than round-robin",
)
"""What is shown of the demonstration; none of these prints a path."""
LEFT_OUT = "       ..."

_SVG = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img" aria-label="Output of kvplane demo">
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px;
}}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: ui-sans-serif, Helvetica, Arial, sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def picture(result: Result) -> str:
    """The SVG of a run."""
    console = Console(
        width=WIDTH, record=True, file=StringIO(), force_terminal=True, color_system="truecolor", highlight=False
    )
    console.print("[bold]$ kvplane demo[/]")
    before = True
    for step in result.steps:
        if step.step in STEPS:
            console.print(shown(step))
        elif before:
            console.print(Text(LEFT_OUT, style="dim"))
        before = step.step in STEPS
    console.print(f"[green]{EVERY_STEP_HELD}[/]")
    made = console.export_svg(title="kvplane demo", code_format=_SVG, unique_id="demo")
    # Each line has a clip path of its own, which is a third of the bytes and hides nothing.
    made = re.sub(r' clip-path="url\(#demo-line-\d+\)"', "", made)
    made = re.sub(r'<clipPath id="demo-line-\d+">.*?</clipPath>\n?', "", made, flags=re.DOTALL)
    return "".join(f"{line.strip()}\n" for line in made.splitlines() if line.strip())


def main(path: Path) -> None:
    """Run the demonstration and write its picture. Ends with a sentence when a step did not hold."""
    logs.configure("error")
    demo = Demo(Options())
    result = anyio.run(demo.run, backend_options={"use_uvloop": True})
    missing = set(STEPS) - {step.step for step in result.steps}
    if missing or not result.held:
        sys.exit(f"no picture is written: {', '.join(sorted(missing)) or 'a step'} did not hold")
    path.write_text(picture(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
