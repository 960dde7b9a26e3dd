"""Autotuning: the default or the fastest tiles, cached on disk; every choice gives the same results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, relative_error, triton_device

import fasttricks

DEVICE = triton_device()

from fasttricks.kernels import tune  # noqa: E402


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[float]]:
    """Autotuning with a cache in tmp_path; the list holds the milliseconds that the next runs seem to take."""
    taken: list[float] = []

    def measured(run: Callable[[], Any]) -> float:
        run()
        return taken.pop(0)

    monkeypatch.setenv("FASTTRICKS_AUTOTUNE", "1")
    monkeypatch.setenv("FASTTRICKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "measured", measured)
    forget()
    yield taken
    forget()


def forget() -> None:
    """Drops what the process has cached, as a new process would start."""
    tune._path.cache_clear()
    tune._kept.cache_clear()


def choose(shapes: str = "a", choices: tuple[str, ...] = ("first", "second", "third")) -> tuple[str, list[str]]:
    """(the choice, the choices that were run to find it)."""
    ran: list[str] = []
    return tune.fastest("kernel", lambda: shapes, DEVICE, choices, ran.append), ran


def file(folder: Path) -> Path:
    (only,) = (folder / "cache").iterdir()
    return only


def test_the_default_costs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FASTTRICKS_AUTOTUNE", raising=False)
    monkeypatch.setenv("FASTTRICKS_CACHE", str(tmp_path / "cache"))
    assert choose() == ("first", [])
    assert not (tmp_path / "cache").exists()


def test_the_fastest_is_found_once_and_kept(times: list[float], tmp_path: Path) -> None:
    times += [3.0, 1.0, 2.0]
    assert choose() == ("second", ["first", "second", "third"])
    assert choose() == ("second", [])
    times += [1.0, 2.0, 3.0]
    assert choose("another class")[0] == "first"
    forget()
    assert choose() == ("second", [])
    assert json.loads(file(tmp_path).read_text()) == {"kernel a": "second", "kernel another class": "first"}


def test_a_damaged_file_and_unknown_choices_are_ignored(times: list[float], tmp_path: Path) -> None:
    times += [3.0, 1.0, 2.0]
    choose()
    file(tmp_path).write_text("{")
    forget()
    times += [3.0, 2.0, 1.0]
    assert choose()[0] == "third"
    forget()
    assert choose(choices=("first", "other")) == ("first", [])


def test_choices_of_another_process_are_kept(times: list[float], tmp_path: Path) -> None:
    times += [3.0, 1.0, 2.0]
    choose()
    path = file(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "kernel b": "third"}))
    times += [1.0, 2.0, 3.0]
    choose("c")
    assert json.loads(path.read_text()).keys() == {"kernel a", "kernel b", "kernel c"}


def test_choices_stay_in_memory_if_the_folder_cannot_be_written(times: list[float], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    times += [3.0, 1.0, 2.0]
    assert choose()[0] == "second"
    assert choose() == ("second", [])


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("which", [0, -1])
def test_every_choice_computes_the_same(
    layout: torch.memory_format, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()

    def fixed(name: str, family: Any, device: torch.device, choices: Any, run: Any) -> Any:
        seen.add(name)
        return choices[which]

    monkeypatch.setattr(tune, "fastest", fixed)
    x = torch.randn(3, 24, 16, 16, device=DEVICE).half().contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(40, 24, 1, 1, device=DEVICE).half().requires_grad_()
    scale, shift = (torch.rand(24, device=DEVICE).add(0.5).requires_grad_() for _ in range(2))
    with fasttricks.backend("triton"):
        y = fasttricks.avgpool_conv1x1(fasttricks.bn_relu(x, scale, shift), weight)
    grads = torch.autograd.grad(y, [x, weight, scale, shift], torch.ones_like(y))
    wide = [t.detach().double().requires_grad_() for t in (x, weight, scale, shift)]
    normal = F.relu(F.batch_norm(wide[0], None, None, wide[2], wide[3], training=True))
    exact = F.conv2d(F.avg_pool2d(normal, 2), wide[1])
    wants = torch.autograd.grad(exact, wide, torch.ones_like(exact))
    for got, want in zip((y, *grads), (exact, *wants), strict=True):
        assert relative_error(got.cpu(), want.cpu()) < 5e-3
    assert seen == {
        "bn_stats", "bn_backward_reduce_kernel", "avgpool_conv1x1_forward_kernel", "avgpool_conv1x1_input_kernel",
        "avgpool_conv1x1_weight_kernel",
    }  # fmt: skip
