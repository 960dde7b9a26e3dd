"""Pairs in the graph of a block: BatchNorm and ReLU, BatchNorm, addition and ReLU, 2x2 pool and 1x1 convolution, which
may come in either order.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..nn import run
from .trace import AUGMENTED, original_class

BN_RELU, BN_ADD_RELU, AVGPOOL_CONV1X1 = "bn_relu", "bn_add_relu", "avgpool_conv1x1"
NOT_WANTED = "not wanted"

_RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_ADD_FUNCTIONS = (operator.add, operator.iadd, AUGMENTED["iadd"], torch.add)
_IN_PLACE_FUNCTIONS = (F.relu_, torch.relu_, *AUGMENTED.values(), *(getattr(operator, name) for name in AUGMENTED))
# what a pool does not change, though the pooled value may be read for it
SAME_AFTER_POOL = ("dtype", "device", "ndim")
# methods, functions and attributes that may return their input, or a view of it
_VIEWS = frozenset(
    (
        *(
            "view",
            "view_as",
            "reshape",
            "reshape_as",
            "flatten",
            "unflatten",
            "contiguous",
            "detach",
            "to",
            "type",
            "type_as",
        ),
        *(
            "float",
            "double",
            "half",
            "bfloat16",
            "cpu",
            "cuda",
            "permute",
            "transpose",
            "swapaxes",
            "swapdims",
            "movedim",
        ),
        *("moveaxis", "t", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "narrow", "select", "unbind"),
        *("chunk", "split", "tensor_split", "hsplit", "vsplit", "diagonal", "unfold", "as_strided", "real", "data"),
        *("T", "mT", "H", "mH", "positive", "ravel", "getitem", "dropout", "alpha_dropout"),
    )
)


@dataclass
class Pair:
    """Nodes that become one op, from `first` (the BatchNorm or pool) to `last` (the ReLU or convolution).

    With `conv_first` the convolution comes before the pool.
    """

    kind: str
    name: str  # of the BatchNorm, or of the convolution
    first: fx.Node
    last: fx.Node
    between: list[fx.Node]  # Identity and the like, and the addition
    add: fx.Node | None = None
    value: fx.Node | None = None  # the operand of the addition that comes from the BatchNorm
    in_place: bool = False
    other: fx.Node | None = None  # the BatchNorm of the other operand, which the op computes as well
    after_other: list[fx.Node] = field(default_factory=list)  # Identity and the like between it and the addition
    metadata: list[fx.Node] = field(default_factory=list)  # readers of the shape, dtype or device of a pooled value
    conv_first: bool = False
    input_may_change: bool = False  # that of the pool, in place, before the backward pass

    @property
    def pool(self) -> fx.Node:
        """Of a pair of pool and convolution."""
        return self.last if self.conv_first else self.first

    @property
    def ends_block(self) -> bool:
        """Whether this is bn_add_relu, and its result what the block returns."""
        returned = any(user.op == "output" and user.args[0] is self.last for user in self.last.users)
        return returned and self.kind == BN_ADD_RELU and self.other is None

    @property
    def reads_argument(self) -> bool:
        source = self.first.args[0] if self.first.args else None
        return isinstance(source, fx.Node) and source.op == "placeholder"


class Left(NamedTuple):
    """Why a module is not fused; kind: that of the pair that it would form, or None."""

    kind: str | None
    why: str


@dataclass
class Matches:
    """The pairs of a graph, and why other BatchNorms and pools are not among them."""

    pairs: list[Pair] = field(default_factory=list)
    left: dict[str, Left] = field(default_factory=dict)  # name of a BatchNorm or pool -> why not


class Matcher:
    """Finds pairs in the graph of `root`, which was traced in the mode `training`."""

    def __init__(self, graph: fx.Graph, root: nn.Module, training: bool) -> None:
        self.graph, self.root, self.training = graph, root, training
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.calls = Counter(node.target for node in graph.nodes if node.op == "call_module")

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    # ---- what a node is ----

    def is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self.module(node)) is nn.ReLU and len(node.args) == 1
        if node.op == "call_function":
            return node.target in _RELU_FUNCTIONS
        return node.op == "call_method" and node.target in ("relu", "relu_")

    def is_add(self, node: fx.Node) -> bool:
        if len(node.args) != 2 or node.kwargs:
            return False
        if node.op == "call_function":
            return node.target in _ADD_FUNCTIONS
        return node.op == "call_method" and node.target in ("add", "add_", "__add__", "__radd__", "__iadd__")

    def is_pass(self, node: fx.Node) -> bool:
        """Whether node returns its only argument in this mode."""
        module = self.module(node)
        return module is not None and len(node.args) == 1 and not node.kwargs and is_pass(module, self.training)

    def in_place(self, node: fx.Node) -> bool:
        """Whether node may change one of its arguments in place."""
        module = self.module(node)
        if module is not None:
            return any(getattr(m, "inplace", False) for m in module.modules())
        if node.op == "call_function":
            changes = node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None
            return (
                changes or node.target in _IN_PLACE_FUNCTIONS or str(getattr(node.target, "__name__", "")).endswith("_")
            )
        return node.op == "call_method" and str(node.target).endswith("_")

    # ---- memory that several nodes share ----

    def aliases(self, node: fx.Node, besides: fx.Node | None = None) -> set[fx.Node]:
        """Nodes that may share the memory of node's value, other than `besides` and what comes from it."""
        found, open_ = {node}, [node]
        while open_:
            current = open_.pop()
            near = [user for user in current.users if self._may_alias(user)]
            if self._may_alias(current):
                near += current.all_input_nodes[:1]
            for other in near:
                if other not in found and other is not besides:
                    found.add(other)
                    open_.append(other)
        return found

    def _may_alias(self, node: fx.Node) -> bool:
        if self.is_pass(node) or self.in_place(node):
            return True
        if node.target is getattr:
            return node.args[1] in _VIEWS
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        return node.op in ("call_method", "call_function") and name in _VIEWS

    def changed_between(self, value: fx.Node, start: fx.Node, end: fx.Node) -> bool:
        """Whether value may be changed in place after start and before end."""
        shared = self.aliases(value)
        return any(
            self.order[start] < self.order[node] < self.order[end]
            and self.in_place(node)
            and shared & set(node.all_input_nodes)
            for node in self.graph.nodes
        )

    # ---- matching ----

    def follow(self, node: fx.Node) -> tuple[fx.Node | None, fx.Node, list[fx.Node]]:
        """The only reader of node's value, through Identity and the like; the node that it reads; what is between."""
        between: list[fx.Node] = []
        while len(node.users) == 1:
            user = next(iter(node.users))
            if not self.is_pass(user):
                return user, node, between
            between.append(user)
            node = user
        return None, node, between

    def follow_pool(self, node: fx.Node) -> tuple[fx.Node | None, list[fx.Node], list[fx.Node]]:
        """The only reader of a pooled value, the Identity and the like before it, and reads of its shape or dtype."""
        between: list[fx.Node] = []
        metadata: list[fx.Node] = []
        while True:
            metadata += [user for user in node.users if reads_metadata(user)]
            readers = [user for user in node.users if not reads_metadata(user)]
            if len(readers) != 1:
                return None, between, metadata
            if not self.is_pass(readers[0]):
                return readers[0], between, metadata
            node = readers[0]
            between.append(node)

    def match(self, allowed: Callable[[str, nn.Module, str], bool]) -> Matches:
        """All pairs; allowed(kind, module, name of the module) says which are wanted."""
        found = Matches()
        taken: set[fx.Node] = set()
        others: set[fx.Node] = set()  # BatchNorms that the op of another one computes
        for node in self.graph.nodes:
            module = self.module(node)
            result: Pair | Left | None
            if node in taken or node in others:
                continue
            if self.pools(node):
                result = self._pool(node)
            elif module is None or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
                continue
            elif run.is_norm_class(type(module)):
                result = self._norm(node, module, taken)
            elif type(module) is nn.Conv2d and run.is_1x1_conv(module):
                result = self._conv(node)
            else:
                continue
            if result is None:
                continue
            if isinstance(result, Left):
                if module is not None:
                    found.left[str(node.target)] = result
            elif not allowed(result.kind, self.root.get_submodule(result.name), result.name):
                found.left[result.name] = Left(result.kind, NOT_WANTED)
            else:
                self._add_other(result, allowed)
                if result.other is not None:
                    others.add(result.other)
                    found.left[str(result.other.target)] = Left(None, f"the op of {result.name} computes it")
                found.pairs.append(result)
                taken.add(result.last)
        return found

    def _norm(self, node: fx.Node, norm: nn.Module, taken: set[fx.Node]) -> Pair | Left:
        reader, value, between = self.follow(node)
        if reader is None:
            if any(self.is_relu(user) for user in value.users):
                return Left(BN_RELU, "its output has another consumer besides the ReLU")
            return Left(None, "no ReLU follows")
        add = None
        if self.is_add(reader):
            add = reader
            reader, _, after = self.follow(add)
            between = [*between, add, *after]
        if reader is None or not self.is_relu(reader):
            return Left(None, f"no ReLU follows{self._follower(reader)}")
        kind = BN_RELU if add is None else BN_ADD_RELU
        if not run.is_plain_norm(norm):
            return Left(kind, "a hook, an activation or a forward of its own")
        touched = [n for n in (*between, reader) if n.op == "call_module" and not run.untouched(self.module(n))]  # type: ignore[arg-type]
        if touched:
            return Left(kind, f"a hook on {touched[0].target}")
        name = str(node.target)
        if add is None:
            return Pair(BN_RELU, name, node, reader, between)
        return self._addition(Pair(BN_ADD_RELU, name, node, reader, between, add, value), add, value, taken)

    def _addition(self, pair: Pair, add: fx.Node, value: fx.Node, taken: set[fx.Node]) -> Pair | Left:
        """The pair, if the BatchNorm can run as late as the addition without changing a result."""
        first, second = add.args
        other = second if first is value else first
        if pair.last in taken:
            return Left(None, "the other operand of the addition is fused")
        if not isinstance(other, fx.Node) or other is value:
            return Left(None, "what is added is no other tensor")
        writes = self.in_place(add)
        pair.in_place = writes and first is value
        if writes and first is other:
            shared = self.aliases(other, besides=pair.last) - {add}  # whoever reads that one reads the op
            if any(n.op in ("placeholder", "get_attr") for n in shared):
                return Left(pair.kind, "the addition changes an argument of the block in place")
            if any(self.order[user] > self.order[add] for n in shared for user in n.users if user is not pair.last):
                return Left(pair.kind, "the addition changes a tensor in place that is read later")
        if self.calls[pair.first.target] > 1:
            return Left(pair.kind, "a BatchNorm that is called twice, once before an addition")
        if self.changed_between(pair.first.args[0], pair.first, add):  # type: ignore[arg-type]
            return Left(pair.kind, "the input of the BatchNorm is changed in place before the addition")
        return pair

    def _add_other(self, pair: Pair, allowed: Callable[[str, nn.Module, str], bool]) -> None:
        """Takes the BatchNorm of the other operand into the pair, if it can run as late as the addition, too."""
        if pair.add is None:
            return
        node = next(operand for operand in pair.add.args if operand is not pair.value)
        between: list[fx.Node] = []
        while isinstance(node, fx.Node) and len(node.users) == 1 and self.is_pass(node):
            between.append(node)
            node = node.args[0]
        module = self.module(node) if isinstance(node, fx.Node) else None
        if (
            isinstance(node, fx.Node)
            and module is not None
            and run.is_plain_norm(module)
            and len(node.users) == len(node.args) == 1
            and not node.kwargs
            and isinstance(node.args[0], fx.Node)
            and self.calls[node.target] == 1
            and all(run.untouched(self.module(n)) for n in between)  # type: ignore[arg-type]
            and not self.changed_between(node.args[0], node, pair.add)
            and allowed(pair.kind, module, str(node.target))
        ):
            pair.other, pair.after_other = node, between

    def pools(self, node: fx.Node) -> bool:
        """Whether node is a 2x2 average pool with stride 2, a module or a function, of one tensor."""
        module = self.module(node)
        if module is not None:
            return is_2x2_pool(module) and len(node.args) == 1 and not node.kwargs
        return node.target is F.avg_pool2d and pool_of(node) is not None

    def _pool(self, node: fx.Node) -> Pair | Left:
        reader, between, metadata = self.follow_pool(node)
        conv = None if reader is None else self.module(reader)
        if type(conv) is not nn.Conv2d or not run.is_1x1_conv(conv) or reader is None or len(reader.args) != 1:
            return Left(None, f"no 1x1 convolution follows{self._follower(reader)}")
        for n in (node, *between, reader):
            if n.op == "call_module" and not run.untouched(self.module(n)):  # type: ignore[arg-type]
                return Left(AVGPOOL_CONV1X1, f"a hook on {n.target}")
        changes = self.changed_between(input_of(node), node, self.graph.output_node())
        return Pair(
            AVGPOOL_CONV1X1, str(reader.target), node, reader, between, metadata=metadata, input_may_change=changes
        )

    def _conv(self, node: fx.Node) -> Pair | Left | None:
        """The pair of a 1x1 convolution and the pool after it: averages of sums are sums of averages."""
        reader, _, between = self.follow(node)
        if reader is None or not self.pools(reader) or isinstance(self._pool(reader), Pair):
            return None
        for n in (node, *between, reader):
            if n.op == "call_module" and not run.untouched(self.module(n)):  # type: ignore[arg-type]
                return Left(AVGPOOL_CONV1X1, f"a hook on {n.target}")
        return Pair(AVGPOOL_CONV1X1, str(node.target), node, reader, between, conv_first=True)

    def _follower(self, reader: fx.Node | None) -> str:
        if reader is None:
            return ""
        module = self.module(reader)
        what = type(module).__name__ if module is not None else getattr(reader.target, "__name__", str(reader.target))
        return f", but {what}"


