"""What users rely on around the plan: the entry point, errors, aliasing, strides, odd dtypes and values, freezing, budgets,
the race, caches that fail, and the report. Each compares with eager on the same inputs."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from convnet import conv_bn, convnet
from machine import plant
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import lz_compiler as lz
from lz_compiler import backends, race, zoo
from lz_compiler.backend import RECORDS, GraphRecord, open_store
from lz_compiler.backends.base import SelectionContext
from lz_compiler.cost_models import Priced
from lz_compiler.errors import OptionError
from lz_compiler.types import EAGER, INDUCTOR, PLANNED, Candidate, Cost

# The roofline's prices do not depend on the clock, and on a CPU they prefer the library's kernels: so these run.
FIXED = {"race": False, "cost_model": "roofline"}
TINY = zoo.LlamaConfig(hidden=64, layers=1, heads=4, kv_heads=2, intermediate=96, vocab=128, max_len=64, tied=True)


def compiled(fn: Any, dynamic: bool | None = None, **options: Any) -> Any:
    return torch.compile(fn, backend="layerzero", dynamic=dynamic, options={**FIXED, **options})


def counters() -> Any:
    return torch._dynamo.utils.counters["layerzero"]


def kernels(record: GraphRecord | None = None) -> list[str]:
    """Kernels in the plans of a graph (by default the last one), without the loops that TorchInductor makes."""
    plans = (record or RECORDS[-1]).plans
    return [c.candidate.kernel for p in plans for c in p.choices if c.candidate.kernel != "inductor.loop"]


def linear(*features: int, act: type[nn.Module] | None = None) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(features)]
    return nn.Sequential(*layers, *([act()] if act else [])).eval()


def same_places(y: Tensor, e: Tensor) -> None:
    """NaN and both infinities exactly where eager has them."""
    for where in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(where(y), where(e)), f"{where.__name__} differs"


def steps(t: Tensor) -> list[int]:
    """Strides that mean something: not those of dimensions with one element or none."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1] if t.numel() else []


