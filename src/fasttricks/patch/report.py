"""What `fasttricks.fusions` returns: each BatchNorm and pool of a model, and whether it is one op with what follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fusion:
    """One place in a model.

    Attributes:
        name: of the BatchNorm, or of the 1x1 convolution after or before a pool.
        kind: "bn_relu", "bn_add_relu" or "avgpool_conv1x1"; "unknown": no forward that calls it is traced; None: no
            such pair.
        reason: why it does not run as one op; "" if it does.
        fused: whether it does.

    Examples:
        >>> fasttricks.patch.Fusion("layer1.0.bn1", "bn_relu").fused
        True
    """

    name: str
    kind: str | None
    reason: str = ""

    @property
    def fused(self) -> bool:
        return not self.reason


class Fusions(Sequence[Fusion]):
    """A list of `Fusion` that prints as a table; `counts` says how many of each kind are fused.

    Examples:
        >>> model = fasttricks.fuse(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))
        >>> print(fasttricks.fusions(model))
        name  kind     fused
        0     bn_relu  yes
        fused: 1 bn_relu; left as they are: 0
    """

    def __init__(self, rows: list[Fusion]) -> None:
        self._rows = rows

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Fusion]:
        return iter(self._rows)

    @property
    def fused(self) -> list[Fusion]:
        return [row for row in self._rows if row.fused]

    @property
    def left(self) -> list[Fusion]:
        return [row for row in self._rows if not row.fused]

    @property
    def counts(self) -> Counter[str]:
        return Counter(str(row.kind) for row in self.fused)

    def __str__(self) -> str:
        cells = [("name", "kind", "fused"), *((row.name, row.kind or "", row.reason or "yes") for row in self._rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(2)]
        lines = [f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {why}" for name, kind, why in cells]
        total = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items())) or "none"
        return "\n".join([*lines, f"fused: {total}; left as they are: {len(self.left)}"])

    __repr__ = __str__
