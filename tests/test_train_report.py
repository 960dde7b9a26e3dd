"""fasttricks report: groups of seeds, curves, and the page, from logs that are written here."""

from __future__ import annotations

import base64
import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("torchvision")
from PIL import Image
from rich.console import Console

from fasttricks.train import ablation, cli, paper, report
from fasttricks.train.page import write_page
from fasttricks.train.recipe import Recipe


def write_run(out: Path, top1: list[float], **fields: Any) -> Path:
    """A run with these top-1 by epoch."""
    out.mkdir(parents=True)
    (out / "recipe.json").write_text(json.dumps(Recipe(epochs=len(top1), **fields).model_dump()))
    with (out / "log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, report.COLUMNS)
        writer.writeheader()
        for epoch, value in enumerate(top1, 1):
            row = dict.fromkeys(report.COLUMNS, 1.0)
            writer.writerow({**row, "epoch": epoch, "val_top1": value, "val_top5": 100, "train_seconds": 2.5})
    return out


def test_spread() -> None:
    assert report.spread([1.0, 2.0, 4.0]) == "2.33 ± 1.53"
    assert report.spread([1.0]) == "1.00"


def test_seeds_are_one_column(tmp_path: Path) -> None:
    """Runs of other recipes are not, nor is the same run twice."""
    runs = [
        write_run(tmp_path / "a0", [10, 50], seed=0),
        write_run(tmp_path / "b", [20, 80], seed=0, mixup=0.2),
        write_run(tmp_path / "a2", [30, 60], seed=2),
    ]
    found = report.section(report.read_runs(runs))
    assert found.header == ["", "a0, a2", "b"]
    assert report.section(report.read_runs([runs[0], runs[0]])).header == ["", "a0", "a0"]
    table = {row[0]: row[1:] for row in found.rows}
    assert table["top-1, last epoch"] == ["55.00 ± 7.07", "80.00"]
    assert table["seeds"] == ["0, 2", "0"]
    assert table["tricks"] == ["none", "mixup"]
    assert table["training seconds"] == ["5.0 ± 0.0", "5.0"]
    assert list(found.figure.axes[1].lines[0].get_ydata()) == [20, 55]


def test_names(tmp_path: Path) -> None:
    """Parents are named where folders have the same name; long names leave space for the curves."""
    runs = [write_run(tmp_path / name / "seed-0", [10, 50], mixup=0.1 * i) for i, name in enumerate("ab")]
    assert report.section(report.read_runs(runs)).header == ["", "a/seed-0", "b/seed-0"]
    runs = [write_run(tmp_path / (letter * 200), [10, 50], mixup=0.1 * i) for i, letter in enumerate("cd")]
    found = report.section(report.read_runs(runs))
    found.save_png(tmp_path / "curves.png")  # matplotlib would warn
    assert found.header[1:] == ["c" * 200, "d" * 200]
    assert found.figure.axes[2].get_legend().get_texts()[0].get_text() == "c" * 24 + "..." + "c" * 13


class Page(HTMLParser):
    """The tables, images and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_the_page_needs_no_other_file(tmp_path: Path, capsys: Any) -> None:
    """Tables as printed, names escaped, curves inside."""
    runs = [write_run(tmp_path / '<one> & "two"', [10, 50], seed=0), write_run(tmp_path / "b", [20, 80], mixup=0.2)]
    files = ["--png", str(tmp_path / "new" / "curves.png"), "--html", str(tmp_path / "new" / "report.html")]
    assert cli.main(["report", *map(str, runs), *files]) == 0
    assert Image.open(tmp_path / "new" / "curves.png").size[0] > 500
    page = Page((tmp_path / "new" / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert '<one> & "two"' in page.cells
    assert "80.00" in page.cells
    assert len(page.addresses) == 1
    kind, _, data = page.addresses[0].partition(",")
    assert kind == "data:image/svg+xml;base64"
    assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")
    printed = capsys.readouterr().out
    assert "top-1, last epoch" in printed
    assert f"page: {tmp_path / 'new' / 'report.html'}" in printed


def test_an_ablation_has_a_page(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the mean, the spread and the change of each row, and the command."""
    monkeypatch.chdir(tmp_path)
    out = Path("ablation")
    description = {
        "table": "tweaks",
        "seeds": 2,
        "model": "resnet18",
        "teacher": None,
        "options": ["--data", "my data"],
    }
    for i, job in enumerate(ablation.plan(out, **description)):
        write_run(job.out, [10, 50 + i], seed=job.seed, model=job.arm)
    (out / "ablation.json").write_text(json.dumps(description))
    assert cli.main(["report", str(out)]) == 0
    assert "page:" not in capsys.readouterr().out
    assert not Path("report.html").exists()
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.cells[8:16] == ["resnet18a", "50.50 ± 0.71", "", "", "50.50 ± 0.71", "100.00 ± 0.00", "1", "2"]
    assert page.cells[16:19] == ["resnet18b", "52.50 ± 0.71", "+2.00"]
    assert "fasttricks ablate tweaks --out ablation --seeds 2 --model resnet18 --data &#x27;my data&#x27;" in text
    with (out / "table.csv").open(newline="") as file:
        assert [row["top1"] for row in csv.DictReader(file)] == [f"{50 + i}.0" for i in range(8)]


@pytest.mark.parametrize("table", ablation.TABLES)
def test_figures_of_the_paper_stand_beside_the_rows(table: str, tmp_path: Path) -> None:
    """Each with its source, in a row of that name; other cells are empty, and a note says why."""
    description = {"table": table, "seeds": 1, "model": "resnet50d", "teacher": "t.pt", "options": []}
    for job in ablation.plan(tmp_path, **description):
        write_run(job.out, [10, 50], seed=job.seed, model=job.arm)
    (tmp_path / "ablation.json").write_text(json.dumps(description))
    found = ablation.section(tmp_path)
    column = found.header.index("paper")
    shown = {row[0]: row[column] for row in found.rows}
    of_table = {row: figures for (name, row), figures in paper.FIGURES.items() if name == table}
    assert of_table.keys() <= shown.keys()
    for row, text in shown.items():
        for figure in of_table.get(row, []):
            assert f"{figure.text} ({figure.source})" in text
        assert bool(text) == (row in of_table)
    console = Console(record=True, width=200)
    found.print(console)
    write_page(tmp_path / "page.html", "title", [found])
    for text in (console.export_text(), (tmp_path / "page.html").read_text()):
        assert "arXiv:1812.01187" in text
        assert all(figure.source in text for figures in of_table.values() for figure in figures)


def test_runs_that_cannot_be_read(tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "run", [10, 50])
    assert cli.main(["report", str(tmp_path / "none")]) == 1
    assert "no such file; give the --out folder of a training run" in capsys.readouterr().err
    (run / "recipe.json").write_text("{")
    assert cli.main(["report", str(run)]) == 1
    assert "recipe.json" in capsys.readouterr().err
    (run / "log.csv").write_text("a,b\n1,2\n")
    assert cli.main(["report", str(run)]) == 1
    assert "is not a log of this trainer; its columns are ['a', 'b']" in capsys.readouterr().err
    (run / "log.csv").write_text(",".join(report.COLUMNS) + "\n")
    assert cli.main(["report", str(run)]) == 1
    assert "no epoch has ended yet" in capsys.readouterr().err
    again = write_run(tmp_path / "again", [10, 50])
    assert cli.main(["report", str(again), "--png", "/dev/null/curves.png"]) == 1
    assert "/dev/null" in capsys.readouterr().err