def same(y: Any, e: Any, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    torch.testing.assert_close(y, e, rtol=rtol, atol=atol, equal_nan=True)
    assert [steps(t) for t in tree_leaves(y)] == [steps(t) for t in tree_leaves(e)]


def in_process(script: str, cache: Path, *args: str, **env: str) -> subprocess.Popen[str]:
    plant(str(cache))
    environ = {**os.environ, "LAYERZERO_CACHE_DIR": str(cache), **env}
    command = [sys.executable, "-c", textwrap.dedent(script), *args]
    return subprocess.Popen(command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def result(process: subprocess.Popen[str]) -> Any:
    """The JSON of the process's last line."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


# --- the way in ---------------------------------------------------------------------------------------------------------


def test_backend_is_found_without_an_import(tmp_path: Path) -> None:
    script = """
        import json, sys, torch
        model = torch.nn.Linear(8, 8).eval()
        before = "lz_compiler" in sys.modules
        fast = torch.compile(model, backend="layerzero", options={"race": False, "cost_model": "roofline"})
        x = torch.randn(3, 8)
        with torch.no_grad():
            y = fast(x)
        torch.testing.assert_close(y, model(x))
        print(json.dumps([before, dict(torch._dynamo.utils.counters["layerzero"])]))
    """
    before, counts = result(in_process(script, tmp_path))
    assert not before
    assert counts["graphs"] == 1
    assert counts["plans"] == 1


def test_import_is_light(tmp_path: Path) -> None:
    script = """
        import json, sys
        import torch
        before = set(sys.modules)
        import lz_compiler
        print(json.dumps(sorted(set(sys.modules) - before)))
    """
    loaded = result(in_process(script, tmp_path))
    heavy = ("ortools", "networkx", "torch._inductor", "torch._dynamo", "transformers", "sqlite3", "lz_compiler.backends")
    assert not [name for name in loaded if name.startswith(heavy)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"errorbudget": 0.1}}, "Did you mean 'error_budget'"),
        ({"options": {"cost_model": "rooflin"}}, "Did you mean 'roofline'"),
        ({"options": {"backends": ["onednm"]}}, "Did you mean 'onednn'"),
        ({"mode": "max-autotun"}, "Did you mean 'max-autotune'"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(arguments: dict[str, Any], message: str) -> None:
    """Dynamo wraps what a backend raises; the message and the class must still be there."""
    run = torch.compile(linear(8, 8), backend="layerzero", **arguments)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message) as raised, torch.no_grad():
        run(torch.randn(2, 8))
    assert isinstance(raised.value.inner_exception, OptionError)


def test_compile_reports_a_wrong_option_at_once() -> None:
    with pytest.raises(OptionError, match="Did you mean 'freeze'"):
        lz.compile(linear(8, 8), freze=True)


# --- graphs: breaks, aliases, mutation, strides -------------------------------------------------------------------------


@pytest.mark.slow
def test_graph_breaks_give_several_graphs() -> None:
    model = linear(16, 16)

    def f(x: Tensor) -> Tensor:
        y = model(x)
        torch._dynamo.graph_break()
        return model(y.relu())

    x = torch.randn(4, 16)
    with torch.no_grad():
        same(compiled(f)(x), f(x))
    assert counters()["graphs"] == 2
    assert [k for r in RECORDS[-2:] for k in kernels(r)] == ["onednn.linear", "onednn.linear"]


def test_mutated_inputs_and_buffers_are_seen_by_the_caller() -> None:
    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(8, 8)
            self.register_buffer("seen", torch.zeros(4, 8))
            self.register_buffer("calls", torch.tensor(0))
            self.register_buffer("weight", torch.randn(8, 8))

        def forward(self, x: Tensor, cache: Tensor) -> Tensor:
            y = self.proj(x)
            cache[:, 1:3] = y[:, None]
            self.seen.add_(y)
            self.calls += 1
            self.weight.mul_(0.5)  # a product reads it: freezing must not take it for a constant
            return F.linear(cache[:, 1], self.weight)

    model = Cache().eval()
    other, x = copy.deepcopy(model), torch.randn(4, 8)
    for freeze in (False, True):
        torch._dynamo.reset()
        run, ours, theirs = compiled(other, freeze=freeze), torch.zeros(4, 5, 8), torch.zeros(4, 5, 8)
        with torch.no_grad():
            for _ in range(3):
                same(run(x, ours), model(x, theirs))
        same(ours, theirs)
    same(other.seen, model.seen)
    assert other.calls == model.calls == 6


class Counting(nn.Module):
    """Wide products for which bfloat16 pays, behind state that each call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, (self.body, _) = nn.BatchNorm1d(512, momentum=0.3), wide()
        self.register_buffer("calls", torch.tensor(0))
        self.drift = nn.Parameter(torch.zeros(512), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.drift.add_(x[0])
        return self.body(self.norm(x)) + self.drift


@pytest.mark.parametrize("stored", [False, True])
def test_a_budget_check_leaves_no_trace(stored: bool, tmp_path: Path) -> None:
    """Checking a lossy plan runs the graph again and again: parameters, buffers and random numbers must not notice."""
    plant(str(tmp_path))
    options = {"error_budget": 2e-2, "freeze": True, "cache_dir": str(tmp_path)}
    x = torch.randn(8, 512)
    with torch.no_grad():
        if stored:
            compiled(Counting().train(), **options)(x)
            torch._dynamo.reset()
        model = Counting().train()
        other = copy.deepcopy(model)
        run, state = compiled(model, **options), torch.get_rng_state()
        for _ in range(2):
            same(run(x), other(x), 5e-2, 5e-2)
            same(model.state_dict(), other.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    assert "bfloat16" in dtypes()
    assert RECORDS[-1].error is not None


def test_a_budget_check_draws_no_random_numbers() -> None:
    """Nor does the plan get others than the reference: dropout would look like an error."""
    body, x = wide()

    def f(x: Tensor) -> Tensor:
        return body(x) * (1 + torch.rand(8, 512))

    with torch._inductor.config.patch(fallback_random=True), torch.no_grad():
        torch.manual_seed(5)
        expected = f(x)
        after = torch.get_rng_state()
        torch.manual_seed(5)
        same(compiled(f, error_budget=2e-2, freeze=True)(x), expected, 5e-2, 5e-2)
    assert torch.equal(torch.get_rng_state(), after)
    assert "bfloat16" in dtypes()
    assert 0 < (RECORDS[-1].error or 0) < 2e-2


def test_a_budget_check_keeps_what_inputs_share() -> None:
    body, _ = wide()

    def f(whole: Tensor, part: Tensor) -> Tensor:
        part.add_(1)  # seen through `whole`
        return body(whole)

    ours = torch.randn(4096, 512)  # enough rows for bfloat16 to pay with weights that are not frozen
    theirs = ours.clone()
    with torch.no_grad():
        y, expected = compiled(f, error_budget=2e-2)(ours[:-4], ours[4:]), f(theirs[:-4], theirs[4:])
    same(y, expected, 5e-2, 5e-2)
    same(ours, theirs)
    assert "bfloat16" in dtypes()
    assert 0 < (RECORDS[-1].error or 0) < 2e-2
    whole, part, same_part, apart = race._copied((ours[:8], ours[4:], ours[4:], x := torch.ones(3)), [1])
    assert apart is x
    part.fill_(7)
    assert (whole[4:] == 7).all()
    assert (same_part == 7).all()
    same(ours, theirs)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("race", [False, True], ids=["planned", "raced"])
def test_outputs_of_padded_products_have_eagers_strides(gradients: bool, race: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor pads products on a GPU to aligned sizes; here it is told to pad everywhere."""
    from torch._inductor.fx_passes import pad_mm

    monkeypatch.setattr(pad_mm, "check_device", lambda *args: True)
    monkeypatch.setattr(pad_mm, "has_triton", lambda: True)
    x, w = torch.randn(7, 24).bfloat16(), torch.randn(24, 10).bfloat16().requires_grad_(gradients)
    fn = lambda x, w: (x @ w, (w.t() @ x.t()).t().sin())  # noqa: E731
    with torch._inductor.config.patch(force_shape_pad=True):
        run = torch.compile(fn, backend="layerzero", options={"race": race})
        for _ in range(8):
            for y, expected in zip(run(x, w), fn(x, w), strict=True):
                assert y.stride() == expected.stride()
                torch.testing.assert_close(y, expected)


def test_outputs_alias_what_eagers_alias() -> None:
    model = linear(6, 6)

    def f(x: Tensor) -> tuple[Tensor, ...]:
        y = model(x)
        return x, x.t(), x[1:], y, y.view(-1), y[:, ::2]

    x = torch.randn(4, 6)
    with torch.no_grad():
        out, expected = compiled(f)(x), f(x)
    assert out[0] is x
    for ours, theirs in zip(out, expected, strict=True):
        same(ours, theirs)
    y, storage = out[3], x.untyped_storage().data_ptr()
    assert [t.untyped_storage().data_ptr() == storage for t in out] == [True] * 3 + [False] * 3
    assert {t.untyped_storage().data_ptr() for t in out[3:]} == {y.untyped_storage().data_ptr()}
    y.zero_()  # a write through one is seen through the others
    assert not out[4].any()


PARTS: dict[str, Callable[..., Any]] = {
    "slice": lambda q, k, v: (q, v[:, 1:]),
    "slices": lambda q, k, v: (k[0], k[:, 1:, 2:], v[..., 2:], v),
    "split": lambda q, k, v: (*q.chunk(2, -1), *k.unbind(1), v),
    "expanded": lambda q, k, v: (q[:, None].expand(2, 4, 3, 16), k.mT, v.relu()),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_merged_products_have_eagers_strides(name: str) -> None:
    """They lie in a larger tensor: what eager returns as a view with gaps is the same view of a copy of its own tensor."""
    model = nn.ModuleList(linear(16, 16) for _ in range(3))

    def f(x: Tensor) -> Any:
        return PARTS[name](*(layer(x) for layer in model))

    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        out, expected = compiled(f, freeze=True)(x), f(x)
    assert "onednn.merged_linear_packed" in kernels()
    same(out, expected)
    for (a, b), (c, d) in zip(itertools.combinations(out, 2), itertools.combinations(expected, 2), strict=True):
        assert (a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()) == (
            c.untyped_storage().data_ptr() == d.untyped_storage().data_ptr()
        )


class ChannelsLast:
    """A cost model by which nothing but channels last is cheap."""

    name = "channels_last"

    def price(self, ctx: SelectionContext, candidates: Sequence[Candidate]) -> list[Priced]:
        return [(c, Cost(1 if c.out_formats[0].layout == "channels_last" else 10**9, "assumed")) for c in candidates]


@pytest.mark.parametrize("dynamic", [False, True])
def test_outputs_of_a_convolution_share_memory_in_any_layout(dynamic: bool) -> None:
    """Channels last inside; eager's strides outside, by one copy under all outputs."""

    def f(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = F.relu(CONV(x))
        return y.transpose(1, 2), y, y.view(x.shape[0], -1)

    fast = compiled(f, dynamic=dynamic, cost_model=ChannelsLast())
    for size in (5, 6):
        x = torch.randn(2, 8, size, 7)
        with torch.no_grad():
            out, expected = fast(x), f(x)
        for ours, theirs in zip(out, expected, strict=True):
            same(ours, theirs)
        out[1].zero_()
        assert not any(view.any() for view in out)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask)


def heads(*shape: int) -> Tensor:
    """(batch, heads, length, size) as projections make it: a transposed view."""
    batch, count, length, size = shape
    return torch.randn(batch, length, count, size).transpose(1, 2)


CONV = nn.Conv2d(8, 16, 3, padding=1)
LAYOUTS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Tensor, ...]]]] = {
    "linear_transposed": (linear(8, 8), lambda: (torch.randn(8, 5).t(),)),
    "linear_strided": (linear(8, 8), lambda: (torch.randn(5, 16)[:, ::2],)),
    "linear_3d_permuted": (linear(8, 8), lambda: (torch.randn(3, 5, 8).transpose(0, 1),)),
    "linear_expanded": (linear(8, 8), lambda: (torch.randn(1, 8).expand(5, 8),)),
    "linear_then_permute": (lambda x: linear(8, 8)(x).transpose(1, 2), lambda: (torch.randn(2, 3, 8),)),
    "conv": (lambda x: CONV(x), lambda: (torch.randn(2, 8, 6, 6),)),
    "conv_channels_last": (lambda x: CONV(x), lambda: (torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last),)),
    "conv_of_a_slice": (lambda x: CONV(x[:, ::2]).gelu(), lambda: (torch.randn(2, 16, 6, 6),)),
    "conv_batch_of_one": (lambda x: CONV(x) + 1, lambda: (torch.randn(1, 8, 6, 6),)),
    "conv_one_pixel": (lambda x: CONV(x).tanh(), lambda: (torch.randn(2, 8, 1, 1),)),
    "attention": (attention, lambda: (heads(2, 4, 7, 16), heads(2, 4, 9, 16), heads(2, 4, 9, 16))),
    "attention_contiguous": (attention, lambda: tuple(torch.randn(2, 4, 7, 16) for _ in range(3))),
}
LAYOUTS["conv_of_a_slice"] = (lambda x: F.gelu(CONV(x[:, ::2])), LAYOUTS["conv_of_a_slice"][1])


