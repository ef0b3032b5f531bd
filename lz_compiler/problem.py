"""From a graph and its priced candidates to one integer program.

Every node that TorchInductor would fuse into loops has one candidate that reads and writes the format `fused`: its tensors
are not in memory. Entering or leaving memory is a conversion with a price (the bytes moved), paid once per tensor. So a
library kernel that stands between two fusable nodes pays for the write and the read that it forces, and one that absorbs
them saves these: memory traffic is priced, not nodes.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from . import backends, torch_private
from .backends import answers
from .backends.base import SelectionContext, natural_layout
from .capture import RESHAPES, VIEWS, GraphView, tensor_value, updated
from .cost_models import CostModel
from .cost_models.roofline import Roofline, bytes_of, traffic_ns, work
from .options import Options
from .patterns import Recogniser
from .trust.policy import Facts, Rule, facts
from .types import Candidate, Choice, Conversion, Cost, Format, Problem, Region, Rejection

aten = torch.ops.aten

# Loops over windows: Inductor computes their input once, in memory, and not again for every window that reads it.
_FROM_MEMORY = ("max_pool2d_with_indices", "_low_memory_max_pool_with_offsets", "avg_pool2d", "_adaptive_avg_pool2d")

_LOOKUPS = (aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default)
LOOP = "inductor.loop"
VIEW = "aten.view"
CALL = "aten.call"
TIE_RADIUS = 5


@dataclass(slots=True)
class Enumeration:
    """Everything that could be done: priced candidates, and for each region's nodes what could not and why.

    `work`: flops and bytes of a candidate, by its index, and `contexts` its region. `denied` are the candidates that a policy's rules
    refused, unpriced; `ruled` counts what each rule had an effect on.
    """

    candidates: list[Candidate] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    work: dict[int, tuple[int, int]] = field(default_factory=dict)
    contexts: dict[int, SelectionContext] = field(default_factory=dict)
    rejections: dict[tuple[str, ...], list[Rejection]] = field(default_factory=dict)
    denied: list[tuple[Candidate, tuple[Rule, ...]]] = field(default_factory=list)
    ruled: Counter[Rule] = field(default_factory=Counter)

    def add(self, candidate: Candidate, cost: Cost) -> None:
        self.candidates.append(candidate)
        self.costs.append(cost)

    def ruled_on(self, options: Options, candidate: Candidate, operations: Sequence[Facts]) -> Candidate | Rejection:
        """The candidate, or the rejection by the policy's rules."""
        if options.policy is None:
            return candidate
        rules = options.policy.refusals(operations, candidate.kernel, backends.owners()[candidate.kernel])
        if not rules:
            return candidate
        self.denied.append((candidate, rules))
        self.ruled.update(rules)
        return Rejection(candidate.kernel, "policy", " and ".join(map(str, rules)))

    def weighed(self, options: Options, candidate: Candidate, cost: Cost, operations: Sequence[Facts]) -> tuple[Candidate, Cost]:
        """The candidate with its price, and the factor of the policy's preferences."""
        if options.policy is None:
            return candidate, cost
        rules = options.policy.weights(operations, candidate.kernel, backends.owners()[candidate.kernel])
        self.ruled.update(rules)
        return candidate, replace(cost, factor=math.prod(r.factor for r in rules))


