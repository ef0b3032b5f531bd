"""Mask inference: a predicate, whenever one comes back, is the mask at every element; the usual spellings are recognised."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from lz_compiler import backend, ops, torch_private
from lz_compiler.masks import MaskPredicate, Reading, describe, infer_mask
from lz_compiler.passes import drop_masks

INF, MIN = -math.inf, torch.finfo(torch.float32).min
Program = Callable[..., Tensor]


def visible(predicate: MaskPredicate, values: Callable[[fx.Node], Tensor], batch: int, queries: int, keys: int) -> Tensor:
    """The boolean mask (B, 1, Q, K) that a predicate stands for, in plain torch; `values` gives the tensors of its nodes."""
    device = next((values(r.node).device for r in (*predicate.keys, predicate.position) if r is not None), None)
    i = torch.arange(queries, device=device)[:, None]
    j = torch.arange(keys, device=device)
    shift: Any = predicate.offset + (keys - queries if predicate.bottom else 0)
    if predicate.position is not None:
        shift = shift + read(predicate.position, values, batch, 1)[:, None, None, :]
    seen = torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=device)
    if predicate.causal:
        seen = seen & (j <= i + shift)
    if predicate.window:
        seen = seen & (j > i + shift - predicate.window)
    for key in predicate.keys:
        seen = seen & read(key, values, batch, keys)[:, None, None, :]
    return seen


def read(reading: Reading, values: Callable[[fx.Node], Tensor], batch: int, keys: int) -> Tensor:
    """What a reading stands for, as a tensor (B, K)."""
    tensor, dims = values(reading.node), []
    for position in reversed(range(len(reading.index))):
        entry = reading.index[position]
        if entry == "key":
            tensor = tensor.narrow(position, reading.shift, keys)
        elif entry != "batch":
            tensor = tensor.select(position, entry)
    dims = [entry for entry in reading.index if entry in ("batch", "key")]
    if dims == ["key", "batch"]:
        tensor = tensor.mT
    elif dims == ["batch"]:
        tensor = tensor[:, None]
    tensor = tensor.expand(batch, keys)
    return ~tensor if reading.negated else tensor


def trace(program: Program, *inputs: Any, mode: str = "fake") -> tuple[fx.GraphModule, fx.Node]:
    gm = make_fx(program, decomposition_table=torch_private.decompositions(), tracing_mode=mode)(*inputs)
    return gm, gm.graph.output_node().args[0]  # type: ignore[return-value]


class Values(fx.Interpreter):
    """Runs a graph and keeps every node's value."""

    def __init__(self, gm: fx.GraphModule, *inputs: Any) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.result = self.run(*inputs)

    def __call__(self, node: fx.Node) -> Tensor:
        return self.env[node]


def assert_means(predicate: MaskPredicate, mask: Tensor, values: Callable[[fx.Node], Tensor], b: int, q: int, k: int) -> None:
    """`mask` is `predicate` at every element, and its rows without a visible key are what `empty` says."""
    seen = visible(predicate, values, b, q, k)
    shown = mask if mask.dtype is torch.bool else mask == 0
    torch.testing.assert_close(shown.expand(b, 3, q, k), seen.expand(b, 3, q, k))  # three heads
    hidden = mask.expand(b, 3, q, k)[~seen.expand(b, 3, q, k)]
    if predicate.empty == "impossible":
        assert seen.any(-1).all()
        assert mask.dtype is torch.bool or (hidden <= -6e4).all()
    elif predicate.empty == "zero":
        assert mask.dtype is torch.bool or (hidden == INF).all()
    else:
        assert ((hidden <= -1e30) & (hidden > INF)).all()
        assert hidden.unique().numel() <= 1


# --- random programs ------------------------------------------------------------------------------------------------------

