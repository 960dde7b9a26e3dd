"""Models: sizes against the definitions of the networks, values and keys against torchvision and timm."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fasttricks import fusions, models
from fasttricks.models.resnet import ResNet

DEPTHS, VARIANTS = (18, 34, 50, 101, 152), ("a", "b", "c", "d")


def defined_size(depth: int, variant: str, edge: int = 224, classes: int = 1000) -> tuple[int, int]:
    """(parameters, multiply-adds of convolutions and linear layer), computed from the definition.

    He et al. 2016 (arXiv:1512.03385, table 1) for the blocks, He et al. 2018 (arXiv:1812.01187, section 4 and figures 1
    and 2) for A to D.
    """
    blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}[depth]
    parameters = madds = 0

    def conv(inputs: int, outputs: int, kernel: int, out_edge: int) -> None:  # followed by a BatchNorm
        nonlocal parameters, madds
        weights = inputs * outputs * kernel**2
        parameters += weights + 2 * outputs
        madds += weights * out_edge**2

    edge //= 2
    if variant in "ab":
        conv(3, 64, 7, edge)
    else:
        for inputs, outputs in ((3, 32), (32, 32), (32, 64)):
            conv(inputs, outputs, 3, edge)
    edge //= 2
    inputs = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for block in range(count):
            halves = stage > 0 and block == 0
            small = edge // 2 if halves else edge
            if depth < 50:
                outputs = width
                conv(inputs, width, 3, small)
                conv(width, width, 3, small)
            else:
                outputs = 4 * width
                conv(inputs, width, 1, small if variant == "a" else edge)
                conv(width, width, 3, small)
                conv(width, outputs, 1, small)
            if inputs != outputs:
                conv(inputs, outputs, 1, small)
            inputs, edge = outputs, small
    return parameters + (inputs + 1) * classes, madds + inputs * classes


def count(model: torch.nn.Module, edge: int = 224) -> tuple[int, int]:
    """(parameters, multiply-adds) of a model on the meta device; the counter counts a multiply-add as two FLOPs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, edge, edge, device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_resnet_has_the_size_of_its_definition(depth, variant):
    with torch.device("meta"):
        eager, fused = (ResNet(depth, variant, fused=fused) for fused in (False, True))
    assert count(eager) == defined_size(depth, variant)
    assert sum(p.numel() for p in fused.parameters()) == defined_size(depth, variant)[0]


def test_resnet_has_the_published_sizes():
    """Parameters and GFLOPs (a multiply-add is one) of A to D in the paper's table 5, torchvision's and timm's models.

    Paper: 25 M each; 3.8, 4.1, 4.3, 4.3. torchvision, variant B: resnet50 25,557,032 and 4.09, resnet18 11,689,512 and
    1.81. timm: resnet50d 25.58 M and 4.35.
    """
    sizes = {variant: defined_size(50, variant) for variant in VARIANTS}
    for (_, madds), published in zip(sizes.values(), (3.8, 4.1, 4.3, 4.3), strict=True):
        assert abs(madds / 1e9 - published) < 0.1  # the paper rounds A's 3.86 down
    assert all(25.0e6 < parameters < 26.0e6 for parameters, _ in sizes.values())
    assert sizes["b"][0] == 25_557_032
    assert round(sizes["b"][1] / 1e9, 2) == 4.09
    assert defined_size(18, "b")[0] == 11_689_512
    assert round(defined_size(18, "b")[1] / 1e9, 2) == 1.81
    assert round(sizes["d"][0] / 1e6, 2) == 25.58
    assert abs(sizes["d"][1] / 1e9 - 4.35) < 0.03  # timm also counts other layers


