"""Paged attention: the operator against float64, what the planner may choose for it, and a decode loop that compiles once."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from paged_pool import Pool
from test_kernels import Case, trace
from test_regions import offered, on_cuda
from torch import Tensor, nn

import lz_compiler as lz
from lz_compiler import backends, measure, ops, semantics
from lz_compiler.backend import RECORDS
from lz_compiler.backends.base import SelectionContext
from lz_compiler.cost_models.features import features
from lz_compiler.cost_models.learned import Learned
from lz_compiler.errors import OptionError
from lz_compiler.types import Candidate, Rejection, Target

SPEC = {"strategy": "paged", "page_size": 16, "kv_heads": 2, "head_size": 64, "dtype": "float16", "device": "cpu"}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


# --- the spec ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "pagged"}, "unknown strategy 'pagged'. Did you mean 'paged'"),
        ({"layout": "nhd"}, "unknown layout 'nhd'"),
        ({"dtype": torch.float16}, "unknown dtype"),
        ({"device": "cuda:0"}, "Did you mean 'cuda'"),
        ({"page_size": None}, "page_size is None"),
        ({"page_size": 0}, "page_size is 0"),
        ({"kv_heads": True}, "kv_heads is True"),
        ({"head_size": 64.0}, "head_size is 64.0"),
        ({"strategy": "contiguous"}, "contiguous cache has no pages"),
    ],
)
def test_wrong_specs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        lz.KVCacheSpec(**{**SPEC, **change})


def test_specs_are_values() -> None:
    assert {lz.KVCacheSpec(**SPEC), lz.KVCacheSpec(**SPEC)} == {lz.KVCacheSpec(**SPEC, layout="NHD")}
    assert lz.KVCacheSpec(**SPEC) != lz.KVCacheSpec(**SPEC, layout="HND")


# --- the operator -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "queries", "page_size"), [(2, 1, 16), (6, 1, 5), (4, 3, 1), (2, 4, 7)])
def test_operator(heads: int, queries: int, page_size: int, dtype: torch.dtype, layout: str) -> None:
    pool = Pool(2, 64, page_size, layout, dtype)
    q = torch.randn(len(pool.lengths), heads, queries, 64).to(dtype)
    q[0] = torch.nan  # of an entry that is empty
    out = ops.paged_attention(q, *pool.tensors(), 0.2, layout)
    expected = pool.expected(q, 0.2)
    assert not expected.isnan().any()
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=0)
    assert out.dtype == dtype
    fake = ops._paged_fake(q, *pool.tensors(), 0.2, layout)
    assert (fake.shape, fake.stride()) == (out.shape, out.stride())
    k, v, table, lengths = pool.tensors()
    fewer = ops.paged_attention(q[:-1], k, v, table[:-1], lengths[:-1], 0.2, layout)  # the longest ends inside a page
    torch.testing.assert_close(fewer.double(), expected[:-1], atol=TOLERANCE[dtype], rtol=0)
    pool.k[pool.inside(page_size)] = torch.nan  # a token that is seen
    expected = pool.expected(q, 0.2).isnan()
    assert torch.equal(ops.paged_attention(q, *pool.tensors(), 0.2, layout).isnan(), expected)
    assert expected.any()


def test_operator_on_nothing() -> None:
    k, v, table, _ = Pool(2, 64, 4, "NHD", torch.float32).tensors()
    lengths = torch.zeros(len(table), dtype=torch.int64)
    assert not ops.paged_attention(torch.randn(len(table), 4, 2, 64), k, v, table, lengths).any()
    assert ops.paged_attention(torch.randn(0, 4, 2, 64), k, v, table[:0], lengths[:0]).shape == (0, 4, 2, 64)


def test_what_does_not_fit_is_refused() -> None:
    k, v, table, lengths = Pool(2, 64, 4, "NHD", torch.float32).tensors()
    q = torch.randn(len(table), 4, 1, 64)
    wrong = [
        ((q, k, v, table, lengths, None, "NDH"), "Did you mean"),
        ((q[:, :3], k, v, table, lengths), "does not fit"),
        ((q[..., :32], k, v, table, lengths), "does not fit"),
        ((q, k, v[:-1], table, lengths), "does not fit"),
        ((q[1:], k, v, table, lengths), "batch entries"),
        ((q, k, v, table, lengths[:1]), "batch entries"),
        ((q.half(), k, v, table, lengths), "one dtype"),
        ((q, k, v, table.float(), lengths), "whole numbers"),
        ((q[0], k, v, table, lengths), "dimensions"),
    ]
    for args, message in wrong:
        with pytest.raises(ValueError, match=message):
            ops.paged_attention(*args)


# --- the planner ------------------------------------------------------------------------------------------------------------


def region(layout: str = "NHD", dtype: torch.dtype = torch.bfloat16, heads: int = 4, queries: int = 1, **change: Any) -> SelectionContext:
    pool = Pool(2, 64, 16, layout, dtype)
    q = torch.randn(len(pool.lengths), heads, queries, 64).to(dtype)
    case = Case("", lambda *t: torch.ops.lz.paged_attention(*t, layout=layout, **change), (q, *pool.tensors()))
    (ctx,) = trace(case).contexts
    return ctx


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_region(layout: str) -> None:
    ctx = region(layout, torch.float32, scale=0.3)
    assert (ctx.region.op, ctx.params["scale"], ctx.params["keys"]) == ("paged_attention", 0.3, 64)
    spec = {**SPEC, "dtype": "float32"}
    assert ctx.kv_cache == lz.KVCacheSpec(**spec, layout=layout)
    assert ctx.kv_cache is region(layout, torch.float32).kv_cache
    assert ctx.spec("k_cache").shape[0] == 28  # a pool is as large as memory, block tables name 28 pages of it
    assert [answer.kernel for answer in backends.answers(ctx)] == ["aten.paged_attention"]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_the_learned_model_knows_the_sizes_of_a_paged_cache(layout: str) -> None:
    ctx = region(layout, torch.float32)
    target = Target("cpu", "", 1e10, {"float32": 1e11}, 1000, {})
    answers = [answer for answer in backends.answers(ctx) if isinstance(answer, Candidate)]
    found = features(ctx, answers[0], target)
    assert [2 ** found[name] - 1 for name in ("keys", "head", "group")] == pytest.approx([64, 64, 2])
    assert all(not isinstance(price, Rejection) for price in Learned(target).price(ctx, answers))


def test_triton_kernel_is_offered_where_it_fits() -> None:
    fits = region()
    name = "triton.paged_attention"
    assert name in offered("triton", on_cuda(fits))
    assert name in offered("triton", on_cuda(region("HND", torch.float16, queries=4)))
    assert name not in offered("triton", on_cuda(fits, dynamic_rows=True))
    assert name not in offered("triton", on_cuda(region(dtype=torch.float64)))
    assert name not in offered("triton", on_cuda(region(queries=128)))
    assert name not in offered("triton", on_cuda(region(scale=-1.0)))
    strided = tuple(
        replace(s, stride=(*s.stride[:-1], 2)) if role == "k_cache" else s for role, s in zip(fits.roles, fits.specs, strict=True)
    )
    assert name not in offered("triton", on_cuda(replace(fits, specs=strided)))


@pytest.mark.parametrize("large", [False, True])
def test_made_up_inputs(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page numbers are in the pool and lengths fit, also where there are fewer pages than entries in block tables; and some batch
    entries stand for all."""
    ctx = region(dtype=torch.float32)
    few = tuple(replace(s, shape=(5, *s.shape[1:])) if r.endswith("cache") else s for r, s in zip(ctx.roles, ctx.specs, strict=True))
    for one in (ctx, replace(ctx, specs=few, params={**ctx.params, "pages": 5})):
        values = measure.inputs(one, 0)
        pages = values["block_table"]
        assert values["k_cache"].shape[0] == one.params["pages"]
        assert pages.unique().numel() == one.params["pages"]
        assert (int(pages.min()), int(pages.max())) == (0, one.params["pages"] - 1)
        assert int(values["seq_lens"].max()) == 64
        assert int(values["seq_lens"].min()) >= 32
        if large:
            monkeypatch.setattr(semantics, "LARGE", 1)
        some, select = semantics.sampled("paged_attention", values, one.params)
        whole = semantics.paged_attention(values, one.params)
        torch.testing.assert_close(semantics.paged_attention(some, one.params), select(whole))
        assert len(some["q"]) == (2 if large else 7)