small = st.integers(-3, 3)
COMPARE = (torch.le, torch.lt, torch.ge, torch.gt, torch.eq, torch.ne)
PADDINGS = ("bool", "ints", "equal", "unequal", "longer", "padded", "gathered", "queries", "lengths", "rows", "square", "cumulative")
leaf = st.one_of(
    st.tuples(st.just("compare"), st.sampled_from(COMPARE), st.sampled_from((1, 1, 1, -1, 0, 2)), small, st.sampled_from((1, 1, 1, -1, 0)),
              st.sampled_from(("none", "none", "scalar", "row", "twice", "query", "head"))),
    st.tuples(st.just("near"), st.sampled_from(COMPARE), small),
    st.tuples(st.sampled_from(("tril", "triu")), small),
    st.tuples(st.just("data"), st.sampled_from(PADDINGS)),
    st.tuples(st.just("packed"), small),
    st.tuples(st.just("constant"), st.booleans()),
)  # fmt: skip
term = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.tuples(st.just("and"), inner, inner), st.tuples(st.just("and"), inner, inner),
        st.tuples(st.just("or"), inner, inner), st.tuples(st.just("not"), inner),
        st.tuples(st.just("times"), inner, inner), st.tuples(st.just("where"), inner, inner),
    ),
    max_leaves=4,
)  # fmt: skip
finish = st.sampled_from(("bool", "bool", "-inf", "min", "-1e9", "product", "sum", "sum min", "half"))


def boolean(t: Any, x: dict[str, Tensor]) -> Tensor:
    """One term as torch code, broadcastable to (B, 1, Q, K)."""
    q, k = x["q"].shape[1], x["k"].shape[1]
    i, j = torch.arange(q)[:, None], torch.arange(k)
    kind, *args = t
    if kind == "compare":
        op, slope, constant, other, shift = args
        extra = {"none": 0, "scalar": x["scalar"], "row": x["row"][:, :, None, None], "twice": x["scalar"] * 2,
                 "query": x["query"][:, None, :, None], "head": torch.arange(3)[:, None, None]}[shift]  # fmt: skip
        return op(j * slope, i * other + constant + extra)
    if kind == "near":
        return args[0]((i - j).abs(), args[1])
    if kind in ("tril", "triu"):
        return getattr(torch, kind)(torch.ones(q, k, dtype=torch.bool), diagonal=args[0])
    if kind == "constant":
        return torch.full((q, k), args[0])
    if kind == "packed":
        at = torch.arange(max(q, k))[None].expand(x["q"].shape[0], -1) * (1 if args[0] else 2)
        group = (torch.diff(at, prepend=at[:, :1] - 1) != 1).cumsum(-1)
        return group[:, None, :q, None] == group[:, None, None, :k]
    if kind == "data":
        return padding(args[0], x, k)
    if kind == "not":
        return ~boolean(args[0], x)
    left, right = (boolean(a, x) for a in args)
    if kind == "where":
        return torch.where(left, right, False)
    return {"and": left & right, "or": left | right, "times": (left.int() * right.int()).bool()}[kind]


def padding(kind: str, x: dict[str, Tensor], k: Any) -> Tensor:
    b, ints = x["ints"].shape[0], x["ints"]
    if kind == "gathered":
        return ints.bool()[torch.arange(b)[:, None, None, None], torch.arange(k)[None, None, None, :]]
    rows = {
        "bool": lambda: x["bools"], "ints": lambda: ints.bool(), "equal": lambda: ints == 0, "unequal": lambda: ints != 0,
        "longer": lambda: x["longer"][:, 2:].bool(), "padded": lambda: F.pad(ints.bool()[:, 1:], (0, 1)),
        "lengths": lambda: torch.arange(k) < x["row"], "cumulative": lambda: ints.cumsum(-1) > 1,
    }  # fmt: skip
    if kind in rows:
        return rows[kind]()[:, None, None, :]
    return {"queries": x["query"][:, None, :, None] > 0, "rows": x["row"][:, :, None, None] > 1, "square": x["square"]}[kind]


def finished(seen: Tensor, how: str) -> Tensor:
    if how == "bool":
        return seen
    if how == "product":
        return (1.0 - seen.float()) * MIN
    number, dtype = {"-inf": INF, "sum": INF, "-1e9": -1e9, "half": torch.finfo(torch.half).min}.get(how, MIN), torch.float32
    mask = torch.zeros(seen.shape, dtype=torch.half if how == "half" else dtype).masked_fill(~seen, number)
    if how.startswith("sum"):
        q, k = seen.shape[-2:]
        mask = mask + torch.triu(torch.full((q, k), INF if how == "sum" else MIN), diagonal=1)
    return mask


