"""Replaces the pairs of a block's graph by calls of `fasttricks.nn.run`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn

from ..nn import run
from .match import AVGPOOL_CONV1X1, BN_ADD_RELU, BN_RELU, SAME_AFTER_POOL, Pair, input_of, pool_of
from .trace import TYPE_ASKED


def rewrite(
    graph: fx.Graph, pairs: list[Pair], min_elements: int | None, ceil_mode_of_reader: bool | None = None
) -> None:
    """Makes every pair one call of a function of `fasttricks.nn.run`, where the pair's first module was called.

    An addition stays where it was, as its residual may be computed between the two. ceil_mode_of_reader: that of a pool
    by which the next block reads the result, if there is one. Where the forward asked for the type of what a module
    returned, and was told that it is a tensor, the graph checks it.
    """
    limit: dict[str, Any] = {} if min_elements == 0 else {"min_elements": min_elements}

    def options_of_pool(pair: Pair) -> dict[str, Any]:
        options = dict(limit) if min_elements else {}  # the default limit is of BatchNorms
        return {"may_change": True, **options} if pair.input_may_change else options

    function: Callable[..., Any]
    for pair in pairs:
        x = input_of(pair.first)
        with graph.inserting_before(pair.add or pair.first):
            if pair.kind != AVGPOOL_CONV1X1:
                norm = graph.get_attr(pair.name)
            if pair.kind == BN_RELU:
                fused = graph.call_function(run.norm_relu, (norm, x), dict(limit))
            elif pair.kind == BN_ADD_RELU:
                assert pair.add is not None  # its operands may have been replaced by earlier pairs
                options = {"in_place": True, **limit} if pair.in_place else dict(limit)
                if pair.other is not None:
                    other = graph.get_attr(str(pair.other.target))
                    arguments = (norm, x, other, pair.other.args[0])
                    fused = graph.call_function(run.norm_add_norm_relu, arguments, options)
                else:
                    residual = next(operand for operand in pair.add.args if operand is not pair.value)
                    if pair.ends_block and ceil_mode_of_reader is not None:
                        options["ceil_mode_of_reader"] = ceil_mode_of_reader
                    fused = graph.call_function(run.norm_add_relu, (norm, x, residual), options)
            elif pair.pool.op == "call_module":
                pool = graph.get_attr(str(pair.pool.target))
                shape = graph.call_function(run.pooled_shape_of_module, (pool, x)) if pair.metadata else None
                function = run.conv1x1_avgpool_of_modules if pair.conv_first else run.avgpool_conv1x1_of_modules
                fused = graph.call_function(function, (pool, graph.get_attr(pair.name), x), options_of_pool(pair))
            else:
                ceil_mode = (pool_of(pair.pool) or {})["ceil_mode"]
                shape = graph.call_function(run.pooled_shape, (x, ceil_mode)) if pair.metadata else None
                function = run.conv1x1_avgpool_of if pair.conv_first else run.avgpool_conv1x1_of
                fused = graph.call_function(function, (graph.get_attr(pair.name), x, ceil_mode), options_of_pool(pair))
        for node in pair.metadata:
            _read_from(node, x, shape)
        pair.last.replace_all_uses_with(fused)
        for node in (pair.last, *reversed(pair.between), pair.first):
            graph.erase_node(node)
        if pair.other is not None:
            for node in (*pair.after_other, pair.other):
                graph.erase_node(node)
    for node in [node for node in graph.nodes if TYPE_ASKED in node.meta]:
        with graph.inserting_after(node):
            tensor = graph.call_function(run.tensor_of, (node, str(node.target)))
        node.replace_all_uses_with(tensor, delete_user_cb=lambda user, tensor=tensor: user is not tensor)


def _read_from(node: fx.Node, x: Any, shape: Any) -> None:
    """Makes node read what it did of a pooled value from the input of the pool, and from the pooled shape."""
    if node.target == "dim" or (node.args[1:] and node.args[1] in SAME_AFTER_POOL):
        node.replace_input_with(node.args[0], x)  # type: ignore[arg-type]
        return
    value = shape
    if node.target == "size" and len(node.args) == 2:
        with node.graph.inserting_before(node):
            value = node.graph.call_function(operator.getitem, (shape, node.args[1]))
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def ceil_mode_of(pool: fx.Node, root: nn.Module) -> bool:
    """Of a 2x2 pool in the graph of root, a module or a function."""
    if pool.op == "call_module":
        return bool(root.get_submodule(str(pool.target)).ceil_mode)
    return bool((pool_of(pool) or {})["ceil_mode"])


def modules_of(pairs: list[Pair]) -> Iterator[tuple[str, str]]:
    """(name, what it must still be) of the modules that the pairs call no longer by themselves."""
    for pair in pairs:
        if pair.kind == AVGPOOL_CONV1X1:
            if pair.pool.op == "call_module":
                yield str(pair.pool.target), "pool"
            yield pair.name, "conv"
        else:
            yield pair.name, "norm"
            if pair.other is not None:
                yield str(pair.other.target), "norm"
        for node in (*pair.between, *pair.after_other, *(() if pair.kind == AVGPOOL_CONV1X1 else (pair.last,))):
            if node.op == "call_module" and node.target != pair.name:
                yield str(node.target), "relu" if node is pair.last else "pass"