# --- a decode loop ----------------------------------------------------------------------------------------------------------

PAGE, MAX_PAGES, BATCH, DIM, HEADS, KV_HEADS = 4, 6, 3, 32, 4, 2


class Layer(nn.Module):
    """One attention layer that writes its token into the pages and reads all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, DIM + 2 * KV_HEADS * DIM // HEADS)
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor) -> Tensor:
        """x (B, DIM): one token of each batch entry, already counted in seq_lens; an entry of length 0 idles."""
        size = DIM // HEADS
        q, k, v = self.qkv(x).split([DIM, KV_HEADS * size, KV_HEADS * size], -1)
        place = (seq_lens - 1).clamp_min(0)
        page = block_table.gather(1, (place // PAGE)[:, None].long())[:, 0]
        page = torch.where(seq_lens > 0, page, k_cache.shape[0] - 1)  # an idle entry writes where nobody reads
        at = (page.long(), (place % PAGE).long())
        k_cache.index_put_(at, k.unflatten(-1, (KV_HEADS, size)))
        v_cache.index_put_(at, v.unflatten(-1, (KV_HEADS, size)))
        y = torch.ops.lz.paged_attention(q.view(-1, HEADS, 1, size), k_cache, v_cache, block_table, seq_lens)
        return self.out(y.transpose(1, 2).flatten(1))


class Server:
    """Batch entries that begin at random, grow by a token a step, end at random lengths and give their pages back."""

    def __init__(self, batch: int) -> None:
        self.free = list(range(BATCH * MAX_PAGES))
        self.left = [0] * batch
        self.tokens: list[list[Tensor]] = [[] for _ in range(batch)]  # of the sequences that are being decoded
        self.table = torch.full((batch, MAX_PAGES), -1, dtype=torch.int32)
        self.finished = 0

    def step(self, x: Tensor) -> Tensor:
        """Take in the next tokens; returns the lengths with them."""
        for b, tokens in enumerate(self.tokens):
            if self.left[b] == 0 and tokens:
                self.finished += 1
                self.free += self.table[b][self.table[b] >= 0].tolist()
                self.table[b], self.tokens[b] = -1, []
            elif self.left[b] == 0 and torch.rand(()) < 0.3:
                self.left[b] = int(torch.randint(1, PAGE * MAX_PAGES + 1, ()))
            if self.left[b]:
                self.left[b] -= 1
                if len(self.tokens[b]) % PAGE == 0:
                    place = int(torch.randint(len(self.free), ()))
                    self.table[b, len(self.tokens[b]) // PAGE] = self.free.pop(place)
                self.tokens[b].append(x[b])
        return torch.tensor([len(tokens) for tokens in self.tokens], dtype=torch.int32)


def plain(layer: Layer, tokens: list[Tensor]) -> Tensor:
    """The layer's result for the last of these tokens, with no cache at all, in float64."""
    if not tokens:
        return layer.out.bias
    size = DIM // HEADS
    q, k, v = layer.qkv(torch.stack(tokens)).double().split([DIM, KV_HEADS * size, KV_HEADS * size], -1)
    q = q[-1].view(KV_HEADS, -1, size)
    k, v = (x.unflatten(-1, (KV_HEADS, size)).transpose(0, 1) for x in (k, v))
    return layer.out(((q @ k.mT * size**-0.5).softmax(-1) @ v).flatten().float())