def inputs(b: int, q: int, k: int, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    draw = lambda high, *shape: torch.randint(high, shape, generator=g)  # noqa: E731
    return {
        "q": torch.empty(b, q), "k": torch.empty(b, k), "ints": draw(2, b, k), "bools": draw(2, b, k) > 0, "longer": draw(3, b, k + 2),
        "scalar": draw(9, 1)[0] - 2, "row": draw(6, b, 1) - 1, "query": draw(6, b, q) - 1, "square": draw(2, b, 1, q, k) > 0,
    }  # fmt: skip


def is_the_mask(sizes: tuple[int, int, int], others: tuple[int, int, int], t: Any, how: str, symbolic: bool, seed: int) -> None:
    """Static sizes as traced; symbolic ones also at sizes that were not traced."""
    if symbolic:
        sizes = (2, max(sizes[1], 3) + 8, max(sizes[2], 3) + 20)  # all different: no two share a symbol
    b, q, k = sizes
    example = inputs(b, q, k, seed)
    names = list(example)
    program = lambda *tensors: finished(boolean(t, dict(zip(names, tensors, strict=True))), how)  # noqa: E731
    gm, mask = trace(program, *example.values(), mode="symbolic" if symbolic else "fake")
    shapes = dict(zip(names, (n.meta["val"].shape for n in gm.graph.nodes if n.op == "placeholder"), strict=True))
    found = infer_mask(mask, shapes["q"][0], shapes["q"][1], shapes["k"][1])
    event("kept" if found is None else f"recognised: {'symbolic' if symbolic else 'static'}")
    if found is None:
        return
    for seed2 in range(seed, seed + 6):
        if symbolic and seed2 > seed:
            b, q, k = others
            if q >= k:  # the trace has q < k and may be guarded on it
                continue
        values = Values(gm, *inputs(b, q, k, seed2).values())
        assert_means(found, values.result, values, b, q, k)


masks = given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)), others=st.tuples(*[st.integers(2, 7)] * 3), t=term,
    how=finish, symbolic=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
# Shrinking traces for minutes.
traced = settings(deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate))


@settings(traced, max_examples=40)
@masks
def test_a_predicate_is_the_mask_at_every_element(**drawn: Any) -> None:
    is_the_mask(**drawn)


@pytest.mark.slow
@settings(traced, max_examples=300)
@masks
def test_many_predicates_are_the_mask_at_every_element(**drawn: Any) -> None:
    is_the_mask(**drawn)


# --- spellings that must be recognised -------------------------------------------------------------------------------------

B, Q, K = 2, 6, 6
PAD = torch.tensor([[1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]])
ONES = lambda: torch.ones(Q, K, dtype=torch.bool)  # noqa: E731
I, J = (lambda: torch.arange(Q)[:, None]), (lambda: torch.arange(K))  # noqa: E741
CAUSAL = MaskPredicate(causal=True)
KEY = "padding"  # stands for one reading of the batch's keys

