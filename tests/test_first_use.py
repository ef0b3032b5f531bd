"""A kernel that nobody has tried is tried before a plan uses it, also at other sizes of a dynamic graph; what says nothing about a
kernel (memory ran out, eager itself is not finite) is not held against it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from machine import plant
from torch import Tensor, nn

from lz_compiler import backends, measure, semantics, torch_private
from lz_compiler.backend import RECORDS
from lz_compiler.backends.base import Kernel, SelectionContext
from lz_compiler.cost_models.measured import Measured
from lz_compiler.target import detect
from lz_compiler.timings import open_store
from lz_compiler.trust import canary_regions, first_use
from lz_compiler.types import Candidate

bad_rows: set[int] = set()
runs: list[int] = []
_lib = torch.library.Library("rows", "DEF")
_lib.define("linear(Tensor x, Tensor w, Tensor b) -> Tensor")


def _linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    runs.append(x.shape[0])
    y = torch.nn.functional.linear(x, w, b)
    return y * math.nan if x.shape[0] in bad_rows else y


_lib.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("rows::linear", lambda x, w, b: x.new_empty((x.shape[0], w.shape[0])), lib=_lib)


def _too_large(emit: Any, t: Any, p: Any) -> Any:
    return torch.empty(1 << 50, dtype=torch.int8)


class Rows:
    name, devices = "rows", ("cpu",)
    kernels = {
        "rows.linear": Kernel("rows.linear", lambda emit, t, p: emit.call(
            torch.ops.rows.linear.default, t["x"], emit.call(torch.ops.aten.permute.default, t["w"], [1, 0]) if p["transposed"] else t["w"],
            t["bias"])),
        "rows.large": Kernel("rows.large", _too_large),
    }  # fmt: skip

    def version(self) -> str:
        return "1"

    def missing(self) -> str | None:
        return None

    def candidates(self, ctx: SelectionContext) -> Iterator[Candidate]:
        if ctx.region.op == "linear" and ctx.default and "bias" in ctx.roles:
            yield ctx.candidate(self.kernels["rows.linear"])


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    backends.register(Rows())
    bad_rows.clear()
    yield
    for cached in (backends.all_backends, backends.owners, backends.kernel):
        cached.cache_clear()


def _compiled(rows: int, cache: Any, dynamic: bool, **options: Any) -> tuple[list[str], list[tuple[str, str]]]:
    """(kernels of the plan, rejections of ours as code and detail)."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = nn.Linear(32, 48), torch.randn(rows, 32)
    given = {"race": False, "cache_dir": str(cache), "policy": {"prefer": [{"kernel": "rows.linear", "factor": 0.001}]}, **options}
    with torch.no_grad():
        torch.compile(model, backend="layerzero", dynamic=dynamic, options=given)(x)
    choices = [c for c in RECORDS[-1].plans[0].choices if c.candidate.region.op == "linear"]
    assert "rows.linear" not in [o.kernel for c in choices for o, _ in c.alternatives if o.epsilon == math.inf]
    return [c.candidate.kernel for c in choices], [(r.code, r.detail) for c in choices for r in c.rejections if r.kernel == "rows.linear"]