def enumerate_regions(
    view: GraphView, options: Options, model: CostModel,
    refusal: Callable[[SelectionContext, Candidate], Rejection | None] = lambda ctx, candidate: None,
) -> Enumeration:  # fmt: skip
    """Ask every backend about every region, and price what it offers and the policy allows.

    `refusal` says why a candidate may not be used on this machine, or None.
    """
    found = Enumeration()
    contexts = list(Recogniser(view, options).regions())
    operations = {c.region.nodes[0]: facts(c) for c in contexts if c.default} if options.policy else {}
    # Shortest regions first: if the measuring budget runs out, the plain choices are known.
    for ctx in sorted(contexts, key=lambda c: (not c.default, len(c.region.nodes))):
        offered: list[Candidate] = []
        rejected = found.rejections.setdefault(ctx.region.nodes, [])
        meant = [facts(ctx), *(operations[n] for n in ctx.region.nodes if n in operations)] if options.policy else []
        for answer in answers(ctx):
            if isinstance(answer, Candidate):
                answer = refusal(ctx, answer) or found.ruled_on(options, answer, meant)
            (rejected if isinstance(answer, Rejection) else offered).append(answer)  # type: ignore[arg-type]
        for priced in model.price(ctx, offered) if offered else ():
            if isinstance(priced, Rejection):
                rejected.append(priced)
            else:
                found.work[len(found.candidates)], found.contexts[len(found.candidates)] = work(ctx, priced[0]), ctx
                found.add(*found.weighed(options, *priced, meant))
    return found


def refused_when_smaller(view: GraphView, options: Options) -> Callable[[SelectionContext, Candidate], Rejection | None]:
    """Why a candidate, offered for the sizes of the example, may not be used for all sizes of a dynamic graph: its backend refuses it
    with one symbol at its lowest sizes. The graph as it stands may."""
    symbols = torch_private.symbols_of(n.meta.get("val") for n in view.graph.nodes if n.op == "placeholder")
    values = [size for size, _, _ in symbols.values()]
    offered: list[tuple[str, int, set[tuple[str, tuple[str, ...]]]]] = []
    for symbol, (_, low, high) in symbols.items():
        for size in (n for n in (low, low + 1) if n < high and torch_private.permitted(values, **{symbol: n})):
            with torch_private.hints_at(values, **{symbol: size}):
                contexts = Recogniser(GraphView(view.graph, view.frozen), options).regions()
                known = {(a.kernel, ctx.region.nodes) for ctx in contexts for a in answers(ctx) if isinstance(a, Candidate)}
            offered.append((symbol, size, known))

    def refusal(ctx: SelectionContext, candidate: Candidate) -> Rejection | None:
        if candidate.as_is:
            return None
        where = next((f"{s}={n}" for s, n, known in offered if (candidate.kernel, ctx.region.nodes) not in known), None)
        return Rejection(candidate.kernel, "dynamic_shape", f"not for all sizes: its backend refuses it for {where}") if where else None

    return refusal


def narrower(
    graph: fx.Graph, frozen: Mapping[fx.Node, Tensor], options: Options, choices: Sequence[Choice]
) -> set[tuple[str, str, int, int]]:
    """Chosen kernels that their backend would refuse for smaller sizes of a symbol's range: (kernel, symbol, from, up to).

    Kernels are chosen for the largest sizes. Here each backend is asked again with one symbol at its lowest sizes, and where it
    refuses, the first size from which on it does not is sought by bisection.
    """
    symbols = torch_private.symbols_of(n.meta.get("val") for n in graph.nodes if n.op == "placeholder")
    values = [size for size, _, _ in symbols.values()]

    def offers(symbol: str, size: int) -> set[tuple[str, tuple[str, ...]]]:
        with torch_private.hints_at(values, **{symbol: size}):
            contexts = list(Recogniser(GraphView(graph, frozen), options).regions())
            return {(a.kernel, ctx.region.nodes) for ctx in contexts for a in answers(ctx) if isinstance(a, Candidate)}

    offered = functools.cache(offers)
    found = set()
    for symbol, (_, low, high) in symbols.items():
        for kernel, nodes in {(c.candidate.kernel, c.candidate.region.nodes) for c in choices} & offered(symbol, high):
            bad, good = max((n for n in (low, low + 1) if n < high and (kernel, nodes) not in offered(symbol, n)), default=None), high
            if bad is None:
                continue
            while good - bad > 1:
                middle = (bad + good) // 2
                bad, good = (bad, middle) if (kernel, nodes) in offered(symbol, middle) else (middle, good)
            found.add((kernel, symbol, good, high))
    return found