@pytest.mark.parametrize("name", LAYOUTS)
def test_output_strides_are_eagers(name: str) -> None:
    """Whatever the layout of the inputs, and whatever layouts the plan uses inside."""
    fn, inputs = LAYOUTS[name]
    values = inputs()
    with torch.no_grad():
        same(compiled(fn)(*values), fn(*values))
    assert any(not k.startswith("aten.") or "flash" in k for k in kernels()) or name.startswith("conv")


@pytest.mark.slow
def test_strides_of_a_conv_net_in_both_memory_formats() -> None:
    model, (x,), _ = convnet(size=16)
    body = model[:3]
    for fmt in (torch.contiguous_format, torch.channels_last):
        torch._dynamo.reset()
        values = x.to(memory_format=fmt)
        with torch.no_grad():
            same(compiled(body)(values), body(values))


# --- dtypes and values --------------------------------------------------------------------------------------------------


def test_autocast() -> None:
    """Autocast outside, and entered inside the graph; the products are bfloat16 as in eager."""
    model, x = linear(32, 48, 32, act=nn.GELU), torch.randn(6, 32)

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        return y.float() @ y.float().t()

    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            y, e = compiled(model)(x), model(x)
        assert y.dtype is torch.bfloat16
        same(y, e, 2e-2, 2e-2)
        assert any(k.startswith("onednn.linear") for k in kernels())
        products = [c.candidate for c in RECORDS[-1].plans[0].choices if c.candidate.region.op == "linear"]
        assert {candidate.in_formats[0].dtype for candidate in products} == {"bfloat16"}
        same(compiled(inside)(x), inside(x), 2e-2, 2e-2)


