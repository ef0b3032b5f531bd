"""A fixed slice of the op sweep (benchmarks/opinfo.py): ops that LayerZero plans, and ops whose graphs it must leave alone.

Every kernel that is offered is placed, measured or not (`prefer_kernels`), so a wrong rewrite cannot hide behind its price.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import opinfo
from torch.utils import _pytree as pytree

FIRST = {"addmm.decomposed": 3}  # samples of an op that must stay as it is; 2 where not said
# Ops of which some sample must get a kernel of LayerZero's (by full name), and the samples to run.
PLANNED: dict[str, tuple[int, ...]] = {
    "mm": (0, 1),
    "matmul": (2, 6),
    "nn.functional.linear": (2, 6, 12),
    "nn.functional.conv2d": (0, 5, 10),  # the last with one number of padding for both dimensions
    "nn.functional.scaled_dot_product_attention": (0, 1),
    "linalg.multi_dot": (3, 6),
}
UNTOUCHED = (
    "addmm", "addmm.decomposed", "baddbmm", "bmm", "mv", "einsum", "nn.functional.conv1d", "nn.functional.conv3d",
    "nn.functional.conv_transpose2d",
    "nn.functional.gelu", "nn.functional.silu", "nn.functional.relu", "softmax", "nn.functional.layer_norm",
    "nn.functional.batch_norm", "nn.functional.group_norm", "nn.functional.embedding", "gather", "index_put", "scatter_add",
    "sort", "topk", "cumsum", "cat", "split", "view", "reshape", "permute", "as_strided", "masked_fill", "where",
    "linalg.inv", "complex", "view_as_complex", "nn.functional.max_pool2d", "nn.functional.interpolate.bilinear", "nonzero",
    "item", "nn.functional.dropout", "zero_", "empty_like", "to_sparse", "unique",
)  # fmt: skip


@functools.cache
def infos() -> dict[str, Any]:
    return opinfo.op_infos()


@pytest.fixture(scope="module", autouse=True)
def _sweeping() -> Iterator[None]:
    from lz_compiler.cost_models.roofline import Roofline

    honest, dynamo = Roofline.cost, torch._dynamo.config
    before = dynamo.capture_scalar_outputs, dynamo.capture_dynamic_output_shape_ops
    opinfo.configure()
    opinfo.prefer_kernels()
    yield
    Roofline.cost = honest  # type: ignore[method-assign]
    dynamo.capture_scalar_outputs, dynamo.capture_dynamic_output_shape_ops = before


def sweep(name: str, indices: tuple[int, ...]) -> list[opinfo.Result]:
    """The samples' results: from one graph where that says enough, as it does of an op that nothing is planned for."""
    op = infos()[name]
    drawn = [(i, sample) for i, sample in enumerate(opinfo.samples(op, max(indices) + 1)) if i in indices]  # some have only one
    group = [opinfo.run_eagerly(op, i, args, kwargs) for i, (args, kwargs) in drawn]
    groups = [[sample] for sample in group] if name in PLANNED else [group]
    found = [result for group in groups for result in opinfo.check_samples(op, group, lambda indices, phase: None)]
    assert sorted(r.index for r in found) == [i for i, _ in drawn] != []
    assert [r for r in found if r.missed] == []
    assert all(r.inductor == opinfo.OK for r in found)  # else the slice tests nothing
    return found


@pytest.mark.parametrize("name", PLANNED)
def test_planned_op(name: str) -> None:
    assert sum(result.kernels for result in sweep(name, PLANNED[name])) > 0


@pytest.mark.parametrize("name", UNTOUCHED)
def test_untouched_op(name: str) -> None:
    assert sum(result.kernels for result in sweep(name, tuple(range(FIRST.get(name, 2))))) == 0


# --- the sweep's own checks ---------------------------------------------------------------------------------------------------