@pytest.mark.parametrize(("depth", "torchvision_name"), [(18, "resnet18"), (50, "resnet50")])
@pytest.mark.parametrize("fused", [False, True])
def test_variant_b_equals_torchvision_with_its_weights(depth, torchvision_name, fused):
    """torchvision's state_dict loads strictly; outputs and gradients are equal in training and evaluation."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(depth)
    theirs = torchvision.models.get_model(torchvision_name, weights=None, num_classes=7).double()
    ours = ResNet(depth, "b", num_classes=7, fused=fused).double()
    compare(ours, theirs, torch.randn(4, 3, 40, 40, dtype=torch.float64))


@pytest.mark.parametrize(("depth", "timm_name"), [(18, "resnet18d"), (50, "resnet50d")])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("edge", [32, 42])
def test_variant_d_equals_timm_with_its_weights(depth, timm_name, fused, edge):
    timm = pytest.importorskip("timm")
    torch.manual_seed(depth)
    theirs = timm.create_model(timm_name, num_classes=7, zero_init_last=False).double()
    ours = ResNet(depth, "d", num_classes=7, fused=fused).double()
    # 42 -> 21 -> 11 -> 6 -> 3 -> 2: windows that overhang the edge
    compare(ours, theirs, torch.randn(4, 3, edge, edge, dtype=torch.float64))


def compare(ours: torch.nn.Module, theirs: torch.nn.Module, x: torch.Tensor) -> None:
    ours.load_state_dict(theirs.state_dict(), strict=True)
    weight = torch.randn(len(x), 7, dtype=x.dtype)
    for model in (ours.train(), theirs.train()):
        (model(x) * weight).sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        scale = other.grad.norm().clamp_min(1e-12)
        assert (mine.grad - other.grad).norm() / scale < 1e-6, name
    for (name, mine), other in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12, msg=name)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("depth", [18, 50])
def test_fused_and_eager_resnets_agree(depth, variant):
    """From the same seed both have equal weights and gradients; each loads the state_dict of the other."""
    nets = []
    for fused in (False, True):
        torch.manual_seed(3)
        nets.append(ResNet(depth, variant, num_classes=7, width=8, fused=fused).double())
    eager, fused_net = nets
    assert list(eager.state_dict()) == list(fused_net.state_dict())
    for (name, mine), other in zip(fused_net.state_dict().items(), eager.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name
    compare(fused_net, copy.deepcopy(eager), torch.randn(4, 3, 36, 44, dtype=torch.float64))
    eager.load_state_dict(fused_net.state_dict(), strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fused_resnet_agrees_in_every_dtype_and_layout(dtype, memory_format):
    """The logits equal the eager float64 ones within the precision."""
    torch.manual_seed(4)
    eager = ResNet(18, "d", num_classes=7, width=8, fused=False)
    fused = ResNet(18, "d", num_classes=7, width=8, fused=True)
    fused.load_state_dict(eager.state_dict())
    x = torch.randn(4, 3, 64, 64)
    want = eager.double()(x.double())
    for module in fused.to(dtype).modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.float()
    got = fused.to(memory_format=memory_format)(x.to(dtype).to(memory_format=memory_format))
    assert got.dtype == dtype
    assert (got.double() - want).norm() / want.norm() < 60 * torch.finfo(dtype).eps
    got.float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in fused.parameters())


def test_width_narrows_every_layer():
    full, narrow = ResNet(50, "d", fused=False), ResNet(50, "d", width=16, fused=False)
    for (name, big), small in zip(full.named_parameters(), narrow.parameters(), strict=True):
        assert small.shape[0] in (big.shape[0], big.shape[0] // 4), name
    assert narrow.fc.in_features == 512


def test_initialisation_is_that_of_the_paper():
    net = ResNet(18, "c", width=32)
    weight = net.layer2[0].conv1.weight
    bound = (6 / ((weight.shape[0] + weight.shape[1]) * 9)) ** 0.5
    assert 0.98 * bound < weight.abs().max() <= bound
    assert not net.fc.bias.any()
    assert all((m.weight == 1).all() and not m.bias.any() for m in net.modules() if "BatchNorm" in type(m).__name__)


def size_of(layers: list[tuple[int, int, int, int, bool, int]]) -> tuple[int, int]:
    """(parameters, multiply-adds) of convolutions, each as (inputs per group, outputs, area of the kernel, edge of the
    output, whether a BatchNorm follows (else it has a bias), how many)."""
    parameters = sum(n * (i * o * k + (2 * o if norm else o)) for i, o, k, _, norm, n in layers)
    return parameters, sum(n * i * o * k * e * e for i, o, k, e, _, n in layers)


def test_mobilenet_has_the_size_of_its_definition():
    """Howard et al. 2017: the rows of table 1; 4.2 M parameters and 569 M multiply-adds (table 8)."""
    layers = [(3, 32, 9, 112, True, 1)]
    rows = [(32, 64, 112, 112), (64, 128, 112, 56), (128, 128, 56, 56), (128, 256, 56, 28), (256, 256, 28, 28)]
    rows += [(256, 512, 28, 14), *[(512, 512, 14, 14)] * 5, (512, 1024, 14, 7), (1024, 1024, 7, 7)]
    for inputs, outputs, _, edge in rows:
        layers += [(1, inputs, 9, edge, True, 1), (inputs, outputs, 1, edge, True, 1)]
    layers.append((1024, 1000, 1, 1, False, 1))
    with torch.device("meta"):
        eager, fused = (models.MobileNetV1(fused=fused) for fused in (False, True))
    assert count(eager) == size_of(layers)
    assert sum(p.numel() for p in fused.parameters()) == size_of(layers)[0]
    assert round(size_of(layers)[0] / 1e6, 1) == 4.2
    assert round(size_of(layers)[1] / 1e6) == 569


def test_nin_has_the_size_of_its_definition():
    layers = [(3, 96, 121, 54, False, 1), (96, 96, 1, 54, False, 2), (96, 256, 25, 27, False, 1)]
    layers += [(256, 256, 1, 27, False, 2), (256, 384, 9, 13, False, 1), (384, 384, 1, 13, False, 2)]
    layers += [(384, 1024, 9, 6, False, 1), (1024, 1024, 1, 6, False, 1), (1024, 1000, 1, 6, False, 1)]
    with torch.device("meta"):
        assert count(models.NiN()) == size_of(layers)


def test_inception_equals_torchvision():
    """Keys, shapes, multiply-adds, outputs, gradients and running statistics are equal."""
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        ours = models.InceptionV3(aux_logits=True)
        theirs = torchvision.models.inception_v3(weights=None, init_weights=False)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert count(ours, 299) == count(theirs, 299)
    assert sum(p.numel() for p in ours.parameters()) == 27_161_264
    torch.manual_seed(0)
    theirs = torchvision.models.inception_v3(weights=None, num_classes=7, aux_logits=False, init_weights=False)
    net = models.InceptionV3(num_classes=7).double()
    theirs.double().dropout.p = net.dropout.p = 0.0
    compare(net, theirs, torch.randn(2, 3, 111, 87, dtype=torch.float64))


@pytest.mark.parametrize("name", ["mobilenet_v1", "nin", "inception_v3"])
def test_fused_and_eager_models_agree(name):
    edge = {"mobilenet_v1": 50, "nin": 75, "inception_v3": 299}[name]
    nets = []
    for fused in (False, True):
        torch.manual_seed(3)
        net = models.build(name, 7, width=4, fused=fused, aux_logits=True).double()
        for module in net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if name == "inception_v3":
            edge_out = net(torch.randn(2, 3, edge, edge, dtype=torch.float64))
            assert [tuple(t.shape) for t in edge_out] == [(2, 7), (2, 7)]
            with pytest.raises(ValueError, match="at least 299x299"):
                net(torch.randn(2, 3, 128, 128, dtype=torch.float64))
            net.AuxLogits = None  # the trainer's tests cover its gradients
        nets.append(net)
    eager, fused_net = nets
    assert list(eager.state_dict()) == list(fused_net.state_dict())
    compare(fused_net, eager, torch.randn(4, 3, edge if edge < 299 else 107, edge if edge < 299 else 91).double())


ZOO = pytest.mark.zoo  # each takes seconds


@pytest.mark.parametrize(
    ("name", "edge"),
    [
        ("mobilenet_v1", 64),
        ("nin", 67),
        ("inception_v3", 299),
        ("torchvision/mobilenet_v2", 64),
        ("torchvision/efficientnet_b0", 64),
        ("timm/seresnet50", 64),
        pytest.param("timm/seresnext50_32x4d", 64, marks=ZOO),
        pytest.param("torchvision/resnext50_32x4d", 64, marks=ZOO),
        pytest.param("torchvision/alexnet", 64, marks=ZOO),
        pytest.param("torchvision/vgg16_bn", 32, marks=ZOO),
        pytest.param("torchvision/densenet201", 64, marks=ZOO),
        pytest.param("torchvision/inception_v3", 299, marks=ZOO),
        pytest.param("timm/nasnetalarge", 75, marks=ZOO),
    ],
)
def test_models_train_the_same_fused_and_eager(name, edge):
    """The losses of three steps, with auxiliary heads, and the weights after them."""
    pytest.importorskip(name.partition("/")[0] if "/" in name else "torchvision")
    from fasttricks.train.objective import Objective

    losses, weights = [], []
    for fused in (False, True):
        torch.manual_seed(5)
        model = models.build(name, 5, width=None if "/" in name else 6, fused=fused, aux_logits=True).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        losses.append([])
        for _ in range(3):
            images = torch.randn(3, 3, edge, edge, dtype=torch.float64)
            optimizer.zero_grad()
            loss = Objective(0.1, 20.0)(model(images), torch.arange(3))
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-8)
    assert len(set(losses[0])) == 3
    assert (weights[1] - weights[0]).norm() / weights[0].norm() < 1e-6


@pytest.mark.parametrize("name", [name for name in models.names() if name.startswith("resnet")])
def test_own_names_resolve(name):
    with torch.device("meta"):
        model = models.build(name, 5)
    letter = name[-1] if name[-1].isalpha() else "a"
    assert (f"resnet{model.depth}", model.variant, model.fused, model.width) == (name.rstrip("abcd"), letter, True, 64)


@pytest.mark.parametrize(
    "name", ["torchvision/vgg16_bn", "torchvision/inception_v3", "torchvision/googlenet", "timm/densenet201"]
)
def test_names_of_other_libraries_resolve(name):
    pytest.importorskip(name.partition("/")[0])
    with torch.device("meta"):
        model = models.build(name, 5)
    edge = 299 if "inception" in name else 224
    out = model.train()(torch.empty(2, 3, edge, edge, device="meta"))
    assert out.shape == (2, 5)  # a tensor, without auxiliary logits


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("resnet51d", {}, r"'resnet51d' is unknown \(did you mean .*resnet50d"),
        ("resnet50e", {}, "unknown"),
        ("torchvision/resnet5o", {}, "no classification model 'resnet5o'"),
        ("timm/resnet5od", {}, "no model 'resnet5od'"),
        ("keras/resnet50", {}, "'torchvision' or 'timm'"),
        ("torchvision/resnet50", {"width": 32}, "fixed width"),
        ("resnet18", {"width": 7}, "even number"),
        ("resnet18", {"width": 0}, "even number"),
        ("resnet18", {"num_classes": 0}, "num_classes"),
    ],
)
def test_bad_names_and_options_are_refused(name, options, text):
    with pytest.raises(ValueError, match=text):
        models.build(name, **options)


def test_bad_constructor_arguments_are_refused():
    with pytest.raises(ValueError, match="depth must be one of"):
        ResNet(20)
    with pytest.raises(ValueError, match="variant must be"):
        ResNet(18, "e")


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet18"])
def test_models_of_other_libraries_are_fused_by_default(name):
    pytest.importorskip(name.partition("/")[0])
    counts = {"bn_relu": 9, "bn_add_relu": 8}
    assert fusions(models.build(name, 3)).counts == counts
    assert fusions(models.build(name, 3, fused=True)).counts == counts
    assert fusions(models.build(name, 3, fused=False)).counts == {}