def edited(view: GraphView, options: Options, roofline: Roofline, choices: Sequence[Choice]) -> str | None:
    """What a stored plan decides for this graph and nothing here offers, in words; None for a plan as it was made.

    Candidates are listed again, unpriced: of both layout modes and for any number of rows, since either may have been solved for.
    """
    options = replace(options, layout_mode="adapt", any_rows=True)
    found = enumerate_regions(view, options, roofline, refused_when_smaller(view, options))
    asked = {c.region.nodes[0]: c.region.op for c in found.candidates if len(c.region.nodes) == 1}
    add_defaults(view, found, roofline, lossy=False)
    offered: dict[Region, list[Candidate]] = {}
    for candidate in found.candidates:
        offered.setdefault(candidate.region, []).append(candidate)
    made: dict[str, Candidate] = {}
    for c in (choice.candidate for choice in choices):
        if not any(_runs(c) == _runs(other) for other in offered.get(c.region, ())):
            near = next((o for o in offered.get(c.region, ()) if o.kernel == c.kernel), None)
            params = dict(near.params) if near else dict(c.params)
            other = ", ".join(f"{k}={v!r}" for k, v in c.params if k not in params or params[k] != v)
            return f"{c.kernel} {f'with {other} ' if other else ''}is not a candidate of {c.region.op} {' + '.join(c.region.nodes)}"
        twice = next((node for node in c.region.nodes if node in made), None)
        if twice is not None:
            return f"two choices compute {twice}"
        made |= dict.fromkeys(c.region.nodes, c)
    bare = _uncovered(view, made, asked)
    return f"no choice computes {asked[bare]} {bare}, which is a candidate of some kernels" if bare else None


def _runs(candidate: Candidate) -> tuple[object, ...]:
    """What decides what a candidate does; measuring may have changed the rest."""
    return candidate.kernel, candidate.in_formats, candidate.out_formats, candidate.params


def _uncovered(view: GraphView, made: Mapping[str, Candidate], asked: Mapping[str, str]) -> str | None:
    """A node that has kernels, of which no choice was made though its result is needed: a mask that attention understands is not."""
    needed = {name for name, _ in _sinks(view)}
    for node in reversed(view.nodes):
        if node.name not in needed or view.is_constant(node):
            continue
        if node.name in made:
            needed.update(made[node.name].region.inputs)
        elif node.name in asked:
            return node.name
        else:
            needed.update(view.base(n).name for n in node.all_input_nodes)
    return None


def add_defaults(view: GraphView, found: Enumeration, roofline: Roofline, lossy: bool) -> None:
    """One candidate, or one per layout, for every node that no backend was asked about."""
    asked = (*found.candidates, *(c for c, _ in found.denied))  # a node whose kernels were all denied must not get another
    known = {c.region.nodes[0] for c in asked if len(c.region.nodes) == 1}
    convolutional = any(c.region.op == "conv" for c in found.candidates)
    for node in view.nodes:
        if node.op != "call_function" or node.name in known or node.target in RESHAPES or not _has_tensor(node):
            continue
        inputs = tuple(dict.fromkeys(view.base(n).name for n in node.all_input_nodes if _has_tensor(n)))
        region = Region(_op_name(node), (node.name,), inputs, (node.name,))
        offered: set[Candidate] = set()
        for kernel, layouts, cost in _ways(view, node, convolutional, roofline):
            table = _gathered(view, node) if kernel == LOOP else None
            ins = tuple(_entry(view, view.by_name[n], *(("", "") if n == table else layouts)) for n in inputs)
            out = _entry(view, node, *layouts)
            if table is not None:
                cost = Cost(cost.ns + traffic_ns(roofline.target, bytes_of(view.spec(_first_tensor(node)))), cost.source)
            candidate = Candidate(kernel, region, ins, (out,))
            if candidate in offered:  # eager's layout is channels_last already
                continue
            offered.add(candidate)
            found.add(candidate, cost)
            if lossy and kernel == VIEW and out.dtype == "float32" and len(ins) == 1:
                half = tuple(Format(f.layout, "bfloat16") for f in (*ins, out))  # a view of a bfloat16 result
                found.add(Candidate(kernel, region, half[:1], half[1:]), cost)


