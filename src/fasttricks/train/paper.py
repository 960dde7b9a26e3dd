"""Figures of He et al. 2018 (arXiv:1812.01187), shown beside those of an ablation.

Here are those of Table 1 and section 3.3 alone. They are of ResNet-50 on ImageNet.
"""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """What the paper says, and where."""

    text: str
    source: str


# (table, row) -> top-1 / top-5 in percent, a change of top-1 against the baseline, or the time of an epoch
FIGURES: dict[tuple[str, str], list[Figure]] = {
    ("efficient", "baseline"): [Figure("75.3 / 92.2", "Table 1"), Figure("13.3 min an epoch", "section 3.3")],
    ("efficient", "+ linear scaling"): [Figure("-0.9", "section 3.3")],
    ("efficient", "+ fp16"): [Figure("+0.5, 4.4 min an epoch", "section 3.3")],
    ("refinements", "+ mixup"): [Figure("79.29 / 94.63", "Table 1")],
    ("models", "resnet50d, refined"): [Figure("79.29 / 94.63", "Table 1")],
}

NOTE = (
    "paper: He et al. 2018, arXiv:1812.01187, ResNet-50 on ImageNet: top-1 / top-5, or the change of top-1 against the "
    "baseline. Only Table 1 and section 3.3 were read: the cells of rows without a figure there are empty."
)


def cell(table: str, row: str) -> str:
    """The figures of a row with their sources; empty if there are none."""
    return "; ".join(f"{figure.text} ({figure.source})" for figure in FIGURES.get((table, row), []))
