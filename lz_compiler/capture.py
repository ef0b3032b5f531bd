"""A graph as LayerZero sees it: facts about nodes on concrete sizes, values of frozen weights, and a fingerprint."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from . import ops, torch_private
from .types import TensorSpec

aten, prims = torch.ops.aten, torch.ops.prims

# Nodes that only rename a shape: their input and output are one tensor for the planner.
RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim)
# Nodes that are another view of their input's memory.
VIEWS = (
    aten.permute.default, aten.transpose.int, aten.t.default, aten.expand.default, aten.slice.Tensor, aten.select.int,
    aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.alias.default, aten.detach.default,
    aten.as_strided.default, aten.squeeze.dims, aten.squeeze.default, aten.diagonal.default,
)  # fmt: skip
# Nodes that write values into a part of their first input.
UPDATES = (aten.index_put.default, aten.index_copy.default, aten.slice_scatter.default, aten.scatter.src)


def updated(node: fx.Node) -> fx.Node | None:
    """The buffer that the graph was given, and that a node writes into (a KV cache): it is copied back there at the end."""
    given = node.args[0] if node.target in UPDATES else None
    if not isinstance(given, fx.Node) or given.op != "placeholder":
        return None
    return given if any(u.target is aten.copy_.default and u.args[0] is given for u in node.users) else None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def spec_of(value: Tensor) -> TensorSpec:
    """Shape and strides with hints in place of symbols."""
    shape = tuple(torch_private.hint(s) for s in value.shape)
    strides = tuple(torch_private.hint(s) for s in value.stride()) if value.layout is torch.strided else ()
    return TensorSpec(shape, strides, dtype_name(value.dtype), value.device.type)


def is_dynamic(value: Tensor) -> bool:
    return any(not isinstance(s, int) for s in value.shape)


class GraphView:
    """A functional ATen graph with what planning asks about it.

    `frozen` maps placeholders to the real tensors behind them, where these never change.
    """

    def __init__(self, graph: fx.Graph, frozen: Mapping[fx.Node, Tensor] | None = None) -> None:
        self.graph = graph
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.by_name = {node.name: node for node in self.nodes}
        self.frozen = dict(frozen or {})
        self._constants: dict[fx.Node, Tensor | None] = {}
        self._is_constant: dict[fx.Node, bool] = {}
        self._specs: dict[fx.Node, TensorSpec] = {}

    def spec(self, node: fx.Node) -> TensorSpec:
        if node not in self._specs:
            self._specs[node] = spec_of(node.meta["val"])
        return self._specs[node]

    def module(self, name: str) -> str:
        """The innermost module whose code made a node, as `blocks.3.attention.q`; "" where the capture does not say."""
        meta = self.by_name[name].meta
        stack = meta.get("nn_module_stack") or meta.get("fwd_nn_module_stack") or {}
        path = str(list(stack.values())[-1][0]) if stack else ""
        path = re.sub(r"(\._modules)?\[['\"]?([^'\"\]]*)['\"]?\]", r".\2", path)
        return re.sub(r"^L\.\w+\.?", "", path)  # Dynamo's name for the local variable

    def base(self, node: fx.Node) -> fx.Node:
        """The node whose elements `node` has, in the same order: reshapes stripped."""
        while node.op == "call_function" and node.target in RESHAPES:
            node = node.args[0]  # type: ignore[assignment]
        return node

    def constant(self, node: fx.Node) -> Tensor | None:
        """The value of a node that depends on frozen weights alone, or None."""
        if node in self.frozen:
            return self.frozen[node]
        if node not in self._constants:
            self._constants[node] = self._evaluate(node)
        return self._constants[node]

    def is_constant(self, node: fx.Node) -> bool:
        if node not in self._is_constant:
            inputs = node.all_input_nodes
            folds = _foldable(node) and bool(inputs) and all(self.is_constant(n) for n in inputs)
            self._is_constant[node] = node in self.frozen or folds
        return self._is_constant[node]

    def _evaluate(self, node: fx.Node) -> Tensor | None:
        if not self.is_constant(node):
            return None
        args, kwargs = pytree.tree_map_only(fx.Node, self.constant, (node.args, node.kwargs))
        with torch_private.real_tensors():
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        return value if isinstance(value, Tensor) else None


def _foldable(node: fx.Node) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    if torch_private.is_collective(target):  # the other ranks may not be planning
        return False
    return isinstance(node.meta.get("val"), Tensor) and torch.Tag.nondeterministic_seeded not in target.tags


def tensor_value(node: object) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _describe(value: object, index: Mapping[fx.Node, int]) -> str:
    """An argument as text: nodes by position, tensors by their facts, everything else by value."""
    if isinstance(value, fx.Node):
        return f"%{index[value]}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_describe(v, index) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_describe(v, index)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({_describe((value.start, value.stop, value.step), index)})"
    if isinstance(value, torch.SymInt):
        return torch_private.symbolic_range(value)
    if isinstance(value, torch.device):
        return _relative(value)
    return repr(value) if isinstance(value, (int, float, str, bool, complex, type(None))) else str(value)


def _meta(value: object) -> str:
    if isinstance(value, Tensor):
        sizes = [s if isinstance(s, int) else torch_private.symbolic_range(s) for s in value.shape]
        strides = list(value.stride()) if value.layout is torch.strided else str(value.layout)
        grad = "g" if value.requires_grad else ""
        mesh = getattr(value, "device_mesh", None)  # of a DTensor
        placed = "" if mesh is None else f"{getattr(value, 'placements', '')}{tuple(mesh.shape)}"
        return f"{value.dtype}{sizes}{[str(s) for s in strides]}{_relative(value.device)}{grad}{placed}"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return torch_private.symbolic_range(value)
    return type(value).__name__


def _relative(device: torch.device) -> str:
    """Ranks of one machine have a current device each: `cuda:0` is the current one, `cuda:1` the next."""
    if device.type != "cuda" or device.index is None or not torch.cuda.is_available():
        return str(device)
    return f"cuda:{(device.index - torch.cuda.current_device()) % torch.cuda.device_count()}"


def _arguments(node: fx.Node) -> Any:
    """What a call is given; of a collective only nodes: a group's name is another on each rank."""
    return node.all_input_nodes if torch_private.is_collective(node.target) else (node.args, node.kwargs)