def is_pass(module: Any, training: bool) -> bool:
    """Whether module returns its input unchanged in the mode `training` of its block."""
    cls = type(module)
    if cls is nn.Identity:
        return True
    if cls in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d):
        return module.p == 0 or not (training or module.training)
    if cls.__name__ == "DropPath" and cls.__module__.startswith("timm."):
        return not module.drop_prob or not (training or module.training)
    return False


def is_2x2_pool(module: Any) -> bool:
    return run.is_pool_class(type(module)) and run.is_2x2_pool(module)


def reads_metadata(node: fx.Node) -> bool:
    """Whether node reads the shape, number of dimensions, dtype or device of a tensor, and no more."""
    if node.op == "call_function":
        return node.target is getattr and node.args[1] in ("shape", *SAME_AFTER_POOL)
    return node.op == "call_method" and node.target in ("size", "dim") and not node.kwargs


def pool_of(node: fx.Node) -> dict[str, Any] | None:
    """The options of a call of F.avg_pool2d with 2x2 windows and stride 2 on a tensor; None of another."""
    names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given: dict[str, Any] = {"stride": None, "padding": 0, "ceil_mode": False, "divisor_override": None}
    given.update(zip(names, node.args, strict=False))
    given.update(node.kwargs)
    pool = nn.AvgPool2d(1)
    if any(isinstance(given.get(name), fx.Node) for name in names[1:]) or "kernel_size" not in given:
        return None
    pool.kernel_size, pool.stride, pool.padding = (
        given["kernel_size"],
        given["stride"] or given["kernel_size"],
        given["padding"],
    )
    pool.divisor_override = given["divisor_override"]
    return given if run.is_2x2_pool(pool) and isinstance(given.get("input"), fx.Node) else None


