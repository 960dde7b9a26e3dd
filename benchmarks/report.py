"""Condenses a pytest-benchmark JSON file: python benchmarks/report.py RAW.json RESULT.json.

Kept of every case: the best time in milliseconds and the case's own figures (ratios to its peers, bytes or FLOP per
second); of the machine: processor, threads, torch. Printed: a line a case.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import fasttricks


def condense(raw: dict) -> dict:
    processor = raw["machine_info"]["cpu"].get("brand_raw", "unknown")
    cases = {
        case["fullname"].removeprefix("benchmarks/"): {
            "best_ms": round(case["stats"]["min"] * 1e3, 4),
            **{name: round(value, 4) for name, value in case["extra_info"].items()},
        }
        for case in raw["benchmarks"]
    }
    about = {"processor": processor, "cores": raw["machine_info"]["cpu"]["count"], "torch": torch.__version__}
    return {"machine": {**about, "isa": fasttricks.info()["cpu_isa"]}, "cases": cases}


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    result = condense(json.loads(source.read_text()))
    target.write_text(json.dumps(result, indent=1) + "\n")
    for name, figures in result["cases"].items():
        print(name, ", ".join(f"{key} {value:g}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
