"""Sections of a report: a table and its curves, in the terminal or on one HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table

from . import checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Section(NamedTuple):
    """One table of a report.

    Attributes:
        header: titles of the columns; the first column names the rows.
        details: {title: text}, on the page only.
        note: a sentence below the table.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    figure: Figure
    details: dict[str, str]
    note: str = ""

    def print(self, console: Console) -> None:
        """Prints the table."""
        view = Table(title=self.title)
        for i, name in enumerate(self.header):
            view.add_column(name, justify="right" if i else "left")
        for row in self.rows:
            view.add_row(*row)
        console.print(view)
        if self.note:
            console.print(self.note, highlight=False)

    def save_png(self, path: Path) -> None:
        """Writes the curves as a PNG file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write(path, lambda file: self.figure.savefig(file, format="png", dpi=120))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, independent of pyplot and of a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid #ccc; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto; }
"""


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Writes the sections as one HTML file that needs no other: curves are SVG images inside it."""
    body = "\n".join(_section(section) for section in sections)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write(path, lambda file: file.write(page.encode()))


def _section(section: Section) -> str:
    def cells(values: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    svg = io.BytesIO()
    section.figure.savefig(svg, format="svg", metadata={"Date": None})
    image = base64.b64encode(svg.getvalue()).decode()
    lines = [
        f"<h2>{html.escape(section.title)}</h2>",
        f"<table>\n<thead>{cells(section.header, 'th')}</thead>\n<tbody>",
        *(cells(row, "td") for row in section.rows),
        "</tbody>\n</table>",
        *([f"<p>{html.escape(section.note)}</p>"] if section.note else []),
        f'<img alt="Curves of {html.escape(section.title)}" src="data:image/svg+xml;base64,{image}">',
    ]
    for title, text in section.details.items():
        lines.append(f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>")
    return "\n".join(lines)
