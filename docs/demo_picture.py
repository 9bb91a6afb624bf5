"""Run the demo and keep what it prints as docs/demo.svg: `python -m docs.demo_picture --model smollm2`."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI

from examples import demo

PICTURE = Path(__file__).with_name("demo.svg")


def main() -> int:
    # Not a terminal, so that a progress bar is printed once, when it has ended.
    demo.console = Console(record=True, width=110, force_terminal=False)
    status = asyncio.run(demo.main())
    # A viewer that shows the picture inside a page loads no fonts from elsewhere.
    template = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    svg = demo.console.export_svg(
        title=" ".join(["make demo", *("MODEL=" + name for name in sys.argv[2:3])]),
        theme=MONOKAI,
        code_format=template,
    )
    PICTURE.write_text(svg, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
