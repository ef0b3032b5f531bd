"""Recognition: which regions of a graph have a meaning that some kernel computes whole.

Activations are small Python functions, traced with Inductor's own decompositions so that
they look like the graph they are searched in. What surrounds them (products, convolutions, per-channel steps, residuals,
attention with grouped heads) is read off the graph by following edges.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from . import ops, semantics, torch_private
from .backends.base import SelectionContext
from .capture import RESHAPES, VIEWS, GraphView, is_dynamic, spec_of, tensor_value, updated
from .kv_cache import DEVICES, DTYPES, KVCacheSpec
from .masks import describe, infer_mask
from .options import Options
from .types import Region, TensorSpec

aten, prims = torch.ops.aten, torch.ops.prims


# --- activations --------------------------------------------------------------------------------------------------------


def gelu_new(x: Tensor) -> Tensor:
    """The tanh approximation as written out by hand in GPT-2 and its descendants (Hendrycks & Gimpel 2016, eq. 2)."""
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


PATTERNS: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    *semantics.ACTIVATIONS.items(),
    ("gelu_tanh", gelu_new),
)


@functools.cache
def _traced(dtype: torch.dtype) -> tuple[tuple[str, fx.Node], ...]:
    """(name, output node) of each activation, decomposed as Inductor would for this dtype."""
    table = torch_private.decompositions()
    with torch_private.real_tensors():
        graphs = [(name, make_fx(_unary(fn), decomposition_table=table)(torch.ones(2, 3, dtype=dtype))) for name, fn in PATTERNS]
    return tuple((name, gm.graph.output_node().args[0]) for name, gm in graphs)  # type: ignore[misc]


def _unary(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` with one argument only: make_fx traces every parameter it sees."""
    return lambda x: fn(x)


def _same(pattern: Any, node: Any, found: dict[Any, Any]) -> bool:
    """Structural equality of a pattern and a graph's node; `found` binds pattern nodes to graph nodes."""
    if not isinstance(pattern, fx.Node):
        if isinstance(pattern, (list, tuple)) and isinstance(node, (list, tuple)) and len(pattern) == len(node):
            return all(_same(p, n, found) for p, n in zip(pattern, node, strict=True))
        if isinstance(pattern, float) and isinstance(node, (int, float)):
            return abs(pattern - node) <= 1e-6 * abs(pattern)
        return bool(pattern == node)
    if not isinstance(node, fx.Node):
        return False
    if pattern in found:
        return found[pattern] is node
    found[pattern] = node
    if pattern.op == "placeholder":
        return True
    return pattern.target is node.target and _same(pattern.args, node.args, found) and pattern.kwargs == node.kwargs


@dataclass(frozen=True, slots=True)
class Activation:
    name: str
    source: fx.Node
    nodes: tuple[fx.Node, ...]


def activation(node: fx.Node) -> Iterator[Activation]:
    """The activations whose last node is `node`."""
    value = tensor_value(node)
    if node.op != "call_function" or value is None or not value.dtype.is_floating_point:
        return
    for name, output in _traced(value.dtype):
        found: dict[Any, Any] = {}
        if output.target is node.target and _same(output, node, found):
            source = next(n for p, n in found.items() if p.op == "placeholder")
            yield Activation(name, source, tuple(n for p, n in found.items() if p.op != "placeholder"))
            return


# --- regions ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Draft:
    """A region under construction: what it covers, what it reads by role, and its parameters."""

    op: str
    nodes: list[fx.Node]
    inputs: dict[str, fx.Node]
    params: dict[str, Any] = field(default_factory=dict)
    kv_cache: KVCacheSpec | None = None

    @property
    def root(self) -> fx.Node:
        return self.nodes[-1]

    def extended(self, nodes: Sequence[fx.Node], inputs: dict[str, fx.Node] | None = None, **params: Any) -> _Draft:
        return _Draft(self.op, [*self.nodes, *nodes], {**self.inputs, **(inputs or {})}, {**self.params, **params})


def _pair(values: Any) -> tuple[int, int]:
    """A number for each spatial dimension: one alone stands for both."""
    return (*values, *values)[:2]


_kv_cache_spec = functools.cache(KVCacheSpec)  # one object for all layers and graphs that read the same kind of cache


