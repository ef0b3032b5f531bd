"""Apply: the Plan becomes the graph. Chosen kernels become calls, conversions become nodes, the rest stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .. import backends, semantics, torch_private
from ..capture import RESHAPES, VIEWS, GraphView, propagate
from ..problem import CALL, LOOP, VIEW
from ..types import Candidate, Choice, Format
from .output_strides import output_strides, restore_output_strides_pass

aten, prims = torch.ops.aten, torch.ops.prims


class GraphEmitter:
    """Places a kernel's operators in the graph at the current insertion point, with their fake values."""

    def __init__(self, view: GraphView) -> None:
        self.view, self.graph = view, view.graph
        self.mode = torch_private.fake_mode_of(view.graph)
        self.label = ""
        self.emitted: dict[str, fx.Node] = {}
        self.subgraphs: dict[str, fx.Node] = {}

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a node, or return the one that already computes this (layers share a mask in a kernel's format)."""
        key = repr((op, args, kwargs))
        if key not in self.emitted:
            self.emitted[key] = self._call(op, args, kwargs)
        return self.emitted[key]

    loop = call

    def _call(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        if torch_private.is_triton_op(op):
            return self._inline(op, args, kwargs)
        node = self.graph.call_function(op, args, kwargs)
        with self.mode:
            propagate(node)
        node.meta["layerzero"] = self.label
        return node

    def _inline(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """A Triton operator as its launches: Inductor compiles them with the rest, and no Python of ours runs."""
        values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
        with self.mode:
            traced = torch_private.trace_triton(op, values, kwargs)
        inputs = [a for a in args if isinstance(a, fx.Node)]
        before = set(self.graph.nodes)
        result = self.graph.graph_copy(traced, dict(zip(traced.find_nodes(op="placeholder"), inputs, strict=True)))
        for node in self.graph.nodes:
            if node not in before:
                node.meta["layerzero"] = self.label
        assert isinstance(result, fx.Node)
        return result

    def item(self, values: fx.Node, index: int) -> fx.Node:
        import operator

        return self.call(operator.getitem, values, index)

    def constant(self, make: Callable[..., Tensor], *values: fx.Node) -> fx.Node:
        known = [self.view.constant(v) for v in values]
        assert all(k is not None for k in known), "constant() of something that is not frozen"
        module = self.graph.owning_module
        assert module is not None
        name = f"_layerzero_{len([key for key in module._buffers if key.startswith('_layerzero_')])}"
        with torch_private.real_tensors(), torch_private.packing(name):
            tensor = make(*(k.detach() for k in known if k is not None))
        module.register_buffer(name, tensor)
        node = self.graph.get_attr(name)
        self.mode.allow_non_fake_inputs = True  # lowering runs shape rules on the constant itself
        strides = None if tensor.layout is not torch.strided else tensor.stride()
        with self.mode:
            like = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            node.meta["val"] = (
                like if strides is None else torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
            )
        node.meta["layerzero"] = self.label
        return node

    def subgraph(self, function: Callable[..., Any], *examples: Tensor) -> fx.Node:
        traced = torch_private.trace_function(function, examples)
        if traced.code not in self.subgraphs:
            module, name = self.graph.owning_module, f"_layerzero_function_{len(self.subgraphs)}"
            assert module is not None
            module.add_module(name, traced)
            node = self.subgraphs[traced.code] = self.graph.get_attr(name)
            node.meta["val"] = traced  # what shape rules of operators that take it are given
        return self.subgraphs[traced.code]


class _Rewriter:
    """One walk over the graph in its own order."""

    def __init__(self, view: GraphView, choices: Sequence[Choice]) -> None:
        self.view, self.emit = view, GraphEmitter(view)
        self.formats: dict[tuple[str, str], fx.Node] = {}  # (tensor, dtype) -> node, where a kernel made another dtype
        self.weights: dict[fx.Node, fx.Node] = {}  # frozen ones, channels last
        self.current: dict[fx.Node, fx.Node] = {}  # original node -> what computes its value now
        self.dirty: set[fx.Node] = set()
        self.anchors: dict[str, Candidate] = {}
        self.kept: dict[str, Candidate] = {}  # convolutions that stay
        for choice in choices:
            c = choice.candidate
            if c.as_is:
                if c.region.op == "conv":
                    self.kept[c.region.nodes[-1]] = c
            elif c.kernel not in (LOOP, VIEW, CALL):
                # A region's last node is the first place where all its inputs exist; merged products read one input.
                self.anchors[c.region.nodes[0] if c.region.op == "merged_linear" else c.region.nodes[-1]] = c

    def run(self) -> int:
        for node in self.view.nodes:
            if node.op != "call_function":
                continue
            candidate = self.anchors.get(node.name)
            if candidate is not None:
                with self.view.graph.inserting_before(node):
                    self._emit(candidate)
            elif node not in self.current and any(n in self.dirty for n in node.all_input_nodes):
                if node.name in self.kept:
                    with self.view.graph.inserting_before(node):
                        self._keep(node, self.kept[node.name])
                self._refresh(node)
        return len(self.anchors)

    def _keep(self, node: fx.Node, candidate: Candidate) -> None:
        """Give a convolution its image as eager has it: that is what it was priced with, and it would follow any layout it finds."""
        image = node.all_input_nodes[0]
        if candidate.in_formats[0].layout == "strided" and image in self.dirty and not image.meta["val"].is_contiguous():
            node.replace_input_with(image, self.emit.call(aten.clone.default, image, memory_format=torch.contiguous_format))

    def _refresh(self, node: fx.Node) -> None:
        """Recompute the fake value of a node whose inputs changed strides."""
        before = node.meta.get("val")
        with self.emit.mode:
            propagate(node)
        after = node.meta["val"]
        if not isinstance(before, Tensor) or before.stride() != after.stride():
            self.dirty.add(node)

    def _emit(self, candidate: Candidate) -> None:
        params = dict(candidate.params)
        self.emit.label = candidate.kernel
        values: dict[str, Any] = {}
        for role, name, fmt in zip(params["roles"], params["values"], candidate.in_formats, strict=True):  # type: ignore[call-overload]
            values[role] = self._value(self.view.by_name[name], fmt)
        kernel = backends.kernel(candidate.kernel)
        if kernel.prepare is not None:
            values = dict(kernel.prepare(self.emit, values, params))
        results = kernel.run(self.emit, values, params)
        if not isinstance(results, tuple):
            results = (results,)
        for name, fmt, result in zip(candidate.region.outputs, candidate.out_formats, results, strict=True):
            self._bind(self.view.by_name[name], fmt, result, params)

    def _bind(self, root: fx.Node, fmt: Format, result: fx.Node, params: dict[str, Any]) -> None:
        """Let `result` take the place of `root`: same shape and dtype, strides as the kernel made them."""
        value: Tensor = root.meta["val"]
        if params.get("out_reshape"):
            result = self._reshaped(self.view.by_name[params["out_reshape"]], result)
        if result.meta["val"].dtype != value.dtype:
            self.formats[root.name, fmt.dtype] = result
            result = self.emit.call(prims.convert_element_type.default, result, value.dtype)
        self.current[root] = result
        root.replace_all_uses_with(result)
        if result.meta["val"].stride() != value.stride():
            self.dirty.add(result)

    def _reshaped(self, node: Any, result: fx.Node) -> fx.Node:
        """A product's result in the shape of `node`. A reshape says the whole shape; what adds or drops a 1 depends on the one before."""
        if node.target in (aten.unsqueeze.default, aten.squeeze.dim):
            return self.emit.call(node.target, self._reshaped(node.args[0], result), node.args[1])
        return self.emit.call(aten.reshape.default, result, node.args[1]) if node.target in RESHAPES else result

    def _value(self, node: fx.Node, fmt: Format) -> fx.Node:
        """`node`'s value in a format, converting where nobody made it so."""
        if fmt.layout == "packed":
            return node
        out = self._in_dtype(node, fmt.dtype)
        value: Tensor = out.meta["val"]
        last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
        if fmt.layout == "channels_last" and value.dim() == 4 and not last:
            if out is node and self.view.constant(node) is not None:  # a frozen weight: once, and not in every call
                return self._ahead(node)
            out = self.emit.call(aten.clone.default, out, memory_format=torch.channels_last)
        return out

    def _ahead(self, weight: fx.Node) -> fx.Node:
        if weight not in self.weights:
            self.weights[weight] = self.emit.constant(lambda w: w.contiguous(memory_format=torch.channels_last), weight)
        return self.weights[weight]

    def _in_dtype(self, node: fx.Node, dtype: str) -> fx.Node:
        now = self.current.get(node, node)
        if now.meta["val"].dtype is semantics.torch_dtype(dtype):
            return now
        known = self.formats.get((node.name, dtype))
        if known is not None:
            return known
        source = node.args[0] if node.op == "call_function" and node.target in (*RESHAPES, *VIEWS) else None
        if isinstance(source, fx.Node) and (origin := self._made(source, dtype)) is not None:
            made = self.emit.call(node.target, origin, *node.args[1:], **node.kwargs)
        else:
            made = self.emit.call(prims.convert_element_type.default, now, semantics.torch_dtype(dtype))
        self.formats[node.name, dtype] = made
        return made

    def _made(self, node: fx.Node, dtype: str) -> fx.Node | None:
        """`node` in `dtype` if a kernel made it so, through views; None if it would need a conversion."""
        original = next((o for o, n in self.current.items() if n is node), node)
        known = self.formats.get((original.name, dtype))
        if known is not None:
            return known
        if node.op != "call_function" or node.target not in (*RESHAPES, *VIEWS) or not isinstance(node.args[0], fx.Node):
            return None
        origin = self._made(node.args[0], dtype)
        return None if origin is None else self.emit.call(node.target, origin, *node.args[1:], **node.kwargs)


def apply_plan(view: GraphView, choices: Sequence[Choice]) -> int:
    """Rewrite `view.graph` in place; returns how many regions run a kernel that was not there before."""
    before = output_strides(view.graph)
    count = _Rewriter(view, choices).run()
    if count:
        restore_output_strides_pass(view.graph, before)
        view.graph.eliminate_dead_code()
    return count