def input_of(node: fx.Node) -> fx.Node:
    """The tensor that a BatchNorm, convolution or pool reads, a module or a function."""
    return node.args[0] if node.args else node.kwargs["input"]  # type: ignore[return-value]


def to_inline(graph: fx.Graph, root: nn.Module, training: bool, refused: set[str]) -> set[str]:
    """Names of children that may hold half of a pair: they end in a BatchNorm or pool, or start with a convolution."""
    matcher = Matcher(graph, root, training)
    names = set()
    for node in graph.nodes:
        if matcher.pools(node):
            reader, _, _ = matcher.follow_pool(node)
            child = None if reader is None else matcher.module(reader)
            if reader is not None and child is not None and may_start_with_conv(child):
                names.add(str(reader.target))
            continue
        module = matcher.module(node)
        if module is None or run.is_norm_class(type(module)):
            continue
        if may_end_in_pool(module):
            reader, _, _ = matcher.follow_pool(node)
            child = None if reader is None else matcher.module(reader)
            if child is not None and (run.is_plain_conv1x1(child) or may_start_with_conv(child)):
                names.add(str(node.target))
        if not may_end_in_norm(module):
            continue
        reader, _, _ = matcher.follow(node)
        if reader is not None and matcher.is_add(reader):
            reader, _, _ = matcher.follow(reader)
        if reader is not None and matcher.is_relu(reader):
            names.add(str(node.target))
    return names - refused


