"""Every public name has a docstring with an example, whose output is as shown."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fasttricks
import fasttricks.models
import fasttricks.patch

MODULES: tuple[ModuleType, ...] = (fasttricks, fasttricks.nn, fasttricks.optim, fasttricks.models, fasttricks.patch)


def public() -> dict[str, Any]:
    """The public functions and classes by name, each once."""
    found = {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in MODULES
        for name in module.__all__
        if not inspect.ismodule(getattr(module, name))
    }
    objects: dict[int, str] = {}
    for name, value in found.items():
        objects.setdefault(id(value), name)
    return {name: found[name] for name in objects.values()}


PUBLIC = public()


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_print_what_they_say(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name])
    assert text, f"{name} has no docstring"
    names = {"torch": torch, "nn": nn, "fasttricks": fasttricks}
    test = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    assert test.examples, f"{name} has no example"
    output: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(test, out=output.append)
    assert failed == 0, "".join(output)


def test_the_reference_has_every_public_name() -> None:
    pages = (Path(__file__).resolve().parent.parent / "docs" / "api").glob("*.md")
    words = set(re.findall(r"\w+", " ".join(page.read_text() for page in pages)))
    assert [name for name in PUBLIC if name.rpartition(".")[2] not in words] == []


def test_public_names_are_found() -> None:
    assert {"fasttricks.bn_relu", "fasttricks.nn.BatchNormReLU2d", "fasttricks.optim.FusedSGD"} <= PUBLIC.keys()
    assert inspect.isfunction(PUBLIC["fasttricks.models.resnet50"])
