"""Plans for an H200, solved on a machine without one from committed timings: which kernels, how many of each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lz_compiler import backend, torch_private
from lz_compiler.capture import GraphView
from lz_compiler.errors import OptionError
from lz_compiler.options import Options
from lz_compiler.passes.apply import apply_plan
from lz_compiler.passes.verify import interface, verify
from lz_compiler.planning import make_plan
from lz_compiler.target import is_here, stored_target
from lz_compiler.timings import TimingStore
from lz_compiler.types import Plan

tf = pytest.importorskip("transformers")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="without Triton its kernels are no candidates")

CUDA = torch.device("cuda", 0)
TIMINGS = Path(__file__).parent / "data" / "h200_timings.jsonl"
Frozen = dict[fx.Node, Tensor]


class Captured(BaseException):
    """Ends a compilation whose graph is all that is wanted. No Exception: Dynamo would wrap it."""


def copied(graph: fx.Graph, frozen: Frozen) -> GraphView:
    gm = fx.GraphModule(graph.owning_module, copy.deepcopy(graph))
    values = {node.name: value for node, value in frozen.items()}
    return GraphView(gm.graph, {node: values[node.name] for node in gm.graph.nodes if node.name in values})


def moved(view: GraphView) -> GraphView:
    """A graph that was traced on a CPU, as it is traced on a CUDA device. The weights become fake, as everything is."""

    def swap(value: Tensor) -> Tensor:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)

    with torch_private.fake_mode_of(view.graph):
        for node in view.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = pytree.tree_map_only(Tensor, swap, node.meta["val"])
            node.args, node.kwargs = pytree.tree_map_only(torch.device, lambda _: CUDA, (node.args, node.kwargs))
    return GraphView(view.graph, {node: node.meta["val"] for node in view.frozen})


def capture(model: torch.nn.Module, **inputs: Any) -> tuple[GraphView, GraphView]:
    """The graph that the planner is given in the one call: as traced on a CPU, and as on a CUDA device."""
    found: list[GraphView] = []

    def stop(graph: fx.Graph, options: Options, target: object, store: object, frozen: Frozen, is_inference: bool, *_: Any) -> None:
        found.extend((copied(graph, frozen), moved(copied(graph, frozen))))
        raise Captured

    compiled = torch.compile(model, backend="layerzero", options={"freeze": True, "race": False}, fullgraph=True)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(backend, "plan_and_apply", stop)
        with pytest.raises(Captured):
            compiled(**inputs)
    return found[0], found[1]


def unwritten(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """A bfloat16 model whose gigabytes of weights are never touched, so that they take no memory."""
    with torch.device("meta"):
        model = make()
    return model.to(torch.bfloat16).to_empty(device="cpu").eval()


def decode(batch: int, length: int) -> tuple[GraphView, GraphView]:
    """One token through two layers of Llama-3-8B's shapes, over a static cache."""
    config = tf.LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=32,
                            num_key_value_heads=8, vocab_size=32000, max_position_embeddings=8192)  # fmt: skip
    cache = tf.StaticCache(config=config, max_cache_len=length)
    cache.early_initialization(batch, 8, 128, torch.bfloat16, torch.device("cpu"))
    position = torch.tensor([length - 2])
    return capture(
        unwritten(lambda: tf.LlamaForCausalLM(config)), input_ids=torch.zeros(batch, 1, dtype=torch.long), past_key_values=cache,
        cache_position=position, position_ids=position[None].expand(batch, 1), use_cache=True,
    )  # fmt: skip


def bert() -> tuple[GraphView, GraphView]:
    """Two layers of BERT-large, 32 padded sequences of 512."""
    config = tf.BertConfig(hidden_size=1024, num_hidden_layers=2, num_attention_heads=16, intermediate_size=4096)
    ids = torch.zeros(32, 512, dtype=torch.long)
    return capture(unwritten(lambda: tf.BertModel(config)), input_ids=ids, attention_mask=torch.ones_like(ids))


def resnet() -> tuple[GraphView, GraphView]:
    """ResNet-50 on 64 images."""
    model = unwritten(lambda: tf.ResNetForImageClassification(tf.ResNetConfig(num_labels=1000)))
    return capture(model, pixel_values=torch.empty(64, 3, 224, 224, dtype=torch.bfloat16))


@pytest.fixture(scope="module")
def h200(tmp_path_factory: pytest.TempPathFactory) -> TimingStore:
    store = TimingStore.open(tmp_path_factory.mktemp("h200"))
    store.merge(TIMINGS)
    return store


def planned(store: TimingStore, view: GraphView, **options: Any) -> Plan:
    chosen = Options.resolve({"freeze": True, "cudagraphs": True, "measure_budget_s": 0.0, **options})
    target = stored_target(store, "NVIDIA H200", chosen.graphs)
    return make_plan(view, chosen, target, store, fingerprint="golden", kind="inference")