@pytest.fixture
def cache(tmp_path: Any) -> Any:
    """A store that knows the device's peaks."""
    plant(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("cost_model", ["roofline", "constant"])
def test_whatever_the_cost_model_a_kernel_is_tried_once(cache: Any, cost_model: str) -> None:
    runs.clear()
    assert _compiled(6, cache, False, cost_model=cost_model) == (["rows.linear"], [])
    tried = len(runs)
    assert _compiled(6, cache, False, cost_model=cost_model)[0] == ["rows.linear"]
    assert len(runs) == tried + 1  # the call itself: the fact is stored
    assert open_store(str(cache)).get_records(first_use.CHECKED)
    bad_rows.add(7)
    kernels, rejected = _compiled(7, cache, False, cost_model=cost_model)
    assert "rows.linear" not in kernels
    assert rejected[0][0] == "wrong"
    tried = len(runs)
    assert "rows.linear" not in _compiled(7, cache, False, cost_model=cost_model)[0]
    assert len(runs) == tried  # a stored failure


@pytest.mark.parametrize("cost_model", ["measured", "roofline"])
@pytest.mark.parametrize("bad", [7, 12])  # an odd one, and a larger one
def test_a_dynamic_graph_is_tried_at_other_sizes(cache: Any, cost_model: str, bad: int) -> None:
    bad_rows.add(bad)
    assert _compiled(6, cache, False, cost_model=cost_model)[0] == ["rows.linear"]
    kernels, rejected = _compiled(6, cache, True, cost_model=cost_model)
    assert "rows.linear" not in kernels
    assert rejected[0][0] == "wrong"
    runs.clear()
    assert "rows.linear" not in _compiled(6, cache, True, cost_model=cost_model)[0]
    assert runs == []


# --- what says nothing about a kernel -----------------------------------------------------------------------------------------


def _context(shape: str = "17x33x47", dtype: str = "float32", layout: str = "contiguous") -> SelectionContext:
    return next(c for s, c in canary_regions.contexts("linear", dtype, "cpu") if s == shape and "bias" in c.roles
                and c.default and not c.frozen and canary_regions.worst_layout(c.specs) == layout)  # fmt: skip


def test_running_out_of_memory_on_a_cpu_is_no_fact(cache: Any) -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50, dtype=torch.int8)
    assert type(raised.value) is RuntimeError
    assert torch_private.out_of_memory(raised.value)
    assert torch_private.out_of_memory(MemoryError())
    assert not torch_private.out_of_memory(RuntimeError("shapes differ"))
    assert MemoryError in torch_private.kernel_errors()
    ctx, store = _context(), open_store(str(cache))
    (priced,) = Measured(detect("cpu", store), store, 60.0).price(ctx, [ctx.candidate(Rows.kernels["rows.large"])])
    assert getattr(priced, "code", "") == "failed"
    assert "can't allocate memory" in priced.detail  # type: ignore[union-attr]
    assert not [e for e in store.ls().entries if e.kind == "timing"]


def test_padding_is_zero_and_an_innocent_kernel_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = _context(dtype="bfloat16", layout="rows")
    real = torch.empty_strided

    def spoiled(*args: Any, **kwargs: Any) -> Tensor:
        out = real(*args, **kwargs)
        if out.dtype.is_floating_point:
            out.as_strided((out.untyped_storage().nbytes() // out.element_size(),), (1,)).fill_(math.nan)
        return out

    monkeypatch.setattr(torch, "empty_strided", spoiled)
    for x in (measure.inputs(ctx, 0)["x"], measure._clone(measure.inputs(ctx, 0)["x"])):
        stored = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,))
        assert stored.isfinite().all()
    candidate = ctx.candidate(Rows.kernels["rows.linear"])
    assert measure.checked(ctx, candidate).error is None


def test_where_eager_is_not_finite_nothing_is_judged(cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = semantics.REFERENCES["linear"]
    spoiled = lambda t, p: right(t, p) * (1.0 if t["x"].dtype == torch.float64 else math.nan)  # noqa: E731
    monkeypatch.setitem(semantics.REFERENCES, "linear", spoiled)
    ctx, store = _context(), open_store(str(cache))
    (priced,) = Measured(detect("cpu", store), store, 60.0).price(ctx, [ctx.candidate(Rows.kernels["rows.linear"])])
    assert getattr(priced, "code", "") == "unjudged"
    assert "eager's own result of linear of x (17, 33)" in priced.detail  # type: ignore[union-attr]
    assert not [e for e in store.ls().entries if e.kind == "timing"]


def test_where_eager_does_not_run_nothing_is_judged() -> None:
    """Sizes that do not fit each other, as those tried beside the example's may be."""
    ctx = _context()
    x = ctx.spec("x")
    wider = replace(x, shape=(x.shape[0], x.shape[1] + 1), stride=(x.shape[1] + 1, 1))
    other = replace(ctx, specs=tuple(wider if role == "x" else spec for role, spec in zip(ctx.roles, ctx.specs, strict=True)))
    error = measure.checked(other, other.candidate(Rows.kernels["rows.linear"])).error
    assert error is not None
    assert error.startswith("unjudged: eager itself does not run linear of x (17, 34), w ")
    assert not measure.is_fact(error)