SPELLINGS: dict[str, tuple[Program, tuple[Any, ...], MaskPredicate, str | None]] = {
    "all": (lambda: ONES(), (), MaskPredicate(), None),
    "all, additive": (lambda: torch.zeros(Q, K), (), MaskPredicate(), None),
    "tril": (lambda: torch.tril(ONES()), (), CAUSAL, None),
    "not triu": (lambda: ~torch.triu(ONES(), diagonal=1), (), CAUSAL, None),
    "triu of -inf": (lambda: torch.triu(torch.full((Q, K), INF), diagonal=1), (), CAUSAL, None),
    "masked_fill of tril": (lambda: torch.zeros(Q, K).masked_fill(torch.ones(Q, K).tril() == 0, INF), (), CAUSAL, None),
    "masked_fill of finfo.min": (lambda: torch.zeros(Q, K).masked_fill(~ONES().tril(), MIN), (), CAUSAL, None),
    "masked_fill of -1e9": (lambda: torch.zeros(Q, K).masked_fill(~ONES().tril(), -1e9), (), CAUSAL, None),
    "half precision": (lambda: torch.zeros(Q, K).half().masked_fill(~ONES().tril(), -65504), (), CAUSAL, None),
    "product": (lambda: (1 - torch.ones(Q, K).tril()) * -1e30, (), CAUSAL, None),
    "arange": (lambda: J() <= I(), (), CAUSAL, None),
    "arange, strict": (lambda: J() < I() + 1, (), CAUSAL, None),
    "arange, from the query": (lambda: I() >= J(), (), CAUSAL, None),
    "arange, int32": (lambda: J().int() <= I().int(), (), CAUSAL, None),
    "arange, float": (lambda: J().float() <= I().float() + 0.5, (), CAUSAL, None),
    "four dimensions": (lambda: torch.tril(ONES())[None, None].expand(B, 1, Q, K), (), CAUSAL, None),
    "heads": (lambda: torch.tril(ONES()).view(1, 1, Q, K).expand(B, 4, Q, K).clone(), (), CAUSAL, None),
    "offset": (lambda: torch.tril(ONES(), diagonal=2), (), MaskPredicate(True, 2), None),
    "rows without keys": (lambda: torch.tril(ONES(), diagonal=-1), (), MaskPredicate(True, -1, empty="zero"), None),
    "sliding window": (lambda: (J() <= I()) & (I() - J() < 3), (), MaskPredicate(True, 0, 3), None),
    "window by tril and triu": (lambda: torch.triu(torch.tril(ONES()), diagonal=-2), (), MaskPredicate(True, 0, 3), None),
    "window, logical_and": (lambda: torch.logical_and(J() <= I(), J() > I() - 3), (), MaskPredicate(True, 0, 3), None),
    "two bounds": (lambda: (J() <= I() + 2) & (J() <= I()), (), CAUSAL, None),
    "window without causal": (lambda: J() > I() - 3, (), MaskPredicate(False, 0, 3), None),
    "both sides, hidden": (lambda: torch.zeros(Q, K).masked_fill((I() - J()).abs() > 2, INF), (), MaskPredicate(True, 2, 5), None),
    "both sides": (lambda: (I() - J()).abs() <= 2, (), MaskPredicate(True, 2, 5), None),
    "diagonal": (lambda: I() == J(), (), MaskPredicate(True, 0, 1), None),
    "buffer": (lambda m: m[:, :, :Q, :K], (torch.ones(1, 1, 9, 9, dtype=torch.bool).tril(),), CAUSAL, None),
    "padding": (lambda m: m[:, None, None, :].bool(), (PAD,), MaskPredicate(empty="zero"), KEY),
    "padding, zeros": (
        lambda m: torch.zeros(B, 1, 1, K).masked_fill(m[:, None, None] == 0, MIN), (PAD,), MaskPredicate(empty="uniform"), KEY),
    "padding, product": (lambda m: (1 - m[:, None, None].bool().float()) * MIN, (PAD,), MaskPredicate(empty="uniform"), KEY),
    "padding, tokens": (lambda m: (m != 0)[:, None, None].expand(B, 1, Q, K), (PAD,), MaskPredicate(empty="zero"), KEY),
    "padding, lengths": (lambda m: (J() < m.sum(1)[:, None])[:, None, None], (PAD,), MaskPredicate(empty="zero"), KEY),
    "padding, sliced": (lambda m: m[:, 1:][:, None, None, :K], (F.pad(PAD, (1, 0)).bool(),), MaskPredicate(empty="zero"), KEY),
    "padding, static": (lambda: (J() < 4)[None], (), MaskPredicate(empty="zero"), KEY),
    "padding and causal": (lambda m: torch.tril(ONES()) & m[:, None, None].bool(), (PAD,), MaskPredicate(True, empty="zero"), KEY),
    "where": (lambda m: torch.where(J() <= I(), m[:, None, None].bool(), False), (PAD,), MaskPredicate(True, empty="zero"), KEY),
    "De Morgan": (lambda m: ~((J() > I()) | (m == 0)[:, None, None]), (PAD,), MaskPredicate(True, empty="zero"), KEY),
    "times": (lambda m: (torch.ones(Q, K).tril() * m.bool()[:, None, None]).bool(), (PAD,), MaskPredicate(True, empty="zero"), KEY),
    "sum of -inf": (
        lambda m: torch.triu(torch.full((Q, K), INF), 1) + torch.zeros(B, 1, 1, K).masked_fill(m[:, None, None] == 0, INF),
        (PAD,), MaskPredicate(True, empty="zero"), KEY),
    "window and padding": (
        lambda m: (J() <= I()) & (J() > I() - 4) & m.bool()[:, None, None], (PAD,), MaskPredicate(True, 0, 4, empty="zero"), KEY),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_usual_spellings_are_recognised(name: str) -> None:
    program, tensors, expected, key = SPELLINGS[name]
    gm, mask = trace(program, *tensors)
    frozen = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), tensors, strict=True)) if name == "buffer" else {}
    found = infer_mask(mask, B, Q, K, frozen.get)
    assert found is not None
    assert (found.causal, found.offset, found.window, found.empty) == (expected.causal, expected.offset, expected.window, expected.empty)
    assert len(found.keys) == (key == KEY)
    assert found.position is None
    assert not found.bottom
    values = Values(gm, *tensors)
    assert_means(found, values.result[:, :1] if values.result.dim() == 4 else values.result, values, B, Q, K)