@pytest.mark.parametrize("freeze", [False, True])
def test_tied_weights(freeze: bool) -> None:
    model, (ids,), _ = zoo.llama(TINY, batch=2, length=10)
    assert model.head.weight is model.embed.weight
    with torch.no_grad():
        same(compiled(model, freeze=freeze)(ids), model(ids))
    products = [k for k in kernels() if "linear" in k]
    assert products
    assert not freeze or all(k.endswith("_packed") for k in products)


def test_tied_weights_share_their_gradient() -> None:
    model, (ids,), _ = zoo.llama(TINY, batch=2, length=10)
    other = copy.deepcopy(model)
    model(ids).pow(2).mean().backward()
    compiled(other)(ids).pow(2).mean().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)
    assert [p.kind for p in RECORDS[-1].plans] == ["forward", "backward"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    w, b = torch.randn(12, 8, dtype=dtype), torch.randn(12, dtype=dtype)

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(x, w, b)
        return y, torch.bmm(y[None], w[None])

    x = torch.randn(5, 8, dtype=dtype)
    close = 1e-2 if dtype is torch.float16 else 1e-5
    with torch.no_grad():
        same(compiled(f, cost_model="measured")(x), f(x), close, close)


class NoFeatures(nn.Module):
    """A product over nothing, and then the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(6, 0)), nn.Parameter(torch.arange(6.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


EMPTY: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "no features": (NoFeatures(), (torch.empty(5, 0),)),
    "linear": (linear(8, 6, act=nn.GELU), (torch.empty(0, 8),)),
    "inner": (lambda x: x @ torch.empty(0, 3), (torch.empty(4, 0),)),
    "conv": (lambda x: F.gelu(CONV(x)), (torch.empty(0, 8, 6, 6),)),
    "bmm": (torch.bmm, (torch.empty(0, 3, 4), torch.empty(0, 4, 5))),
    "attention": (attention, tuple(torch.empty(0, 4, 7, 16) for _ in range(3))),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("cost_model", ["measured", "roofline"])
def test_empty_tensors(name: str, cost_model: str) -> None:
    fn, values = EMPTY[name]
    with torch.no_grad():
        same(compiled(fn, cost_model=cost_model, freeze=True)(*values), fn(*values))


def test_strides_that_vary_by_themselves_are_planned() -> None:
    """Rows of wider tensors: the number of rows and the step from one to the next are two symbols, and only one is a size."""
    model = linear(8, 12)
    run = compiled(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", "LayerZero")
        for rows, width in ((5, 9), (6, 10), (7, 12)):
            x = torch.randn(rows, width)[:, 1:9]
            same(run(x), model(x))
    assert kernels() == ["onednn.linear"]


def tied_to_a_weight(x: Tensor) -> Tensor:
    """The width's symbol has one value only that fits the layer, but the guard is about its half."""
    return F.linear(x.unflatten(-1, (2, -1)).sin().flatten(-2), x.new_ones(8, 16))


def caches(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Nothing says that keys and values are as many, but for what attention is."""
    keys = torch.cat([keys, x], 2)
    seen = (torch.arange(keys.shape[2]) > x[0, 0, 0, 0])[None, None, None]
    return F.scaled_dot_product_attention(x, keys, torch.cat([values, x], 2), attn_mask=seen)


TIED: dict[str, tuple[Callable[..., Tensor], bool | None, Callable[[int], tuple[Tensor, ...]]]] = {
    "weight": (tied_to_a_weight, True, lambda n: (torch.randn(n, 16),)),
    "caches": (caches, None, lambda n: (torch.randn(2, 4, 1, 16), *torch.randn(2, 2, 4, n, 16))),
}


@pytest.mark.parametrize("name", TIED)
def test_kernels_are_tried_at_sizes_that_the_guards_permit(name: str, tmp_path: Path) -> None:
    """Inputs of any others do not fit each other."""
    f, dynamic, inputs = TIED[name]  # None: what Dynamo sees vary has a symbol of its own, also where another has the same size
    plant(str(tmp_path))  # so that nothing was tried before
    run = compiled(f, dynamic=dynamic, cache_dir=str(tmp_path))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", "LayerZero")
        for size in (9, 12):
            x = inputs(size)
            same(run(*x), f(*x))
    assert set(kernels()) & {"onednn.linear", "aten.flash_attention_cpu"}


def test_sizes_may_be_spelt_otherwise_by_a_kernels_shape_rule() -> None:
    """Two sizes of one symbol, and ATen's attention calls one of them s*s//s."""
    model = linear(8, 8)

    def f(x: Tensor) -> Tensor:
        y = model(x)[None]
        return F.scaled_dot_product_attention(y, y, y)

    run = compiled(f, dynamic=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", "LayerZero")
        for size in (2, 3):
            x = torch.randn(size, size, 5, 8)
            same(run(x), f(x))
    assert "onednn.linear" in kernels()


def test_rows_may_go_to_zero_under_dynamic_shapes() -> None:
    model = linear(8, 6, act=nn.GELU)
    run = compiled(model, dynamic=True)
    with torch.no_grad():
        for rows in (5, 9, 1, 0):
            x = torch.randn(rows, 8)
            same(run(x), model(x))


SPECIAL = {
    "linear_relu": (linear(16, 16, act=nn.ReLU), (6, 16)),
    "linear_gelu": (linear(16, 16, act=nn.GELU), (6, 16)),
    "linear_silu": (linear(16, 16, act=nn.SiLU), (6, 16)),
    "linear_hardtanh": (linear(16, 16, act=nn.Hardtanh), (6, 16)),
    "conv_relu": (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()).eval(), (2, 8, 6, 6)),
    "conv_norm_relu": (nn.Sequential(conv_bn(8, 8, 1), nn.ReLU()).eval(), (2, 8, 6, 6)),
}


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("name", SPECIAL)
def test_nan_and_infinity_come_out_as_in_eager(name: str, freeze: bool) -> None:
    model, shape = SPECIAL[name]
    x = torch.randn(shape)
    flat = x.view(-1)
    flat[0], flat[flat.numel() // 2], flat[-1] = torch.nan, torch.inf, -torch.inf
    with torch.no_grad():
        y, e = compiled(model, freeze=freeze)(x), model(x)
    assert e.isnan().any()
    assert not e.isnan().all()
    same_places(y, e)
    same(y, e)


@pytest.mark.parametrize("kind", ["bool", "float", "causal"])
def test_attention_with_fully_masked_rows_and_nan(kind: str) -> None:
    q, k, v = (torch.randn(2, 4, 8, 16) for _ in range(3))
    keep = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    keep[1, :, 3:5] = False  # these queries may look at nothing
    keep[0, :, :, 6:] = False
    if kind == "causal":
        keep &= torch.ones(8, 8, dtype=torch.bool).tril()
    mask = torch.zeros(2, 1, 8, 8).masked_fill(~keep, -torch.inf) if kind == "float" else keep
    with torch.no_grad():
        same(compiled(attention)(q, k, v, mask), attention(q, k, v, mask))
        q[0, 1, 2, 0] = torch.nan
        y, e = compiled(attention)(q, k, v, mask), attention(q, k, v, mask)
        same_places(y, e)
        same(y, e)


def repeated(x: Tensor, groups: int, times: int) -> Tensor:
    batch, _, length, size = x.shape
    return x[:, :, None].expand(batch, groups, times, length, size).reshape(batch, groups * times, length, size)


@pytest.mark.parametrize("kind", ["alike", "k_and_v_unlike", "reshaped", "tiled"])
def test_repeated_heads_are_read_once_only_where_that_is_the_same(kind: str) -> None:
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if kind == "alike":
            k, v = repeated(k, 2, 2), repeated(v, 2, 2)
        elif kind == "k_and_v_unlike":
            k, v = repeated(k, 2, 2), repeated(v[:, :1], 1, 4)
        elif kind == "reshaped":
            k, v = (repeated(t, 2, 2).reshape(2, 4, 18, 8) for t in (k, v))
            q = q[..., :8]
        else:
            k, v = (t[:, None].expand(2, 2, 2, 9, 16).reshape(2, 4, 9, 16) for t in (k, v))
        return attention(q, k, v)

    with torch.no_grad():
        same(compiled(f, backends=["attention"])(q, k, v), f(q, k, v))
    (choice,) = [c for c in RECORDS[-1].plans[0].choices if c.candidate.region.op == "attention"]
    grouped = dict(choice.candidate.params)["gqa"]
    assert grouped == (kind == "alike")


def test_dropout_in_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64, bias=False)).train()
    nn.init.eye_(model[2].weight)  # what dropout removed is zero in the output
    run, x = compiled(model), torch.ones(32, 64, requires_grad=True)
    first, second = run(x), run(x)
    for y in (first, second):
        assert 0.4 < (y == 0).double().mean() < 0.6
    assert not torch.equal(first == 0, second == 0)
    first.sum().backward()
    torch.testing.assert_close(model[0].bias.grad, 2.0 * (first != 0).sum(0))  # the same mask in the backward pass


def test_attention_dropout_in_training() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    q, k = torch.zeros(2, 4, 16, 8, requires_grad=True), torch.zeros(2, 4, 16, 8)
    v = torch.eye(16, 8).expand(2, 4, 16, 8).contiguous()
    y = compiled(f)(q, k, v)  # all weights are 1/16, and those that were not dropped are doubled
    assert 0.3 < (y == 0).double().mean() < 0.7
    y.sum().backward()
    assert q.grad is not None


class Written(nn.Module):
    """Buffers whose values before or after a write the backward pass needs."""

    mean: Tensor

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.linear = order, nn.Linear(32, 32, bias=False)
        self.register_buffer("mean", torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.order == "after":
            self.mean.add_(1)
            return y * self.mean.clone()
        y = y * self.mean.view(4, 8).t().reshape(32).clone()
        self.mean[1:].mul_(2)
        return y.sin()


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_backward_pass_sees_what_buffers_held(order: str) -> None:
    """AOTAutograd reads some again in the backward pass, after they were written: wrong gradients, or an error."""
    model = Written(order)
    expected, inputs = copy.deepcopy(model), [torch.randn(4, 32) for _ in range(3)]
    grads = []
    for run in (compiled(model), expected):
        leaves = [x.clone().requires_grad_() for x in inputs]
        for y in [run(x) for x in leaves]:  # all forward passes first
            y.pow(2).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.linear.weight.grad, expected.linear.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.mean, expected.mean)


def test_forward_only_with_gradients_enabled() -> None:
    model = linear(16, 16, act=nn.GELU)
    run, x = compiled(model), torch.randn(4, 16, requires_grad=True)
    y = run(x)
    same(y.detach(), model(x).detach())
    assert y.requires_grad
    with torch.no_grad():
        assert not run(x).requires_grad
    with torch.inference_mode():
        assert run(torch.randn(4, 16)).is_inference()


# --- freezing -----------------------------------------------------------------------------------------------------------


def test_freeze_packs_and_merges() -> None:
    model, (ids,), _ = zoo.llama(replace(TINY, tied=False), batch=2, length=10)
    with torch.no_grad():
        same(compiled(model, freeze=True)(ids), model(ids))
    assert "onednn.merged_linear_packed" in kernels()
    assert "onednn.linear" not in kernels()


def test_freeze_folds_batch_norms_into_convolutions() -> None:
    model, args, _ = convnet(size=32)
    policy = {"lock": [{"op": "conv", "kernel": "onednn.conv_packed"}]}  # by price alone, small images stay in eager's layout
    with torch.no_grad():
        same(compiled(model, freeze=True, policy=policy)(*args), model(*args))
    folded = [c.candidate for p in RECORDS[-1].plans for c in p.choices if dict(c.candidate.params).get("affine")]
    assert len(folded) >= 8
    assert all(c.kernel.endswith("_packed") for c in folded)


@pytest.mark.parametrize("source", ["modules", "closure"])
def test_frozen_weights_belong_to_one_model(source: str) -> None:
    """A second model with the same code and shapes must not run with the first one's weights."""
    models = [nn.Linear(16, 16).eval() for _ in range(2)]
    x = torch.randn(4, 16)

    def call(model: nn.Module, x: Tensor) -> Tensor:
        return model(x)

    shared = compiled(call, freeze=True)
    with torch.no_grad():
        for model in models:
            run = compiled(model, freeze=True) if source == "modules" else lambda x, model=model: shared(model, x)
            same(run(x), model(x))
            assert kernels() == ["onednn.linear_packed"]


def test_freeze_while_gradients_flow_changes_nothing() -> None:
    model = linear(16, 16)
    run, x = compiled(model, freeze=True), torch.randn(4, 16)
    for _ in range(2):
        same(run(x).detach(), model(x).detach())
        run(x).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()


# --- error budget -------------------------------------------------------------------------------------------------------


def wide() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512)).eval(), torch.randn(8, 512)


