"""The training loss: cross entropy, with auxiliary heads and distillation."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models import build
from . import checkpoint
from .checkpoint import CheckpointError

# weight of an auxiliary head: Szegedy et al. 2015 (arXiv:1409.4842), section 5
AUXILIARY = 0.3


def logits_of(outputs: Tensor | tuple[Tensor | None, ...]) -> Tensor:
    """The logits in the output of a model. With auxiliary heads, the output is a tuple that starts with them."""
    logits = outputs if isinstance(outputs, Tensor) else outputs[0]
    assert logits is not None
    return logits


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Objective(nn.Module):
    """The loss of a batch, with labels p, logits z, the teacher's logits r and those of the auxiliary heads a:

        l(p, softmax(z)) + 0.3 sum l(p, softmax(a)) + T^2 l(softmax(r/T), softmax(z/T))

    l is the cross entropy. The first two terms smooth the labels (He et al. 2018, sections 5.2 and 5.3).

    Args:
        label_smoothing: in [0, 1).
        temperature: T.
    """

    def __init__(self, label_smoothing: float, temperature: float):
        super().__init__()
        self.label_smoothing, self.temperature = label_smoothing, temperature

    def forward(
        self, outputs: Tensor | tuple[Tensor | None, ...], labels: Tensor, teacher: Tensor | None = None
    ) -> Tensor:
        logits = _at_least_fp32(logits_of(outputs))
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        for auxiliary in () if isinstance(outputs, Tensor) else outputs[1:]:
            if auxiliary is not None:
                loss = loss + AUXILIARY * F.cross_entropy(
                    _at_least_fp32(auxiliary), labels, label_smoothing=self.label_smoothing
                )
        if teacher is not None:
            soft = (_at_least_fp32(teacher) / self.temperature).softmax(1)
            loss = loss + self.temperature**2 * F.cross_entropy(logits / self.temperature, soft)
        return loss


def load_teacher(name: str, classes: list[str]) -> nn.Module:
    """Loads the model to distil from, in evaluation mode and without gradients.

    Args:
        name: a checkpoint of this trainer (its averaged weights if it has them), or "torchvision/NAME" or "timm/NAME"
            for the weights that the library publishes.
        classes: of the training set.

    Raises:
        CheckpointError, ValueError, ImportError: no such model, or its classes differ.
        OSError: the weights cannot be downloaded.
    """
    path = Path(name)
    if path.suffix == ".pt" or path.is_file():
        state = checkpoint.load(path, "--teacher")
        if state["classes"] != classes:
            raise CheckpointError(
                f"--teacher: {path} was trained on {len(state['classes'])} classes, the data has {len(classes)} "
                "or others"
            )
        recipe = state["recipe"]
        teacher = build(recipe["model"], len(classes), width=recipe["width"], fused=recipe["fused"])
        checkpoint.load_model(teacher, state.get("ema") or state["model"], path, "--teacher")
    else:
        teacher = build(name, len(classes), pretrained=True)
    return teacher.eval().requires_grad_(False)


@torch.no_grad()
def keep_norms_in_fp32(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts ``model`` to ``dtype``, except for the parameters and statistics of batch norm, which stay fp32."""
    model.to(dtype)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.float()
    return model