@pytest.mark.parametrize("shape", [(), (1,), (B, 1)])
@pytest.mark.parametrize("queries", [1, 4])
def test_a_position_on_a_static_cache(shape: tuple[int, ...], queries: int) -> None:
    """Causal with a KV position from a tensor, one for all or one a batch row, and a window beside it."""

    def program(position: Tensor) -> Tensor:
        rows = torch.arange(queries) + position  # (Q,) or (B, Q)
        rows = rows.view(-1, 1, queries, 1)
        keys = torch.arange(32)
        return (keys <= rows) & (keys > rows - 5)

    position = torch.randint(20, shape)
    gm, mask = trace(program, position)
    found = infer_mask(mask, B, queries, 32)
    assert found is not None
    node = next(iter(gm.graph.nodes))
    assert found.position == Reading(node, {(): (), (1,): (0,), (B, 1): ("batch", 0)}[shape])  # type: ignore[arg-type]
    assert (found.causal, found.offset, found.window, found.empty, found.keys) == (True, 0, 5, "zero", ())
    values = Values(gm, position)
    assert_means(found, values.result, values, B, queries, 32)


def test_a_predicate_in_words() -> None:
    def program(padding: Tensor, position: Tensor) -> Tensor:
        keys = torch.arange(32)
        rows = torch.arange(4)[:, None] + position + 1
        return (keys <= rows) & (keys > rows - 5) & (padding == 0)[:, None, None, :]

    _, mask = trace(program, torch.ones(B, 32), torch.tensor(7))
    assert describe(infer_mask(mask, B, 4, 32)) == "causal, offset position_1 + 1, window 5, keys eq; empty rows: zero"
    assert describe(MaskPredicate()) == "none: every key is visible"
    assert describe(MaskPredicate(True, bottom=True)) == "causal, offset K - Q; no empty rows"


def test_bottom_right_causal_with_symbolic_sizes() -> None:
    def program(q: Tensor, k: Tensor) -> Tensor:
        past = k.shape[1] - q.shape[1]
        return torch.arange(k.shape[1])[None, :] <= torch.arange(q.shape[1])[:, None] + past

    gm, mask = trace(program, torch.empty(2, 5), torch.empty(2, 9), mode="symbolic")
    q, k = (n.meta["val"].shape for n in gm.graph.nodes if n.op == "placeholder")
    found = infer_mask(mask, q[0], q[1], k[1])
    assert found is not None
    assert (found.causal, found.offset, found.bottom, found.keys) == (True, 0, True, ())