def _gathered(view: GraphView, node: fx.Node) -> str | None:
    """The tensor from whose memory a fused lookup reads as much as it gives, not all: the table of an embedding."""
    table = node.args[0] if node.args and node.target in _LOOKUPS else None
    return view.base(table).name if isinstance(table, fx.Node) else None


def _ways(view: GraphView, node: fx.Node, convolutional: bool, roofline: Roofline) -> Iterable[tuple[str, tuple[str, str], Cost]]:
    """(kernel, (layout of 4-d tensors, layout of the others), cost)."""
    moves = node.target in VIEWS or _is_getitem(node)
    values = _updates(node)
    if values is not None:
        back = node.target is aten.copy_.default
        yield CALL, ("", ""), Cost(0, "assumed") if back else roofline.extern([view.spec(values)] * 2)
        return
    fusable = torch_private.is_fusable(node.target) or _is_getitem(node)
    images = convolutional and _is_image(node)
    if moves:
        yield VIEW, ("", ""), Cost(0, "roofline")
    if fusable and _op_name(node) not in _FROM_MEMORY:
        arithmetic = roofline.fused(_op_name(node), view.spec(_first_tensor(node))) if not moves else Cost(0, "roofline")
        yield LOOP, ("fused", "fused"), arithmetic
        if images:
            yield LOOP, ("fused_channels_last", "fused"), arithmetic
    if not moves and (not fusable or _op_name(node) in _FROM_MEMORY):
        tensors = [n for n in (*node.all_input_nodes, node) if isinstance(n.meta.get("val"), Tensor)]
        cost = roofline.extern([view.spec(n) for n in tensors])
        yield CALL, ("", ""), cost
        if fusable and images:
            yield CALL, ("channels_last", ""), cost


def _updates(node: fx.Node) -> fx.Node | None:
    """The values that a node writes into a buffer which the graph was given (a KV cache): Inductor does it in place, so
    that neither the rest of the buffer nor the copy back at the end of the graph moves."""
    if node.target is aten.copy_.default:
        source = node.args[1]
        return _updates(source) if isinstance(source, fx.Node) and source.op == "call_function" else None
    if updated(node) is None:
        return None
    return next(a for a in reversed(node.args) if tensor_value(a) is not None)  # type: ignore[return-value]


def _entry(view: GraphView, node: fx.Node, image_layout: str, layout: str) -> Format:
    """`node`'s format with the given layout ("" means: as eager has it)."""
    spec = view.spec(_first_tensor(node))
    chosen = image_layout if len(spec.shape) == 4 else layout
    return Format(chosen or natural_layout(spec), spec.dtype)


def _first_tensor(node: fx.Node) -> fx.Node:
    """`node`, or for one with several outputs the first getitem that reads it (they share a format)."""
    if isinstance(node.meta.get("val"), Tensor):
        return node
    return next((u for u in node.users if isinstance(u.meta.get("val"), Tensor)), node.all_input_nodes[0])


def _has_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value))


def _is_image(node: fx.Node) -> bool:
    return any(len(n.meta["val"].shape) == 4 for n in (node, *node.all_input_nodes) if isinstance(n.meta.get("val"), Tensor))