def dtypes() -> set[str]:
    return {c.candidate.in_formats[0].dtype for p in RECORDS[-1].plans for c in p.choices if c.candidate.region.op == "linear"}


def test_error_budget_is_used_and_kept() -> None:
    model, x = wide()
    with torch.no_grad():
        y, e = compiled(model, error_budget=1e-2, freeze=True)(x), model(x)
    assert "bfloat16" in dtypes()
    error = ((y - e).norm() / e.norm()).item()
    assert 0 < error <= 1e-2
    assert RECORDS[-1].error == pytest.approx(error, rel=1e-3)


def test_error_budget_too_small_for_narrow_dtypes() -> None:
    model, x = wide()
    with torch.no_grad():
        same(compiled(model, error_budget=1e-6, freeze=True)(x), model(x))
    assert dtypes() == {"float32"}


# --- the race -----------------------------------------------------------------------------------------------------------

CALLS = 4 * (race.WARMUP + race.ROUNDS) + 2  # more than any race takes


@pytest.fixture
def raced(tmp_path: Path) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    plant(str(tmp_path))
    return linear(32, 48, 32, act=nn.GELU), torch.randn(6, 32), {"race": True, "cache_dir": str(tmp_path)}


def test_the_race_decides_and_stores_its_verdict(raced: tuple[nn.Module, Tensor, dict[str, Any]]) -> None:
    model, x, options = raced
    run = compiled(model, **options)
    with torch.no_grad():
        run(x)
        record = RECORDS[-1]
        assert not record.decided
        for _ in range(CALLS):
            same(run(x), model(x))
    assert record.decided
    assert set(record.times) == {PLANNED, INDUCTOR, EAGER}
    # A finalist that led too far behind is dropped early, so the best median is the winner's.
    assert record.times[record.winner] == min(record.times.values())
    store = open_store(options["cache_dir"])
    verdict = store.get_record("verdict", record.key)
    assert verdict is not None
    assert verdict["winner"] == record.winner
    # Whatever the winner, the next compilation makes nothing else.
    for winner, known in ((PLANNED, 1), (INDUCTOR, 0), (EAGER, 0)):
        store.put_record("verdict", record.key, {**verdict, "winner": winner})
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with torch.no_grad(), torch.compiler.config.patch(cache_key_tag=f"{options['cache_dir']} {winner}"):  # Inductor knows no such graph
            same(compiled(model, **options)(x), model(x))
        assert RECORDS[-1].key == record.key
        assert RECORDS[-1].decided
        assert RECORDS[-1].winner == winner
        assert (counters()["plans"], counters()["known_plans"]) == (0, known)