def counts() -> Counter[str]:
    counters = torch._dynamo.utils.counters
    ours = {name: counters["layerzero"][name] for name in ("graphs", "plans")}
    return Counter({**ours, **{f"frames {k}": v for k, v in counters["frames"].items()}, "captured": counters["stats"]["unique_graphs"]})


@pytest.mark.parametrize("dynamic", [False, True], ids=["one batch size", "two batch sizes"])
@torch.no_grad()
def test_what_is_in_the_cache_never_recompiles(dynamic: bool) -> None:
    layer = Layer()
    run = torch.compile(layer, backend="layerzero", options={"race": False, "cost_model": "roofline"})
    shape = (BATCH * MAX_PAGES + 1, PAGE, KV_HEADS, DIM // HEADS)
    servers = [(Server(batch), torch.full(shape, torch.nan), torch.full(shape, torch.nan)) for batch in (BATCH, *((2,) if dynamic else ()))]
    first, lengths = Counter[str](), set()
    for step in range(200):
        server, k_cache, v_cache = servers[step % len(servers)]
        x = torch.randn(len(server.left), DIM)
        seq_lens, table = server.step(x), server.table.clone()
        if dynamic:
            for tensor in (x, table, seq_lens):
                torch._dynamo.mark_dynamic(tensor, 0)
        y = run(x, k_cache, v_cache, table, seq_lens)
        expected = torch.stack([plain(layer, tokens) for tokens in server.tokens])
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)
        lengths.add(tuple(seq_lens.tolist()))
        first = first or counts()
        assert counts() == first, f"step {step}"
    assert first["graphs"] == first["plans"] == first["captured"] == 1
    assert sum(server.finished for server, *_ in servers) >= 10
    assert len(lengths) > 50
    assert Counter(c.candidate.kernel for c in RECORDS[-1].plans[0].choices)["aten.paged_attention"] == 1


@torch.no_grad()
def test_the_cache_is_not_copied() -> None:
    """The write goes into the pages themselves, and nothing moves the pool."""
    from torch._inductor.utils import run_and_get_code

    layer, server = Layer(), Server(BATCH)
    shape = (BATCH * MAX_PAGES + 1, PAGE, KV_HEADS, DIM // HEADS)
    x = torch.randn(BATCH, DIM)
    run = torch.compile(layer, backend="layerzero", options={"race": False, "cost_model": "roofline"})
    _, (code,) = run_and_get_code(run, x, torch.zeros(shape), torch.zeros(shape), server.table, server.step(x))
    calls = re.findall(r"torch\.ops\.lz\.paged_attention\.default\(reinterpret_tensor\(.*?\), (\w+), (\w+), ", code)
    assert [name.startswith("arg") for name in calls[0]] == [True, True]
    assert len(calls) == 1
    assert f"empty_strided_cpu(({shape[0]}, " not in code
    assert "copy_(" not in code.split("def call(")[1].split("def get_args")[0]