KEPT: dict[str, tuple[Program, tuple[Any, ...]]] = {
    "data": (lambda m: m, (torch.ones(B, 1, Q, K, dtype=torch.bool),)),
    "wrong axis": (lambda m: m[:, None, :, None].bool().expand(B, 1, Q, K), (PAD,)),
    "or": (lambda m: torch.tril(ONES()) | m[:, None, None].bool(), (PAD,)),
    "anti-causal": (lambda: torch.triu(ONES(), diagonal=1), ()),
    "contradiction": (lambda: (J() <= I()) & (J() > I()), ()),
    "nothing": (lambda: torch.zeros(Q, K, dtype=torch.bool), ()),
    "every second": (lambda: (I() - J()) % 2 == 0, ()),
    "slope": (lambda: J() <= 2 * I(), ()),
    "blocks": (lambda: J() // 3 == I() // 3, ()),
    "0/1 not proved": (lambda m: (1 - m[:, None, None].float()) * MIN, (PAD,)),
    "weak penalty": (lambda: torch.zeros(Q, K).masked_fill(~ONES().tril(), -100.0), ()),
    "bias": (lambda: torch.zeros(Q, K).masked_fill(~ONES().tril(), INF) + 1, ()),
    "linear bias": (lambda: (J() - I()).float().masked_fill(J() > I(), INF), ()),
    "packed": (lambda g: (g[:, :, None] == g[:, None, :])[:, None], (PAD,)),
    "heads' own lengths": (lambda: J() < torch.arange(3)[:, None, None] + 2, ()),
    "positions of queries": (lambda p: J() <= p[:, None, :, None], (PAD,)),
    "twice the position": (lambda p: J() <= I() + 2 * p, (torch.tensor(1),)),
    "jumping positions": (lambda: torch.cat([torch.full((1,), 3), torch.arange(K - 1)]) <= I(), ()),
    "two positions": (lambda p, r: J() <= I() + p + r, (torch.tensor(1), torch.tensor(2))),
    "narrow position": (lambda p: J() <= I() + p, (torch.tensor(1, dtype=torch.int8),)),
    "lowest twice": (lambda m: torch.zeros(Q, K).masked_fill(J() > I(), MIN) + (1 - m[:, None, None].bool().float()) * MIN, (PAD,)),
    "padding by -1e9": (lambda m: torch.zeros(B, 1, 1, K).masked_fill(m[:, None, None] == 0, -1e9), (PAD,)),
    "negative index": (lambda m, p: m.bool()[:, p - 3][:, None, None], (PAD, torch.arange(K) % 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_is_not_understood_is_kept(name: str) -> None:
    program, tensors = KEPT[name]
    _, mask = trace(program, *tensors)
    found = infer_mask(mask, B, Q, K)
    if name == "negative index":  # the gathered vector is itself a vector over keys
        assert found is not None
        assert [r.node.op for r in found.keys] == ["call_function"]
        return
    assert found is None


# --- transformers ---------------------------------------------------------------------------------------------------------

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64,
    "vocab_size": 128,
}  # fmt: skip


class Stop(Exception):
    pass


def attention_masks(monkeypatch: pytest.MonkeyPatch, model: Any, dynamic: bool, **kwargs: Any) -> list[MaskPredicate | str | None]:
    """What the masks of a model's attentions mean, on the graph that planning is given."""
    found: list[MaskPredicate | str | None] = []

    def look(graph: fx.Graph, *_: Any) -> Any:
        for node in graph.nodes:
            if node.target is ops.sdpa:
                q, k, _, mask = node.args[:4]
                sizes = q.meta["val"].shape[0], q.meta["val"].shape[2], k.meta["val"].shape[2]
                found.append("no mask" if mask is None else infer_mask(mask, *sizes))
        raise Stop

    monkeypatch.setattr(backend, "plan_and_apply", look)
    compiled = torch.compile(model.eval(), backend="layerzero", dynamic=dynamic or None, options={"cost_model": "roofline", "race": False})
    with torch.no_grad(), pytest.raises(Exception, match="Stop"), torch._inductor.utils.fresh_cache():
        compiled(**kwargs)
    return found


def ids(length: int = 16) -> Tensor:
    return torch.randint(128, (2, length))


def facts(predicate: Any) -> tuple[Any, ...]:
    assert isinstance(predicate, MaskPredicate)
    return predicate.causal, predicate.offset, predicate.window, predicate.empty, [r.index for r in predicate.keys], predicate.bottom


PADDED = [("batch", "key")]


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


DYNAMIC = [False, slow(True)]


@pytest.mark.parametrize("dynamic", DYNAMIC)
def test_llama(monkeypatch: pytest.MonkeyPatch, dynamic: bool) -> None:
    tf = pytest.importorskip("transformers")
    llama = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, num_key_value_heads=2))
    assert attention_masks(monkeypatch, llama, dynamic, input_ids=ids(), use_cache=False) == [CAUSAL]
    torch._dynamo.reset()
    ones = torch.ones(2, 16, dtype=torch.long)
    (found,) = attention_masks(monkeypatch, llama, dynamic, input_ids=ids(), use_cache=False, attention_mask=ones)
    assert facts(found) == (True, 0, 0, "zero", PADDED, False)


@pytest.mark.parametrize("dynamic", DYNAMIC)
def test_mistral(monkeypatch: pytest.MonkeyPatch, dynamic: bool) -> None:
    tf = pytest.importorskip("transformers")
    model = tf.MistralForCausalLM(tf.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=5))
    assert attention_masks(monkeypatch, model, dynamic, input_ids=ids(), use_cache=False) == [MaskPredicate(True, 0, 5)]