class Convolved(nn.Module):
    """Returns convolutions' own strides, a weight and an input; counts its calls."""

    calls: Tensor

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.conv, self.norm, self.last = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3)
        self.head = nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()))
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.calls.add_(1)
        y = self.last(self.act(self.norm(self.conv(x))))
        return y, self.head(y.mean((2, 3))) * self.calls, self.last.weight, x


def test_with_freeze_inductor_freezes_too(tmp_path: Path) -> None:
    """The rival is Inductor at its best: its own packed and folded weights, which a later write does not change."""
    plant(str(tmp_path))
    options = {"race": True, "freeze": True, "cache_dir": str(tmp_path)}
    model, x = Convolved(nn.SiLU()).eval(), torch.randn(2, 3, 17, 19)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        run = compiled(model, **options)
        for _ in range(CALLS):
            y, e = run(x), expected(x)
            same(y, e, 1e-4, 1e-4)
        assert RECORDS[-1].decided
        assert INDUCTOR in RECORDS[-1].times
        store = open_store(options["cache_dir"])
        verdict = store.get_record("verdict", RECORDS[-1].key)
        assert verdict is not None
        store.put_record("verdict", RECORDS[-1].key, {**verdict, "winner": INDUCTOR})
        torch._dynamo.reset()
        run = compiled(model, **options)
        for _ in range(3):
            y, e = run(x), expected(x)
            same(y, e, 1e-4, 1e-4)
        assert RECORDS[-1].winner == INDUCTOR
        assert y[2].data_ptr() == model.last.weight.data_ptr()
        assert model.calls == expected.calls
        model.conv.weight.zero_()
        same(run(x)[0], expected(x)[0], 1e-4, 1e-4)