def test_difference() -> None:
    x = torch.arange(6.0).reshape(2, 3)

    def differ(y: Any, z: Any, **options: Any) -> str:
        return opinfo.difference(y, z, 1e-5, 1e-5, **options) or ""

    assert differ([x, 1], [x.clone(), 1]) == ""
    assert "not close" in differ(x, x + 1e-3)
    assert differ(x, x + 1e-3, values=False) == ""
    assert "shape" in differ(x, x[:1])
    assert "dtype" in differ(x, x.double(), values=False)
    assert "strides" in differ(x, x.t().contiguous().t())
    assert differ(x[:, :2].clone(), x[:, :2]) == ""  # eager's has gaps: nobody can rely on them
    assert differ(x[:1], torch.empty_strided((1, 3), (7, 1)).copy_(x[:1])) == ""  # a stride that is never used
    assert "not close" in differ(x, x * float("nan"))
    assert "outputs" in differ([x], [x, x])
    assert "eager has 2" in differ(1, 2)


def test_run_keeps_memory_and_mutation_apart() -> None:
    x = torch.zeros(4)
    out, (args, _) = opinfo.run(lambda a, b: a.add_(1) + b, (x[:2], x[2:]), {})
    assert x.tolist() == [0, 0, 0, 0]
    assert args[0].tolist() == [1, 1]
    assert args[0].untyped_storage().data_ptr() == args[1].untyped_storage().data_ptr()
    assert out.tolist() == [1, 1]


def test_a_missed_sample_is_reported() -> None:
    missed = opinfo.Result("mm", 0, opinfo.OK, "wrong: 1")
    results = [missed, opinfo.Result("mm", 1, opinfo.OK, opinfo.OK, 1), opinfo.Result("mm", 2, "error: x", opinfo.SKIPPED)]
    found = opinfo.summary(results)
    assert (found["samples"], found["inductor"], found["layerzero"], found["with_kernels"]) == (3, 2, 1, 1)
    assert [m["index"] for m in found["missed"]] == [0]
    assert found["inductor_failures"] == {"error": 1}


def test_a_group_is_one_graph_unless_something_is_wrong() -> None:
    add = infos()["add"]
    group = [opinfo.run_eagerly(add, i, args, kwargs) for i, (args, kwargs) in enumerate(opinfo.samples(add, 5))]
    graphs: list[tuple[str, list[int]]] = []

    def begin(indices: list[int], phase: str) -> None:
        graphs.append((phase, indices))

    assert all(r.layerzero == opinfo.OK for r in opinfo.check_samples(add, group, begin))
    assert graphs == [("inductor", [0, 1, 2, 3, 4]), ("layerzero", [0, 1, 2, 3, 4])]
    group[3] = replace(group[3], expected=pytree.tree_map_only(torch.Tensor, lambda t: t + 1, group[3].expected))
    found = opinfo.check_samples(add, group, begin)
    assert sorted(r.index for r in found) == [0, 1, 2, 3, 4]
    assert [r.index for r in found if r.inductor.startswith("wrong")] == [3]


def test_a_kernel_is_tested_alone() -> None:
    mm = infos()["mm"]
    group = [opinfo.run_eagerly(mm, i, args, kwargs) for i, (args, kwargs) in enumerate(opinfo.samples(mm, 2))]
    graphs: list[list[int]] = []
    found = opinfo.check_samples(mm, group, lambda indices, phase: graphs.append(indices))
    assert graphs == [[0, 1]] * 2 + [[0]] * 2 + [[1]] * 2
    assert [(r.index, r.layerzero, r.kernels > 0) for r in found] == [(0, opinfo.OK, True), (1, opinfo.OK, False)]


def test_a_wrong_kernel_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep sees a kernel that computes something else."""
    from lz_compiler.passes import apply

    real = apply.backends.kernel

    def broken(name: str) -> Any:
        kernel = real(name)
        return replace(kernel, run=lambda emit, t, p: emit.call(torch.ops.aten.mul.Tensor, kernel.run(emit, t, p), 2.0))

    monkeypatch.setattr(apply.backends, "kernel", broken)
    args, kwargs = next(opinfo.samples(infos()["mm"], 1))
    result = opinfo.check_sample(infos()["mm"], 0, args, kwargs)
    assert result.missed
    assert result.layerzero.startswith("wrong: ")