@pytest.mark.parametrize("dynamic", DYNAMIC)
def test_bert(monkeypatch: pytest.MonkeyPatch, dynamic: bool) -> None:
    tf = pytest.importorskip("transformers")
    model = tf.BertModel(tf.BertConfig(**SMALL))
    (found,) = attention_masks(monkeypatch, model, dynamic, input_ids=ids(), attention_mask=torch.ones(2, 16, dtype=torch.long))
    assert facts(found) == (False, 0, 0, "zero", PADDED, False)


@pytest.mark.parametrize(
    ("queries", "padded", "dynamic"), [(1, False, False), slow(1, True, False), slow(4, False, False), slow(1, False, True)]
)
def test_llama_on_a_static_cache(monkeypatch: pytest.MonkeyPatch, queries: int, padded: bool, dynamic: bool) -> None:
    tf = pytest.importorskip("transformers")
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, num_key_value_heads=2)).eval()
    cache = tf.StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(ids(), past_key_values=cache)
    mask = {"attention_mask": torch.ones(2, 16 + queries, dtype=torch.long)} if padded else {}
    (found,) = attention_masks(monkeypatch, model, dynamic, input_ids=ids(queries), past_key_values=cache, **mask)
    assert facts(found) == (True, 0, 0, "zero", PADDED if padded else [], False)
    assert isinstance(found, MaskPredicate)
    assert found.position is not None
    assert (found.position.node.op, found.position.index) == ("placeholder", ())  # the cache's own count


@pytest.mark.slow
def test_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2; BART's encoder, decoder and cross attention; T5, whose masks carry a learned bias and are kept."""
    tf = pytest.importorskip("transformers")
    gpt2 = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    assert attention_masks(monkeypatch, gpt2, False, input_ids=ids(), use_cache=False) == [CAUSAL]
    torch._dynamo.reset()
    bart = tf.BartModel(
        tf.BartConfig(
            vocab_size=128, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        )
    )  # fmt: skip
    ones = torch.ones(2, 16, dtype=torch.long)
    encoder, decoder, cross = attention_masks(
        monkeypatch, bart, False, input_ids=ids(), decoder_input_ids=ids(7), use_cache=False, attention_mask=ones
    )
    assert decoder == "no mask"  # is_causal
    assert facts(encoder) == facts(cross) == (False, 0, 0, "zero", PADDED, False)
    torch._dynamo.reset()
    t5 = tf.T5Model(tf.T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4))
    masks = attention_masks(monkeypatch, t5, False, input_ids=ids(), decoder_input_ids=ids(7), use_cache=False)
    assert masks == [None, None, MaskPredicate()]


# --- where gradients flow -------------------------------------------------------------------------------------------------


class Attends(torch.nn.Module):
    """Three attentions over one projection: causal, all keys, and a window, each with its mask as a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4)
        i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
        masks = (j <= i, (j >= 0).expand(length, length), (j <= i) & (j > i - 5))
        return sum(F.scaled_dot_product_attention(q, k, v, attn_mask=mask) for mask in masks)


@pytest.mark.parametrize("dynamic", DYNAMIC)
def test_masks_are_dropped_in_training(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Attends(), torch.randn(2, 24, 32, requires_grad=True)
    calls: list[tuple[str, Any, bool]] = []

    def drop(graph: fx.Graph) -> int:
        dropped = drop_masks.drop_masks_pass(graph)
        kernels = {*drop_masks.FORWARD, *drop_masks.FORWARD.values()}
        for node in (n for n in graph.nodes if n.target in kernels):
            calls.append((node.target.name(), drop_masks._get(node, "mask") is None, bool(drop_masks._get(node, "is_causal"))))
        return dropped

    monkeypatch.setattr(backend, "drop_masks_pass", drop)
    compiled = torch.compile(model, backend="layerzero", dynamic=dynamic, options={"cost_model": "roofline", "race": False})
    for length in (24, 31) if dynamic else (24,):
        x = torch.randn(2, length, 32, requires_grad=True)
        expected = torch.autograd.grad(model(x).square().sum(), (x, *model.parameters()))
        found = torch.autograd.grad(compiled(x).square().sum(), (x, *model.parameters()))
        torch.testing.assert_close(found, expected)
    forward, backward = ([c[1:] for c in calls if c[0].endswith("backward") is last] for last in (False, True))
    # Without a mask and causal; without a mask; the window's mask is kept.
    assert sorted(forward) == sorted(backward) == [(False, False), (True, False), (True, True)]
    assert any("2 attention masks" in note for note in backend.RECORDS[-1].notes)