def test_where_freezing_fails_inductor_races_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("no tracing context")

    monkeypatch.setattr("torch._inductor.compile_fx.fw_compiler_freezing", fail)
    plant(str(tmp_path))
    model, x = Convolved(nn.SiLU()).eval(), torch.randn(2, 3, 17, 19)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        run = compiled(model, race=True, freeze=True, cache_dir=str(tmp_path))
        for _ in range(CALLS):
            same(run(x), expected(x), 1e-4, 1e-4)
    assert INDUCTOR in RECORDS[-1].times
    assert not any("constants too" in note for note in RECORDS[-1].notes)


def test_what_would_make_a_number_of_nan_is_no_rival(tmp_path: Path) -> None:
    plant(str(tmp_path))
    model, x = Convolved(nn.ReLU()).eval(), torch.randn(2, 3, 17, 19)
    x[0, 0, 5, 5] = torch.nan
    with torch.no_grad():
        run = compiled(model, race=True, freeze=True, cache_dir=str(tmp_path))
        for _ in range(CALLS):
            same_places(run(x)[0], model(x)[0])
    assert INDUCTOR in RECORDS[-1].times
    assert not any("constants too" in note for note in RECORDS[-1].notes)


def test_the_race_while_training(raced: tuple[nn.Module, Tensor, dict[str, Any]]) -> None:
    model, x, options = raced
    other = copy.deepcopy(model)
    run = compiled(other, **options)
    model(x).pow(2).sum().backward()
    for _ in range(CALLS):
        other.zero_grad()
        run(x).pow(2).sum().backward()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4)
    assert RECORDS[-1].decided
    assert [p.kind for p in RECORDS[-1].plans] == ["forward", "backward"]


RACE = """
    import json, torch
    from lz_compiler.backend import RECORDS
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.GELU(), torch.nn.Linear(48, 32)).eval()
    x = torch.randn(6, 32)
    run = torch.compile(model, backend="layerzero", options={"cost_model": "roofline"})
    calls = 0
    with torch.no_grad():
        while calls < 60 and not (RECORDS and RECORDS[-1].decided):
            torch.testing.assert_close(run(x), model(x))
            calls += 1
    record = RECORDS[-1]
    print(json.dumps([calls, record.decided, record.winner, record.key, dict(torch._dynamo.utils.counters["layerzero"])]))
"""


@pytest.mark.slow
def test_a_fresh_process_compiles_the_winner_only(tmp_path: Path) -> None:
    """Two processes plan and race at once on one cache; a third finds a verdict at its first call."""
    both = [in_process(RACE, tmp_path) for _ in range(2)]
    racing = [result(process) for process in both]
    calls, decided, winner, key, counts = result(in_process(RACE, tmp_path))
    assert all(r[1] for r in racing)
    assert max(r[0] for r in racing) > race.WARMUP
    assert {r[3] for r in racing} == {key}
    assert (calls, decided) == (1, True)
    assert winner in {r[2] for r in racing}
    assert counts.get("plans", 0) == 0 or winner == PLANNED


# --- caches and clocks that fail ----------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    model, x = linear(16, 16), torch.randn(4, 16)
    with pytest.warns(UserWarning, match="cannot be used"), torch.no_grad():
        y = compiled(model, cost_model="measured", cache_dir=str(tmp_path / "file" / "cache"))(x)
    same(y, model(x))
    assert counters()["plans"] == 1


def test_a_corrupt_cache_is_built_anew(tmp_path: Path) -> None:
    (tmp_path / "timings.sqlite").write_bytes(b"no database" * 1000)
    model, x = linear(16, 16), torch.randn(4, 16)
    with pytest.warns(UserWarning, match="is damaged"), torch.no_grad():
        y = compiled(model, cost_model="measured", cache_dir=str(tmp_path))(x)
    same(y, model(x))
    held = open_store(str(tmp_path)).ls()
    assert held.path == tmp_path / "timings.sqlite"
    assert held.counts["timing"] > 0


