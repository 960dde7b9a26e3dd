"""The pages: every Python block runs, in order; tables and pictures agree with benchmarks/results."""

from __future__ import annotations

import copy
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measured
import pictures
import pytest
import report
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from fasttricks.nn import BatchNormReLU2d

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


# pages whose sections each start from the names that the page describes
BY_SECTION = ("docs/frameworks.md", "docs/migrating.md")


def examples() -> list[Any]:
    """(page, Python blocks that share one namespace) for each section of BY_SECTION, and for each other page."""
    found = []
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        text = page.read_text()
        for part in re.split(r"^## ", text, flags=re.MULTILINE) if name in BY_SECTION else [text]:
            if blocks := re.findall(r"^```python\n(.*?)^```", part, re.DOTALL | re.MULTILINE):
                found.append(pytest.param(name, blocks, id=f"{name}: {part.splitlines()[0].lstrip('# ')}"))
    return found


def names_of(page: str) -> dict[str, Any]:
    """The names that the examples of a page may use."""
    names: dict[str, Any] = {"torch": torch, "nn": nn, "criterion": nn.CrossEntropyLoss(), "__name__": "page"}
    if page == "docs/migrating.md":
        model: nn.Module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        names |= {"model": model, "x": torch.randn(4, 6), "y": torch.arange(4) % 3}
    elif page == "docs/frameworks.md":
        bn = BatchNormReLU2d(8)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), bn, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
        batch = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch), batch_size=4)
        names |= {"model": model, "loader": loader, "images": batch[0], "labels": batch[1]}
    return names


@pytest.fixture
def _torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of a single process started by torchrun."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("_torchrun")
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.parametrize(("page", "blocks"), examples())
def test_examples_run(page: str, blocks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = names_of(page)
    monkeypatch.chdir(tmp_path)
    model = names.get("model")
    before = copy.deepcopy(model.state_dict()) if model is not None else {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    if model is not None:
        assert all(t.isfinite().all() for t in model.state_dict().values() if t.is_floating_point())
        if any(".step(optimizer)" in block or "optimizer.step()" in block for block in blocks):
            after = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in model.state_dict().values()]
            assert any(not torch.equal(a, b.to(a.dtype)) for a, b in zip(before.values(), after, strict=True))


def test_pages_with_examples_are_found() -> None:
    found = {case.values[0] for case in examples()}
    assert {
        "README.md",
        "docs/quickstart.md",
        "docs/migrating.md",
        "docs/frameworks.md",
        "docs/ops/bn_relu.md",
    } <= found


def test_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {t for page in PAGES for t in re.findall(r"(?:^ {4}|^|`)make ([\w-]+)", page.read_text(), re.MULTILINE)}
    assert {"train", "test"} <= targets
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)] == []


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_tables_agree_with_the_results(page: Path) -> None:
    """If it fails, run python benchmarks/report.py."""
    text = page.read_text()
    assert report.rendered(text) == text
    assert "<!-- /" in text


@pytest.mark.parametrize("name", pictures.measured_pictures())
def test_pictures_agree_with_the_results(name: str) -> None:
    """If it fails, run python benchmarks/report.py."""
    with Image.open(pictures.ASSETS / name) as picture:
        assert picture.text["Source"] == measured.digest(pictures.PICTURES[name].result)


def test_a_changed_result_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.listdir(measured.RESULTS):
        if name.endswith(".json"):
            (tmp_path / name).write_text((measured.RESULTS / name).read_text())
    text = (tmp_path / "cpu.json").read_text()
    (tmp_path / "cpu.json").write_text(re.sub(r'"eager": [\d.]+', '"eager": 7.77', text))
    readme = (ROOT / "README.md").read_text()
    before = measured.digest("cpu.json")
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    assert "7.77x" in report.rendered(readme)
    assert measured.digest("cpu.json") != before
