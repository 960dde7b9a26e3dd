"""The scripts of examples/ run on the CPU, learn, and are short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.py"))


def test_every_script_is_listed() -> None:
    assert [path.name for path in SCRIPTS] == ["lightning_module.py", "own_loop.py", "torchvision_model.py"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_is_short_and_learns(script: Path, tmp_path: Path) -> None:
    assert len(script.read_text().splitlines()) < 60
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    accuracy = re.search(r"validation top-1: ([\d.]+)%", done.stdout)
    assert accuracy is not None, done.stdout
    assert float(accuracy[1]) > 85