def may_start_with_conv(module: nn.Module) -> bool:
    """Whether the first operation of a container could be a 1x1 convolution."""
    if isinstance(module, torch.jit.ScriptModule) or not run.untouched(module):
        return False
    cls = original_class(module)
    if cls.__module__.startswith("torch.nn") and cls.forward is not nn.Sequential.forward:
        return False
    first = next((child for child in module.children() if not is_pass(child, True)), None)
    return first is not None and (run.is_plain_conv1x1(first) or may_start_with_conv(first))


def may_end_in_pool(module: nn.Module) -> bool:
    """Whether the last operation of a container could be a 2x2 average pool."""
    if is_2x2_pool(module):
        return run.untouched(module)
    if isinstance(module, torch.jit.ScriptModule) or not run.untouched(module):
        return False
    cls = original_class(module)
    children = [child for child in module.children() if not is_pass(child, True)]
    if cls.forward is nn.Sequential.forward:
        return bool(children) and may_end_in_pool(children[-1])
    return not cls.__module__.startswith("torch.nn") and any(map(may_end_in_pool, children))


def may_end_in_norm(module: nn.Module) -> bool:
    """Whether the last operation of a container could be a plain BatchNorm."""
    if run.is_norm_class(type(module)):
        return run.is_plain_norm(module)
    if isinstance(module, torch.jit.ScriptModule) or not run.untouched(module):
        return False
    cls = original_class(module)
    if cls.forward is nn.Sequential.forward:
        children = [child for child in module.children() if not is_pass(child, True)]
        return bool(children) and may_end_in_norm(children[-1])
    if cls.__module__.startswith("torch.nn"):
        return False
    return any(run.is_norm_class(type(m)) for m in module.modules())