class Recogniser:
    """Finds regions in one graph. `regions()` yields a SelectionContext for each; they overlap, the solver chooses."""

    def __init__(self, view: GraphView, options: Options) -> None:
        self.view, self.options = view, options
        self.activations: dict[fx.Node, Activation] = {}
        for node in view.nodes:
            for found in activation(node):
                self.activations[view.base(found.source)] = found

    def regions(self) -> Iterator[SelectionContext]:
        linears: list[_Draft] = []
        for node in self.view.nodes:
            if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
                continue
            draft = self._core(node)
            if draft is None:
                continue
            absorbing = list(self._longer(draft))
            draft.params["absorbed"] = any(d.params.get("affine") and self._folds(d) for d in absorbing)
            yield self._context(draft, default=True)
            for longer in absorbing:
                yield self._context(longer)
            if draft.op == "linear":
                linears.append(draft)
        if self.options.freeze:
            for merged in (*self._merged(linears), *self._gated(linears)):
                yield self._context(merged)

    def _core(self, node: fx.Node) -> _Draft | None:
        if node.target in (aten.mm.default, aten.addmm.default):
            return self._linear(node)
        if node.target is aten.bmm.default:
            return _Draft("bmm", [node], {"a": node.args[0], "b": node.args[1]})  # type: ignore[dict-item]
        if node.target is aten.convolution.default:
            return self._conv(node)
        if node.target is ops.sdpa:
            return self._attention(node)
        if node.target is ops.paged_attention:
            return self._paged_attention(node)
        if torch_private.is_all_reduce(node.target):
            return self._all_reduce(node)
        return None

    def _all_reduce(self, node: fx.Node) -> _Draft | None:
        x, reduce, group = node.args
        spec, ranks = self.view.spec(node), torch_private.group_size(group)
        if not isinstance(x, fx.Node) or not isinstance(group, str) or ranks is None:
            return None
        nbytes = math.prod(spec.shape) * node.meta["val"].element_size()
        everyone = ranks == torch.distributed.get_world_size()
        params = {"reduce": reduce, "group": group if everyone else "", "world": everyone, "ranks": ranks, "nbytes": nbytes,
                  "piece": nbytes // ranks if nbytes % ranks == 0 else 1, "dynamic_rows": is_dynamic(node.meta["val"])}  # fmt: skip
        return _Draft("all_reduce", [node], {"x": x}, params)

    def _linear(self, node: fx.Node) -> _Draft | None:
        *bias, x, right = node.args
        if node.kwargs or not isinstance(x, fx.Node) or not isinstance(right, fx.Node):
            return None  # addmm with beta or alpha is not a linear layer
        inputs, transposed = {"x": x, "w": right}, True
        if right.target is aten.permute.default and right.args[1] == [1, 0]:
            inputs, transposed = {"x": x, "w": right.args[0]}, False  # type: ignore[dict-item]
        if bias:
            inputs["bias"] = bias[0]  # type: ignore[assignment]
        rows = x.meta["val"].shape[0]
        width = node.meta["val"].shape[1]
        if not isinstance(width, int):
            return None  # a weight has a fixed number of rows
        if bias and ((value := tensor_value(bias[0])) is None or tuple(value.shape) != (width,)):
            return None  # addmm broadcasts what it adds, a layer's bias is one value a column
        params = {
            "transposed": transposed,
            "rows": spec_of(x.meta["val"]).shape[0],
            "width": width,
            "act": None,
            "binary": None,
        }
        return _Draft("linear", [node], inputs, {**params, "dynamic_rows": not isinstance(rows, int), "out_reshape": ""})

    def _conv(self, node: fx.Node) -> _Draft | None:
        x, w, bias, stride, padding, dilation, transposed, _, groups = node.args
        value = tensor_value(x)
        if transposed or value is None or value.dim() != 4 or not all(isinstance(p, int) for p in padding):  # type: ignore[union-attr]
            return None
        inputs = {"x": x, "w": w, **({"bias": bias} if bias is not None else {})}
        rows = self.view.spec(node).shape
        params = {
            "stride": _pair(stride), "padding": _pair(padding), "dilation": _pair(dilation), "groups": groups,
            "size": spec_of(value).shape, "w_shape": self.view.spec(w).shape, "affine": (), "act": None, "binary": None,  # type: ignore[arg-type]
            "rows": rows[0] * rows[2] * rows[3], "dynamic_rows": is_dynamic(value),
        }  # fmt: skip
        return _Draft("conv", [node], inputs, params)  # type: ignore[arg-type]

    def _attention(self, node: fx.Node) -> _Draft:
        q, k, v, mask, causal, scale, gqa = node.args
        inputs = {"q": q, "k": k, "v": v, **({"mask": mask} if mask is not None else {})}
        dynamic = any(is_dynamic(n.meta["val"]) for n in inputs.values())  # type: ignore[union-attr]
        (queries,), (keys,) = (self.view.spec(n).shape[-2:-1] for n in (q, k))  # type: ignore[arg-type]
        # As text, since comparing symbolic sizes would guard on the answer.
        square = str(q.meta["val"].shape[-2]) == str(k.meta["val"].shape[-2])  # type: ignore[union-attr]
        params = {
            "causal": causal, "scale": scale, "gqa": gqa, "dynamic_rows": dynamic, "queries": queries, "keys": keys,
            "shift": 0, "window": 0, "uniform": False, "square": square,
        }  # fmt: skip
        return _Draft("attention", [node], inputs, params, self._contiguous_cache(k, v))  # type: ignore[arg-type]

    def _contiguous_cache(self, k: Any, v: Any) -> KVCacheSpec | None:
        """The cache that keys and values are read from, where both are of buffers (B, G, tokens, D) that the graph writes into."""
        found = []
        for node in (k, v):
            while node.op == "call_function" and node.target in (*RESHAPES, *VIEWS, aten.clone.default):
                node = node.args[0]
            buffer = updated(node) if node.op == "call_function" else None
            if buffer is None:
                return None
            found.append(self.view.spec(buffer))
        keys, values = found
        if keys != values or len(keys.shape) != 4 or keys.dtype not in DTYPES or keys.device not in DEVICES:
            return None
        if keys.stride != tuple(math.prod(keys.shape[dim + 1 :]) for dim in range(4)):
            return None
        heads, head = keys.shape[1], keys.shape[3]
        return _kv_cache_spec(
            strategy="contiguous", layout="HND", kv_heads=heads, head_size=head, dtype=keys.dtype, device=keys.device
        )  # fmt: skip

    def _paged_attention(self, node: fx.Node) -> _Draft:
        inputs = dict(zip(("q", "k_cache", "v_cache", "block_table", "seq_lens"), node.args, strict=False))
        given: dict[str, Any] = dict(zip(("scale", "layout"), node.args[5:], strict=False))  # what is left out has its default
        scale, layout = given.get("scale"), given.get("layout", "NHD")
        cache, table = self.view.spec(inputs["k_cache"]), self.view.spec(inputs["block_table"]).shape  # type: ignore[arg-type]
        page_size, kv_heads = cache.shape[1:3] if layout == "NHD" else cache.shape[2:0:-1]
        params = {
            "scale": scale, "layout": layout, "page_size": page_size, "keys": table[1] * page_size,
            "pages": min(cache.shape[0], math.prod(table)),
            "dynamic_rows": any(is_dynamic(n.meta["val"]) for n in inputs.values()),  # type: ignore[union-attr]
        }  # fmt: skip
        spec = _kv_cache_spec(
            strategy="paged", page_size=page_size, layout=layout, kv_heads=kv_heads, head_size=cache.shape[3],
            dtype=cache.dtype, device=cache.device,
        )  # fmt: skip
        return _Draft("paged_attention", [node], inputs, params, spec)  # type: ignore[arg-type]

    # What may follow, absorbed step by step; each step yields a longer region.

    def _longer(self, draft: _Draft) -> Iterator[_Draft]:
        if draft.op == "attention":
            grouped = self._grouped_heads(draft)
            for one in (draft, grouped):
                understood = self._understood_mask(one) if one is not None else None
                yield from (d for d in (one if one is not draft else None, understood) if d is not None)
        elif draft.op == "linear":
            yield from self._epilogues(draft)
        elif draft.op == "conv":
            yield from self._conv_epilogues(draft)

    def _only_reader(self, draft: _Draft) -> tuple[list[fx.Node], list[fx.Node]]:
        """The nodes that read the draft's result, through reshapes, and these reshapes."""
        reshapes: list[fx.Node] = []
        pending, readers = [draft.root], []
        while pending:
            for user in pending.pop().users:
                if user.op == "call_function" and user.target in RESHAPES:
                    reshapes.append(user)
                    pending.append(user)
                else:
                    readers.append(user)
        return list(dict.fromkeys(readers)), reshapes

    def _with_activation(self, draft: _Draft) -> _Draft | None:
        found = self.activations.get(self.view.base(draft.root))
        readers, reshapes = self._only_reader(draft)
        if found is None or not readers or not set(readers) <= set(found.nodes) or (draft.op == "conv" and reshapes):
            return None  # a convolution's result is an image, also for what it absorbs
        inside = set(found.nodes)
        if any(user not in inside for n in found.nodes if n is not found.nodes[0] for user in n.users):
            return None
        last = found.nodes[0]
        order = sorted([*reshapes, *inside - {last}], key=self.view.position.__getitem__)
        return draft.extended([*order, last], act=found.name, **self._reshaped(draft, found.source))

    def _with_binary(self, draft: _Draft) -> Iterator[_Draft]:
        readers, reshapes = self._only_reader(draft)
        if len(readers) != 1 or readers[0].target not in (aten.add.Tensor, aten.mul.Tensor) or readers[0].kwargs:
            return
        if draft.op == "conv" and reshapes:
            return
        (reader,) = readers
        mine = [i for i, arg in enumerate(reader.args) if isinstance(arg, fx.Node) and self.view.base(arg) is self.view.base(draft.root)]
        if len(mine) != 1 or not isinstance(reader.args[1 - mine[0]], fx.Node):
            return
        other = reader.args[1 - mine[0]]
        value, whole, out = other.meta["val"], reader.args[mine[0]].meta["val"], reader.meta["val"]  # type: ignore[union-attr]
        if not isinstance(value, Tensor) or out.dtype != whole.dtype or value.dtype != out.dtype:
            return
        if [str(size) for size in value.shape] != [str(size) for size in whole.shape]:  # as text: comparing symbols would fix their sizes
            return
        reshapes = sorted(reshapes, key=self.view.position.__getitem__)
        name = reader.target._schema.name.split("::")[1]  # type: ignore[union-attr]
        shape = self._reshaped(draft, reader.args[mine[0]])
        yield draft.extended([*reshapes, reader], {"other": other}, binary=name, **shape)  # type: ignore[dict-item]

    def _reshaped(self, draft: _Draft, source: Any) -> dict[str, Any]:
        """The reshape between a product and what absorbs it: the result needs the same shape."""
        return {} if source is draft.root or "out_reshape" not in draft.params else {"out_reshape": source.name}

    def _epilogues(self, draft: _Draft) -> Iterator[_Draft]:
        act = self._with_activation(draft)
        if act is not None:
            yield act
        yield from self._with_binary(draft)

    def _conv_epilogues(self, draft: _Draft) -> Iterator[_Draft]:
        steps = [draft, *self._affine(draft)]
        for i, step in enumerate(steps):
            if i:
                yield step
            act = self._with_activation(step)
            if act is not None:
                yield act
            for residual in self._with_binary(step):
                if residual.params["binary"] != "add":
                    continue
                yield residual
                last = self._with_activation(residual)
                if last is not None:
                    yield last

    def _affine(self, draft: _Draft) -> Iterator[_Draft]:
        """Per-channel scale and shift after a convolution; yields only the whole chain (a batch norm is four steps, in
        float32 also after a bfloat16 convolution, and then a conversion back), and the part of it that folds into a frozen weight."""
        channels, dtype, longest = self.view.spec(draft.root).shape[1], draft.root.meta["val"].dtype, None
        names = {aten.add.Tensor: "add", aten.sub.Tensor: "sub", aten.mul.Tensor: "mul"}
        wide = {dtype} if dtype in (torch.float32, torch.float64) else {dtype, torch.float32}
        while len(draft.root.users) == 1:
            (user,) = draft.root.users
            now = user.meta["val"].dtype if isinstance(user.meta.get("val"), Tensor) else None
            if user.target is prims.convert_element_type.default and now in wide:
                draft = draft.extended([user])
                if now is dtype and draft.params["affine"]:
                    longest = draft
                continue
            operand = user.args[1 - user.args.index(draft.root)] if user.target in names and draft.root in user.args else None
            value = tensor_value(operand)
            if value is None or user.kwargs or (user.target is aten.sub.Tensor and user.args[0] is not draft.root):
                break
            if operand is draft.root:
                break  # one pixel of one image has a scale's shape, also where it is squared
            shape = (1,) * (4 - value.dim()) + tuple(value.shape)
            if value.dim() < 3 or shape != (1, channels, 1, 1) or value.dtype not in wide or now not in wide:
                break  # a step that promotes computes in another dtype than the convolution would
            count = len(draft.params["affine"])
            longer = draft.extended([user], {f"c{count}": operand}, affine=(*draft.params["affine"], names[user.target]))  # type: ignore
            if longest is not None and self._folds(longest) and not self._folds(longer):
                yield longest
            draft = longer
            if now is dtype:
                longest = draft
        if longest is not None:
            yield longest

    def _folds(self, draft: _Draft) -> bool:
        """Whether the per-channel steps go into the weight where it is prepared: ahead of time if it is frozen (a scale or shift that
        is computed in each call, as from a time step, does not), else in each call."""
        constant = self.view.is_constant
        return not constant(draft.inputs["w"]) or all(constant(n) for role, n in draft.inputs.items() if role[0] == "c")

    def _grouped_heads(self, draft: _Draft) -> _Draft | None:
        """Attention whose k and v were repeated for grouped heads: read them before the copy."""
        sources: dict[str, fx.Node] = {}
        nodes: list[fx.Node] = []
        for role in ("k", "v"):
            chain, node = [], draft.inputs[role]
            while node.op == "call_function" and node.target in (*RESHAPES, aten.clone.default, aten.expand.default):
                chain.append(node)
                node = node.args[0]  # type: ignore[assignment]
                if chain[-1].target is aten.unsqueeze.default:
                    break
            if len(chain) < 3 or chain[-1].target is not aten.unsqueeze.default or chain[-1].args[1] != 2:
                return None
            groups, heads = node.meta["val"].shape[1], draft.inputs["q"].meta["val"].shape[1]
            repeated = chain[-2].meta["val"].shape
            if len(node.meta["val"].shape) != 4 or len(repeated) != 5 or repeated[1] != groups or repeated[1] * repeated[2] != heads:
                return None
            if any(len(n.users) > 1 for n in chain):
                return None
            # As text, since comparing symbolic sizes would guard on the answer: nothing but the heads may be repeated.
            batch, _, *rest = map(str, node.meta["val"].shape)
            wide, used = ([str(n) for n in v.meta["val"].shape] for v in (chain[-2], draft.inputs[role]))
            if (wide[0], *wide[3:]) != (batch, *rest) or used != [batch, str(heads), *rest]:
                return None
            sources[role] = node
            nodes += reversed(chain)
        if sources["k"].meta["val"].shape[1] != sources["v"].meta["val"].shape[1]:
            return None  # kernels take one number of groups for both, and read past the smaller
        order = sorted(nodes, key=self.view.position.__getitem__)
        return _Draft("attention", [*order, draft.root], {**draft.inputs, **sources}, {**draft.params, "gqa": True}, draft.kv_cache)

    def _understood_mask(self, draft: _Draft) -> _Draft | None:
        """Attention whose mask was proved to be a predicate: kernels do without the tensor, and it need not be computed."""
        mask, (q, k) = draft.inputs.get("mask"), (draft.inputs[r].meta["val"] for r in ("q", "k"))
        if mask is None or draft.params["causal"] or q.dim() != 4:
            return None
        found = infer_mask(mask, q.shape[0], q.shape[2], k.shape[2], self.view.constant)
        if found is None:
            return None
        square = draft.params["square"]
        params = {
            "causal": found.causal, "window": found.window, "uniform": found.empty == "uniform",
            "shift": found.offset + (draft.params["keys"] - draft.params["queries"] if found.bottom and not square else 0),
        }  # fmt: skip
        reads = [("position", found.position)] if found.position is not None else []
        reads += [(f"keys{i}", reading) for i, reading in enumerate(found.keys)]
        if draft.params["dynamic_rows"] and (reads or params["shift"] or params["window"] or (found.causal and not square)):
            return None  # sizes would enter the kernel's arguments as they are now
        inputs = {r: n for r, n in draft.inputs.items() if r != "mask"} | {role: reading.node for role, reading in reads}
        spelled = tuple((role, r.index, r.shift, r.negated) for role, r in reads)
        return _Draft(
            "attention", draft.nodes, inputs, {**draft.params, **params, "reads": spelled, "mask": describe(found)}, draft.kv_cache
        )

    def _merged(self, linears: list[_Draft]) -> Iterator[_Draft]:
        """Linears of one input with frozen weights: one product with the weights side by side."""
        groups: dict[Any, list[_Draft]] = {}
        for draft in linears:
            x = draft.inputs["x"]
            key = (self.view.base(x), self.view.spec(x).shape[1], "bias" in draft.inputs, draft.params["transposed"])
            if all(draft.inputs[r] in self.view.frozen for r in draft.inputs if r != "x"):
                groups.setdefault(key, []).append(draft)
        for (*_, biased, transposed), drafts in groups.items():
            if len(drafts) < 2:
                continue
            inputs = {"x": drafts[0].inputs["x"], **{f"w{i}": d.inputs["w"] for i, d in enumerate(drafts)}}
            if biased:
                inputs |= {f"b{i}": d.inputs["bias"] for i, d in enumerate(drafts)}
            widths = tuple(self.view.spec(d.root).shape[1] for d in drafts)
            params = {"count": len(drafts), "widths": widths, "transposed": transposed}
            params |= {k: drafts[0].params[k] for k in ("rows", "dynamic_rows")}
            yield _Draft("merged_linear", [d.root for d in drafts], inputs, params)

    def _gated(self, linears: list[_Draft]) -> Iterator[_Draft]:
        """act(x w0^T) * (x w1^T) with frozen weights: the gated unit of Shazeer, GLU variants improve transformer, 2020."""
        by_root = {self.view.base(d.root): d for d in linears if "w" in d.inputs and not d.params["transposed"]}
        for gate in by_root.values():
            active = self._with_activation(gate)
            if active is None:
                continue
            readers, reshapes = self._only_reader(active)
            if len(readers) != 1 or readers[0].target is not aten.mul.Tensor:
                continue
            operands = [self.view.base(n) for n in readers[0].args if isinstance(n, fx.Node)]
            up = next((by_root[n] for n in operands if n in by_root and n is not self.view.base(gate.root)), None)
            if up is None or self.view.base(active.root) not in operands or self._only_reader(up)[0] != readers:
                continue
            roles = {r for r in gate.inputs if r != "x"}
            same = self.view.base(up.inputs["x"]) is self.view.base(gate.inputs["x"]) and set(up.inputs) == set(gate.inputs)
            constant = same and all(d.inputs[r] in self.view.frozen for d in (gate, up) for r in roles)
            if not constant or self.view.spec(up.root) != self.view.spec(gate.root):
                continue
            if any(self.view.spec(n).shape != self.view.spec(readers[0]).shape for n in readers[0].all_input_nodes):
                continue  # broadcast
            inputs = {"x": gate.inputs["x"], "w0": gate.inputs["w"], "w1": up.inputs["w"]}
            if "bias" in roles:
                inputs |= {"b0": gate.inputs["bias"], "b1": up.inputs["bias"]}
            nodes = {*active.nodes, *up.nodes, *self._only_reader(up)[1], *reshapes}
            order = sorted(nodes, key=self.view.position.__getitem__)
            params = {k: gate.params[k] for k in ("rows", "dynamic_rows", "width")}
            (shaped,) = (n for n in readers[0].all_input_nodes if self.view.base(n) is self.view.base(up.root))
            params |= {"act": active.params["act"], "out_reshape": "" if shaped is up.root else shaped.name}
            yield _Draft("gated_linear", [*order, readers[0]], inputs, params)

    def _context(self, draft: _Draft, default: bool = False) -> SelectionContext:
        roots = draft.nodes if draft.op == "merged_linear" else [draft.root]
        roles = tuple(draft.inputs)
        names = tuple(self.view.base(n).name for n in draft.inputs.values())
        region = Region(draft.op, tuple(n.name for n in draft.nodes if n.target not in RESHAPES), names, tuple(r.name for r in roots))
        values = tuple(n.name for n in draft.inputs.values())  # what an emitter reads, before reshapes are stripped
        return SelectionContext(
            region=region, roles=roles, specs=tuple(self._spec(draft, role) for role in roles),
            outputs=tuple(self.view.spec(r) for r in roots), params={**draft.params, "values": values},
            frozen=frozenset(r for r, n in draft.inputs.items() if self.view.is_constant(n)),
            options=self.options, default=default, kv_cache=draft.kv_cache,
        )  # fmt: skip

    def _spec(self, draft: _Draft, role: str) -> TensorSpec:
        """What a region reads of an input: all of it, but of a pool of pages as many as block tables can name."""
        spec = self.view.spec(draft.inputs[role])
        if role not in ("k_cache", "v_cache"):
            return spec
        return replace(spec, shape=(draft.params["pages"], *spec.shape[1:]))
