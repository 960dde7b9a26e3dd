"""The examples of docs/migrating.md run, in order, each section in a fresh namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "migrating.md").read_text()
SECTIONS = {s.splitlines()[0]: re.findall(r"```python\n(.*?)```", s, re.S) for s in TEXT.split("\n## ")[1:]}


@pytest.mark.parametrize("section", [name for name, examples in SECTIONS.items() if examples])
def test_examples(section: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    names = {"torch": torch, "model": model, "x": torch.randn(4, 6), "y": torch.arange(4) % 3}
    names["criterion"] = nn.CrossEntropyLoss()
    before = [p.detach().clone().float() for p in model.parameters()]
    steps = False
    for code in SECTIONS[section]:
        assert len(code.splitlines()) <= 3
        steps = steps or ".step(" in code
        exec(compile(code, f"docs/migrating.md: {section}", "exec"), names)
    assert all(p.isfinite().all() for p in model.parameters())
    if steps:
        assert any(not torch.equal(a, p.detach().float()) for a, p in zip(before, model.parameters(), strict=True))


def test_every_origin_has_examples() -> None:
    assert sum(bool(examples) for examples in SECTIONS.values()) == 4
