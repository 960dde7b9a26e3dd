"""Models by name: our own, torchvision's and timm's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from ..patch import fuse
from .inception import InceptionV3
from .mobilenet import MobileNetV1
from .nin import NiN
from .resnet import STAGES, ResNet

_RESNET = re.compile(r"resnet(\d+)([abcd]?)")
_OTHERS: dict[str, Callable[..., nn.Module]] = {"inception_v3": InceptionV3, "mobilenet_v1": MobileNetV1, "nin": NiN}


def names() -> list[str]:
    """The names of the package's own models. A ResNet without a letter is variant A, the original.

    Examples:
        >>> fasttricks.models.names()[:5]
        ['resnet18', 'resnet18a', 'resnet18b', 'resnet18c', 'resnet18d']
    """
    return [f"resnet{depth}{letter}" for depth in STAGES for letter in ("", "a", "b", "c", "d")] + [*_OTHERS]


def build(
    name: str,
    num_classes: int = 1000,
    *,
    width: int | None = None,
    fused: bool | None = None,
    aux_logits: bool = False,
    pretrained: bool = False,
) -> nn.Module:
    """Build a model with fresh weights.

    Args:
        name: an own model ("resnet50d", see :func:`names`), "torchvision/NAME" or "timm/NAME".
        num_classes: outputs of the classifier.
        width: channels of the first stage of an own model (default 64; 32 of inception_v3 and mobilenet_v1, 96 of nin).
        fused: fused modules (the default) or eager ones. Models of torchvision and timm are built as their library
            defines them, and then `fasttricks.fuse` runs their blocks on the fused ops.
        aux_logits: keep the auxiliary heads of inception_v3 and googlenet. In training, their output is then a tuple
            with the logits first.
        pretrained: the weights that torchvision or timm publishes, downloaded if need be.

    Raises:
        ValueError: an unknown name, ``width`` for a model that is not our own, or ``pretrained`` for a model without
            published weights of ``num_classes`` classes.
        ImportError: the library of the model is not installed.

    Examples:
        >>> model = fasttricks.models.build("resnet18d", num_classes=10, width=16)
        >>> model(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """
    library, slash, rest = name.partition("/")
    if not slash:
        match = _RESNET.fullmatch(name)
        if name not in _OTHERS and (match is None or int(match[1]) not in STAGES):
            raise ValueError(
                f"model {name!r} is unknown{_hint(name, names())}; own models: resnet"
                f"{{{','.join(map(str, STAGES))}}}{{,a,b,c,d}}, {', '.join(_OTHERS)}; "
                "others: torchvision/NAME, timm/NAME"
            )
        if pretrained:
            raise ValueError(f"model {name!r} has no published weights; torchvision/NAME and timm/NAME may have")
        options: dict[str, Any] = {"num_classes": num_classes, "fused": fused is not False}
        if width is not None:
            options["width"] = width
        if match is not None:
            return ResNet(int(match[1]), match[2] or "a", **options)  # type: ignore[arg-type]
        if name == "inception_v3":
            options["aux_logits"] = aux_logits
        return _OTHERS[name](**options)
    if library not in ("torchvision", "timm"):
        raise ValueError(f"model {name!r}: the part before the slash must be 'torchvision' or 'timm', got {library!r}")
    if width is not None:
        raise ValueError(f"width is for the package's own models; {name!r} has a fixed width")
    if library == "torchvision":
        model = _torchvision(rest, num_classes, aux_logits, pretrained)
    else:
        model = _timm(rest, num_classes, pretrained)
    return model if fused is False else fuse(model)


def _torchvision(name: str, num_classes: int, aux_logits: bool, pretrained: bool) -> nn.Module:
    import torchvision.models

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(f"torchvision has no classification model {name!r}{_hint(name, known)}")
    builder = torchvision.models.get_model_builder(name)
    if pretrained:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        _check_classes(f"torchvision/{name}", len(weights.meta["categories"]), num_classes)
        return builder(weights=weights)
    options: dict[str, object] = {"weights": None, "num_classes": num_classes}
    # googlenet and inception_v3 hide these in **kwargs
    if name in ("googlenet", "inception_v3"):
        options.update(aux_logits=aux_logits, init_weights=True)
    return builder(**options)


def _timm(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"model 'timm/{name}' needs timm: pip install timm") from error
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}{_hint(name, timm.list_models())}")
    if pretrained:
        config = timm.get_pretrained_cfg(name)
        if config is None or not config.has_weights:
            raise ValueError(f"model 'timm/{name}' has no published weights")
        _check_classes(f"timm/{name}", config.num_classes, num_classes)
    return timm.create_model(name, pretrained=pretrained, num_classes=num_classes)


def _check_classes(name: str, published: int, wanted: int) -> None:
    if published != wanted:
        raise ValueError(f"the published weights of {name!r} are for {published} classes, asked for {wanted}")


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f" (did you mean {', '.join(close)}?)" if close else ""