def _is_getitem(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _op_name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def build(view: GraphView, found: Enumeration, options: Options, roofline: Roofline) -> Problem:
    """The integer program: conversions where a produced and a needed format differ, what is given, what must come out."""
    sources, packed = _sources(view, found.candidates)
    sinks = _sinks(view)
    produced: dict[str, dict[Format, None]] = {}
    needed: dict[str, dict[Format, None]] = {}
    for tensor, fmt in sorted(sources, key=str):
        produced.setdefault(tensor, {})[fmt] = None
    for c in found.candidates:
        for tensor, fmt in zip(c.region.outputs, c.out_formats, strict=True):
            produced.setdefault(tensor, {})[fmt] = None
        for tensor, fmt in zip(c.region.inputs, c.in_formats, strict=True):
            needed.setdefault(tensor, {})[fmt] = None
    for tensor, fmt in sinks:
        needed.setdefault(tensor, {})[fmt] = None
    conversions, costs = [], []
    for tensor, wanted in needed.items():
        for src in produced.get(tensor, {}):
            for dst in wanted:
                if src != dst and "packed" not in (src.layout, dst.layout) and (tensor, dst) not in packed:
                    node = view.by_name[tensor]
                    conversions.append(Conversion(tensor, src, dst))
                    costs.append(roofline.conversion(view.spec(_first_tensor(node)), src, dst, cold=node.op != "call_function"))
    colours = _colours(view)
    classes: dict[object, int] = {}
    alike: Counter[object] = Counter()  # two of one region exclude each other, and must not be tied
    tied = []
    for c in found.candidates:
        kind = _kind(c, colours)
        tied.append(classes.setdefault((kind, alike[kind, c.region]), len(classes)))
        alike[kind, c.region] += 1
    return Problem(
        candidates=tuple(found.candidates), costs=tuple(found.costs), conversions=tuple(conversions),
        conversion_costs=tuple(costs), sources=frozenset(sources), sinks=tuple(sinks), error_budget=options.error_budget,
        memory_limit=options.memory_limit, candidate_class=tuple(tied), tensor_class=colours,
    )  # fmt: skip


def _kind(c: Candidate, colours: Mapping[str, int]) -> object:
    """What candidates of repeated blocks have in common."""
    variant = tuple((k, v) for k, v in c.params if k in ("variant", "weight_dtype"))
    return c.kernel, c.in_formats, c.out_formats, c.key, variant, tuple(colours[n] for n in c.region.nodes)


def _sources(view: GraphView, candidates: Sequence[Candidate]) -> tuple[set[tuple[str, Format]], set[tuple[str, Format]]]:
    """Graph inputs in eager's format; values of frozen weights in every format that somebody asks for."""
    sources: set[tuple[str, Format]] = set()
    for node in view.nodes:
        if node.op in ("placeholder", "get_attr") and _has_tensor(node):
            spec = view.spec(node)
            sources.add((node.name, Format(natural_layout(spec), spec.dtype)))
    frozen: set[tuple[str, Format]] = set()
    for c in candidates:
        for tensor, fmt in zip(c.region.inputs, c.in_formats, strict=True):
            if not fmt.layout.startswith("fused") and view.is_constant(view.by_name[tensor]):
                frozen.add((tensor, fmt))
    return sources | frozen, frozen


def _sinks(view: GraphView) -> list[tuple[str, Format]]:
    """Outputs, and nodes that act on the world (a copy into an input), in eager's format."""
    required: dict[str, fx.Node] = {}
    output = next(n for n in view.nodes if n.op == "output")
    for node in output.all_input_nodes:
        required[view.base(node).name] = view.base(node)
    for node in view.nodes:
        if node.op == "call_function" and node.is_impure() and _has_tensor(node):
            required[view.base(node).name] = view.base(node)
    return [(name, _entry(view, node, "", "")) for name, node in required.items() if _has_tensor(node)]


def _colours(view: GraphView) -> dict[str, int]:
    """Weisfeiler-Lehman colours to a radius: nodes of equal colour stand in equal surroundings (a repeated block)."""
    table: dict[object, int] = {}

    def colour(value: object) -> int:
        return table.setdefault(value, len(table))

    now: dict[fx.Node, int] = {}
    for node in view.nodes:
        spec = view.spec(node) if isinstance(node.meta.get("val"), Tensor) else None
        arguments = str([a for a in node.args if not isinstance(a, (fx.Node, list, tuple))])
        now[node] = colour((node.op, str(node.target) if node.op == "call_function" else "", spec, arguments, node in view.frozen))
    for _ in range(TIE_RADIUS):
        now = {
            node: colour((now[node], tuple(now[i] for i in node.all_input_nodes), tuple(sorted(now[u] for u in node.users))))
            for node in view.nodes
        }  # fmt: skip
    return {node.name: now[view.base(node)] for node in view.nodes}
