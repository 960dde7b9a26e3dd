"""BatchNormReLU2d and BatchNormAddReLU2d against nn.BatchNorm2d; zero_init_last; statistics over two processes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from ranks import Ranks
from torch import Tensor, distributed, nn

from fasttricks import fuse, zero_init_last
from fasttricks.nn import BatchNormAddReLU2d, BatchNormReLU2d

OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 0.0},
    {"affine": False},
    {"track_running_stats": False},
    {"eps": 1e-3, "momentum": 0.3},
]


def twins(**options: object) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d]:
    peer = nn.BatchNorm2d(5, **options)
    if peer.affine:
        nn.init.normal_(peer.weight)
        nn.init.normal_(peer.bias)
    fused = BatchNormReLU2d(5, **options)
    fused.load_state_dict(peer.state_dict())
    return fused, peer


def same_buffers(fused: nn.Module, peer: nn.Module) -> None:
    assert fused.state_dict().keys() == peer.state_dict().keys()
    for name, want in peer.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], want, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_and_evaluation_equal_torch(backend: str, options: dict) -> None:
    fused, peer = twins(**options)
    for _ in range(3):
        x = torch.randn(4, 5, 6, 7) * 2 + 1
        assert relative_error(fused(x), F.relu(peer(x))) < 1e-6
        same_buffers(fused, peer)
    fused.eval()
    peer.eval()
    assert relative_error(fused(x), F.relu(peer(x))) < 1e-6
    same_buffers(fused, peer)


def test_momentum_none_is_the_cumulative_average(backend: str) -> None:
    """Batches [0, 2], [1, 3], [5, 7]: mean 3, variance 2, three batches."""
    norm = BatchNormReLU2d(1, momentum=None)
    for a, b in ((0.0, 2.0), (1.0, 3.0), (5.0, 7.0)):
        norm(torch.tensor([a, b]).view(2, 1, 1, 1))
    torch.testing.assert_close(norm.running_mean.item(), 3.0)
    torch.testing.assert_close(norm.running_var.item(), 2.0)
    assert norm.num_batches_tracked == 3


def test_tracking_can_be_switched_off_after_construction(backend: str) -> None:
    """Training then leaves the buffers unchanged; evaluation still uses them."""
    fused, peer = twins()
    for norm in (fused, peer):
        norm.track_running_stats = False
    x = torch.randn(4, 5, 3, 3)
    assert relative_error(fused(x), F.relu(peer(x))) < 1e-6
    assert fused.running_mean.tolist() == [0] * 5
    assert fused.num_batches_tracked == 0
    fused.running_mean.fill_(2.0)
    peer.running_mean.fill_(2.0)
    assert relative_error(fused.eval()(x), F.relu(peer.eval()(x))) < 1e-6


def test_an_empty_batch_changes_only_the_count(backend: str) -> None:
    fused = BatchNormReLU2d(4)
    assert fused(torch.ones(0, 4, 3, 3)).shape == (0, 4, 3, 3)
    assert fused.num_batches_tracked == 1
    assert fused.running_var.tolist() == [1] * 4


def test_input_must_have_four_dimensions() -> None:
    with pytest.raises(ValueError, match="expected 4D input"):
        BatchNormReLU2d(3)(torch.randn(2, 3))


def test_zero_init_starts_as_the_shortcut_and_can_train() -> None:
    norm = BatchNormAddReLU2d(6, zero_init=True)
    x, shortcut = torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5)
    y = norm(x, shortcut)
    assert torch.equal(y, F.relu(shortcut))
    (y * torch.randn_like(y)).sum().backward()
    assert (norm.weight.grad != 0).all()
    norm.weight.data.fill_(1)
    norm.reset_parameters()
    assert (norm.weight == 0).all()
    with pytest.raises(ValueError, match="zero_init is True and affine is False"):
        BatchNormAddReLU2d(6, affine=False, zero_init=True)


def test_copies_and_pickles_keep_zero_init() -> None:
    norm = BatchNormAddReLU2d(3, zero_init=True)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert other.zero_init
        assert other.state_dict().keys() == nn.BatchNorm2d(3).state_dict().keys()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_full_graph_compile_equals_eager(momentum: float | None) -> None:
    """Outputs, gradients and buffers of three training steps, and evaluation after them."""
    torch._dynamo.reset()
    eager, traced = (BatchNormAddReLU2d(4, momentum=momentum) for _ in range(2))
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x, r = torch.randn(3, 4, 5, 5, requires_grad=True), torch.randn(3, 4, 5, 5)
        want, got = eager(x, r), compiled(x, r)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), x), rtol=0, atol=0
        )
        same_buffers(traced, eager)
    torch.testing.assert_close(compiled.eval()(x, r), eager.eval()(x, r), rtol=0, atol=0)


def test_two_forwards_before_one_backward() -> None:
    """The second one changes the running statistics, which the backward pass does not need."""
    norm = BatchNormReLU2d(3)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    (norm(x).sum() + norm(2 * x).sum()).backward()
    assert x.grad is not None


# ---- zero_init_last ----


def test_zero_init_last_of_torchvision_and_timm() -> None:
    models = pytest.importorskip("torchvision.models")
    assert zero_init_last(models.resnet18()) == 8
    net = models.resnet50()
    assert zero_init_last(net) == 16
    assert (net.layer1[0].bn3.weight == 0).all()
    assert (net.layer1[0].bn2.weight == 1).all()
    timm = pytest.importorskip("timm")
    net = timm.create_model("resnet26d", zero_init_last=False)
    assert zero_init_last(net) == 8
    assert (net.layer1[0].bn3.weight == 0).all()


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(
    ("name", "count"),
    [("regnetx_002", 13), ("resnetv2_50", 16), ("res2net50_14w_8s", 16), ("resnest14d", 4), ("dla34", 12)],
)
def test_zero_init_last_of_timms_other_families(name: str, count: int, fused: bool) -> None:
    net = pytest.importorskip("timm").create_model(name, zero_init_last=False) if name != "dla34" else None
    net = net or pytest.importorskip("timm").create_model(name)
    if fused:
        fuse(net)
    assert zero_init_last(net) == count
    assert zero_init_last(net) == count
    zeroed = [p for n, p in net.named_parameters() if n.endswith("weight") and (p == 0).all()]
    assert len(zeroed) == count


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("legacy_seresnet18", "SEResNetBlock", 8),
        ("botnet26t_256", "SelfAttnBlock", 8),
        ("gcresnet33ts", "BottleneckBlock", 10),
        ("tresnet_m", "BasicBlock", 21),
    ],
)
def test_blocks_start_as_their_shortcuts(name: str, kind: str, count: int) -> None:
    """Also of families whose last BatchNorm is within a child."""
    net = pytest.importorskip("timm").create_model(name)
    assert zero_init_last(net) == count
    block = next(m for m in net.modules() if type(m).__name__ == kind and _shortcut_of(m) is None).eval()
    channels = next(p.shape[0] for n, p in reversed(list(block.named_parameters())) if "bn" in n and p.dim() == 1)
    x = torch.randn(1, channels, 16, 16)
    activation = getattr(block, "act", torch.relu)  # a SiLU in some
    torch.testing.assert_close(block(x), activation(x.clone()), rtol=0, atol=0)


def _shortcut_of(block: nn.Module) -> nn.Module | None:
    """What a block's input goes through before it is added; None: nothing."""
    shortcut = getattr(block, "downsample", None) or getattr(block, "shortcut", None)
    return None if isinstance(shortcut, nn.Identity) else shortcut