def summary(plan: Plan) -> str:
    """Regions by kernel, what they read, where the price is from, and what all instances cost; then the whole plan."""
    known: dict[str, list[int]] = {}
    for choice in plan.choices:
        c = choice.candidate
        if c.kernel != "inductor.loop":
            roles = ", ".join(dict(c.params)["roles"])  # type: ignore[call-overload]
            known.setdefault(f"{c.kernel}({roles}), {choice.cost.source}", []).append(choice.cost.ns)
    lines = [f"{len(ns):2d} {line}: {sum(ns) / 1e3:.0f} us" for line, ns in sorted(known.items())]
    return "\n".join([*lines, f"{len(plan.conversions)} conversions, {plan.status}: {plan.objective / 1e3:.0f} us"])


def assert_applies(view: GraphView, plan: Plan) -> None:
    """The plan's kernels stand in the graph, whose outputs keep their strides and dtypes."""
    before = interface(view.graph)
    changed = [c for c in plan.choices if c.candidate.kernel != "inductor.loop" and not dict(c.candidate.params).get("as_is")]
    assert apply_plan(view, plan.choices) == len(changed) > 0
    verify(view.graph, before)


@needs_triton
def test_decode_of_one_sequence(h200: TimingStore) -> None:
    _, view = decode(1, 4096)
    plan = planned(h200, view)
    assert_expected_inline(
        summary(plan),
        """\
 2 triton.decode_attention(q, k, v, position), measured: 22 us
 5 triton.gemv(x, w), measured: 146 us
 2 triton.gemv_merged(x, w0, w1), measured: 110 us
 2 triton.gemv_merged(x, w0, w1, w2), measured: 29 us
41 conversions, optimal: 311 us""",
    )
    assert planned(h200, view, backends=["aten"]).objective > plan.objective
    assert planned(h200, view, freeze=False).objective > plan.objective
    # The kernels' launches stand in the graph themselves: nothing of ours is called between kernels.
    assert_applies(view, plan)
    launches = [n for n in view.graph.nodes if n.target is torch.ops.higher_order.triton_kernel_wrapper_functional]
    assert len(launches) == 5 + 2 + 2 + 2 * 2
    assert not [n for n in view.graph.nodes if str(n.target).startswith("lz.")]


@needs_triton
def test_decode_of_32_sequences(h200: TimingStore) -> None:
    _, view = decode(32, 4096)
    plan = planned(h200, view)
    assert_expected_inline(
        summary(plan),
        """\
 5 aten.mm(x, w), measured: 170 us
 2 cublas.merged(x, w0, w1), measured: 127 us
 2 cublas.merged(x, w0, w1, w2), measured: 34 us
 2 triton.decode_attention(q, k, v, position), measured: 254 us
37 conversions, optimal: 596 us""",
    )
    assert planned(h200, view, backends=["aten"]).objective > plan.objective


@needs_triton
def test_bert_with_padding(h200: TimingStore) -> None:
    on_cpu, view = bert()
    plan = planned(h200, view)
    assert_expected_inline(
        summary(plan),
        """\
 5 aten.mm(x, w, bias), measured: 460 us
 2 cublas.addmm_activation(x, w, bias), measured: 415 us
 2 cublas.merged(x, w0, w1, w2, b0, b1, b2), measured: 288 us
 2 triton.attention(q, k, v, keys0), measured: 254 us
25 conversions, optimal: 1504 us""",
    )
    aten = planned(h200, view, backends=["aten"])
    assert aten.objective > plan.objective
    assert ("aten.sdpa", "measured") in {(c.candidate.kernel, c.cost.source) for c in aten.choices}  # not a call priced by its bytes
    assert_applies(on_cpu, plan)


@pytest.mark.slow
def test_resnet(h200: TimingStore) -> None:
    on_cpu, view = resnet()
    plan = planned(h200, view)
    assert_expected_inline(
        summary(plan),
        """\
 1 aten.mm(x, w, bias), measured: 7 us
10 cublas.conv1x1(x, w, c0, c1, c2, c3), measured: 194 us
28 cudnn.conv(x, w, c0, c1, c2, c3), measured: 1283 us
15 cudnn.conv(x, w, c0, c1, c2, c3, other), measured: 594 us
7 conversions, optimal: 2140 us""",
    )
    assert planned(h200, view, backends=["aten"]).objective > plan.objective
    assert_applies(on_cpu, plan)


def test_nothing_is_measured_for_a_card_elsewhere(h200: TimingStore, tmp_path: Path) -> None:
    _, view = bert()
    target = stored_target(h200, "NVIDIA H200")
    elsewhere = replace(target, environment={**target.environment, "name": "a card that nobody has"})
    assert not is_here(elsewhere)
    store = TimingStore.open(tmp_path)
    options = Options.resolve({"measure_budget_s": 60.0, "freeze": True})
    plan = make_plan(view, options, elsewhere, store, fingerprint="golden", kind="inference")
    assert {c.cost.source for c in plan.choices} == {"roofline"}
    unmeasured = {r.kernel for c in plan.choices for r in c.rejections if r.code == "not_measured"}
    assert unmeasured >= {"cublas.merged", "cublas.addmm_activation", "cudnn.attention"}
    assert not store.ls().counts


def test_a_target_without_peaks_is_an_error(h200: TimingStore) -> None:
    with pytest.raises(OptionError, match="Did you mean 'NVIDIA H200'"):
        stored_target(h200, "NVIDIA H100")