@pytest.mark.parametrize(("what", "code"), [("raises", "failed"), ("wrong", "wrong"), ("drops_nan", "nan")])
def test_a_bad_kernel_is_rejected_with_its_reason(what: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = backends.all_backends()["onednn"]
    good = library.kernels["onednn.linear"]

    def bad(emit: Any, values: Any, params: Any) -> Any:
        if what == "raises":
            raise RuntimeError("could not create a primitive\nand more")
        y = good.run(emit, values, params)
        return y * 1.001 if what == "wrong" else y.nan_to_num()

    plant(str(tmp_path))
    monkeypatch.setitem(library.kernels, "onednn.linear", replace(good, run=bad))
    backends.kernel.cache_clear()
    model, x = linear(16, 16), torch.randn(4, 16)
    try:
        with torch.no_grad():
            same(compiled(model, cost_model="measured", cache_dir=str(tmp_path))(x), model(x))
    finally:
        monkeypatch.undo()
        backends.kernel.cache_clear()
    assert kernels() != ["onednn.linear"]
    (choice,) = RECORDS[-1].plans[0].choices
    (rejection,) = [r for r in choice.rejections if r.kernel == "onednn.linear"]
    assert rejection.code == code
    assert "primitive" in rejection.detail or what != "raises"
    assert f"onednn.linear ({code})" in str(lz.explain(compiled(model)))


def test_without_time_to_measure_the_graph_stays_as_it_is(tmp_path: Path) -> None:
    model, x = linear(16, 16), torch.randn(4, 16)
    plant(str(tmp_path))
    with torch.no_grad():
        same(compiled(model, cost_model="measured", measure_budget_s=0.0, cache_dir=str(tmp_path))(x), model(x))
    (choice,) = RECORDS[-1].plans[0].choices
    assert choice.candidate.kernel.startswith("aten.")
    assert choice.cost.source == "roofline"
    assert "not_measured" in {r.code for r in choice.rejections}


def test_without_time_to_solve_the_plan_is_valid_and_honest() -> None:
    model, args, _ = convnet(size=16)
    with torch.no_grad():
        same(compiled(model, solve_budget_s=1e-4)(*args), model(*args))
    (plan,) = RECORDS[-1].plans
    assert plan.status == "feasible"
    assert 0 <= plan.bound <= plan.objective
    assert f"{plan.gap:.1%}" in str(lz.explain(plan))
    assert "optimal" not in str(lz.explain(plan))


# --- the report ---------------------------------------------------------------------------------------------------------


def test_explain_shows_what_was_chosen_and_what_was_not(tmp_path: Path) -> None:
    model, x = linear(32, 48, act=nn.ReLU), torch.randn(6, 32)
    plant(str(tmp_path))
    run = compiled(model, cost_model="measured", cache_dir=str(tmp_path))
    with torch.no_grad():
        run(x)
    report = lz.explain(run)
    (graph,) = json.loads(report.to_json())["graphs"]
    (plan,) = graph["plans"]
    (region,) = plan["regions"]
    assert region["op"] == "linear"
    assert region["source"] == "measured"
    assert region["cost_ns"] > 0
    assert region["runner_up"]["kernel"] != region["kernel"]
    assert region["runner_up"]["cost_ns"] > 0
    codes = {(r["kernel"], r["code"]) for r in region["rejections"]}
    assert {("onednn.linear", "nan"), ("onednn.linear_packed", "weight_not_frozen")} <= codes
    assert plan["status"] == "optimal"
    assert plan["bound_ns"] == plan["objective_ns"] >= region["cost_ns"]
    assert plan["gap"] == 0
    text = str(report)
    for part in (region["kernel"], "measured", "runner-up", region["runner_up"]["kernel"], "optimal", "bound", "gap"):
        assert part in text
    for kernel, code in codes:
        assert f"{kernel} ({code})" in text


@pytest.mark.parametrize("options", [{}, {"freeze": True}, {"race": True}, {"backends": ["inductor"]}])
def test_records_live_as_long_as_their_graphs(options: dict[str, Any]) -> None:
    gc.collect()
    before = len(RECORDS)
    model, x = linear(16, 24), torch.randn(4, 16)
    run = compiled(model, **options)
    with torch.no_grad():
        run(x)
    gc.collect()
    assert len(RECORDS) == before + 1
    assert len(lz.explain(run).data["graphs"]) == 1
    torch._dynamo.reset()  # the compiled graph goes, its model stays
    gc.collect()
    assert len(RECORDS) == before
    assert not lz.explain(run).data["graphs"]


def test_explain_knows_its_model() -> None:
    first, second, x = linear(16, 16), linear(16, 24), torch.randn(4, 16)
    runs = [compiled(first), compiled(second)]
    with torch.no_grad():
        for run in runs:
            run(x)
    for run, width in zip(runs, (16, 24), strict=True):
        (graph,) = lz.explain(run).data["graphs"]
        (region,) = graph["plans"][0]["regions"]
        assert region["kernel"] == "onednn.linear"
        assert width in (16, 24)
    assert lz.explain(runs[0]).data["graphs"] != lz.explain(runs[1]).data["graphs"]
    assert not lz.explain(linear(16, 16)).data["graphs"]