def fingerprint(gm: fx.GraphModule, extra: Sequence[str] = ()) -> str:
    """xxhash of everything that decides what a graph computes and on what: operators, arguments, wiring, shapes, strides,
    dtypes, devices, symbolic ranges. Names do not enter."""
    import xxhash

    digest = xxhash.xxh3_128()
    index = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in gm.graph.nodes:
        parts = [node.op]
        if node.op == "call_module":
            module = gm.get_submodule(node.target)
            parts += [repr(module), *(_meta(p) for p in (*module.parameters(), *module.buffers()))]
        elif node.op == "get_attr":
            parts.append(_attribute(gm, node.target))
        elif node.op != "placeholder":
            parts.append(node.target if isinstance(node.target, str) else _qualified(node.target))
        parts.append(_describe(_arguments(node), index))
        value = node.meta.get("val", node.meta.get("example_value"))
        parts += [_meta(v) for v in pytree.tree_leaves(value)]
        digest.update("\x1f".join(parts).encode())
    for text in extra:
        digest.update(b"\x1e" + text.encode())
    return digest.hexdigest()


def plan_key(graph: fx.Graph, frozen: Mapping[fx.Node, Tensor]) -> str:
    """By what a plan is found again: it speaks of nodes by name, of weights as frozen or not, and of masks by what the weights say that
    they are made of."""
    module = graph.owning_module
    assert module is not None
    values = (f"mask {n.name} {_hash(frozen[n])}" for n in frozen.keys() & _behind_masks(graph))
    return fingerprint(module, [*(n.name for n in graph.nodes), *(f"frozen {n.name}" for n in frozen), *sorted(values)])


def _behind_masks(graph: fx.Graph) -> set[fx.Node]:
    """The nodes from which masks are computed."""
    found: set[fx.Node] = set()
    waiting = [n.args[3] for n in graph.nodes if n.target is ops.sdpa and isinstance(n.args[3], fx.Node)]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _hash(value: Tensor) -> str:
    import xxhash

    with torch_private.real_tensors():
        return xxhash.xxh3_64_hexdigest(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _attribute(gm: fx.GraphModule, name: str) -> str:
    value = functools.reduce(getattr, name.split("."), gm)
    if isinstance(value, fx.GraphModule):
        return fingerprint(value)
    return _meta(value)


def _qualified(target: Any) -> str:
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', str(target))}:{target}".split(" at 0x")[0]


def propagate(node: fx.Node) -> None:
    """Set `node.meta['val']` by running its target on its arguments' fake values."""
    args, kwargs = pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], (node.args, node.kwargs))
    node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(list(values)) if isinstance(v, Tensor)]