def test_zero_init_last_of_torchvisions_regnet() -> None:
    net = pytest.importorskip("torchvision").models.regnet_y_400mf()
    assert zero_init_last(net) == 16
    assert (net.trunk_output.block1[0].f.c[1].weight == 0).all()


def test_zero_init_last_refuses_a_model_without_blocks() -> None:
    with pytest.raises(ValueError, match="model is a Sequential with no residual block"):
        zero_init_last(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))


# ---- statistics over two processes ----


def one_rank(whole: dict[str, Tensor], sizes: tuple[int, int], residual: bool) -> dict[str, Tensor]:
    """Outputs, gradients and state of this rank's part of the inputs."""
    part = slice(0, sizes[0]) if distributed.get_rank() == 0 else slice(sizes[0], sum(sizes))
    x, r, dy = (whole[k][part].requires_grad_(k != "dy") for k in ("x", "r", "dy"))
    kind = BatchNormAddReLU2d if residual else BatchNormReLU2d
    norm = kind(4, process_group=distributed.group.WORLD)
    norm.load_state_dict({name.removeprefix("state."): t for name, t in whole.items() if "state." in name})
    y = norm(x, r) if residual else norm(x)
    y.backward(dy)
    made = {"y": y.detach(), "dx": x.grad, "dr": r.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    return {name: t for name, t in made.items() if t is not None} | dict(norm.named_buffers())


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("residual", [False, True], ids=["relu", "add_relu"])
@pytest.mark.parametrize("sizes", [(3, 1), (4, 0)], ids=["uneven", "empty"])
def test_synchronised_statistics_equal_one_process(sizes: tuple[int, int], residual: bool, ranks: Ranks) -> None:
    """Two ranks with uneven parts of a batch, one of them possibly empty."""
    peer = nn.BatchNorm2d(4)
    nn.init.normal_(peer.weight)
    nn.init.normal_(peer.bias)
    state = {f"state.{name}": t.clone() for name, t in peer.state_dict().items()}
    peer = peer.double()
    x, r, dy = (torch.randn(sum(sizes), 4, 5, 5) * 2 + 1 for _ in range(3))
    made = ranks.run(one_rank, {"x": x, "r": r, "dy": dy, **state}, sizes, residual)
    y = torch.cat([a["y"] for a in made])
    x64, r64 = x.double().requires_grad_(), r.double().requires_grad_()
    z = peer(x64) + (r64 if residual else 0)
    z.backward(torch.where(y > 0, dy, 0).double())
    assert relative_error(y, F.relu(z)) < 1e-6
    assert relative_error(torch.cat([a["dx"] for a in made]), x64.grad) < 1e-5
    if residual:
        assert torch.equal(torch.cat([a["dr"] for a in made]), torch.where(y > 0, dy, 0))
    assert relative_error(made[0]["weight"] + made[1]["weight"], peer.weight.grad) < 1e-5
    assert relative_error(made[0]["bias"] + made[1]["bias"], peer.bias.grad) < 1e-5
    for one in made:
        for name in ("running_mean", "running_var"):
            assert relative_error(one[name], peer.state_dict()[name]) < 1e-6
