"""On a CUDA device (`pytest -m gpu`; parts with -k inference, training, kernels, attention): real models in both 16-bit types by
the lossless rule, which kernels ran, and every attention kernel against float64."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_pool import Pool
from test_canary import _declared, _forget
from test_kernels import Case, leaves, placed_values, prefer, trace
from test_models import MODELS, assert_lossless, build, cast, check_inference, check_training_step, compiled, trained
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

import lz_compiler as lz
from lz_compiler import backends, measure, ops, torch_private, zoo
from lz_compiler.backend import RECORDS
from lz_compiler.backends.base import SelectionContext
from lz_compiler.trust.canary import Verdict, canary
from lz_compiler.types import Candidate, Rejection

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
# Prices by formula and no race: what is tested is that kernels are right where a plan puts them, and none is chosen by its time.
FAST = {"cost_model": "roofline"}

# --- models -----------------------------------------------------------------------------------------------------------------

TIMM: dict[str, dict[str, Any]] = {
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 48)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48), "ls_init_value": 1.0},
    "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 64, "num_heads": 4, "img_size": 64},
    "deit_tiny_distilled_patch16_224": {"depth": 2, "embed_dim": 64, "num_heads": 4, "img_size": 64},
    "swin_tiny_patch4_window7_224": {"depths": (2, 2), "embed_dim": 32, "num_heads": (2, 4), "img_size": 64, "window_size": 4},
    "test_efficientnet": {},
    "regnety_002": {"depth": 6, "wa": 40.0, "wm": 2.0},
    "densenet121": {"growth_rate": 8, "block_config": (2, 2)},
    "mixer_s16_224": {"img_size": 64},
    "levit_128s": {"embed_dim": (32, 48, 64), "depth": (1, 1, 1), "num_heads": (2, 3, 4), "img_size": 64},
    "coatnet_nano_rw_224": {"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64), "stem_width": 16, "img_size": 64},
    "edgenext_xx_small": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)},
}


def timm_model(name: str) -> nn.Module:
    import timm

    torch.manual_seed(0)
    model = trained(timm.create_model(name, pretrained=False, num_classes=10, **TIMM[name]).eval())
    for parameter in model.parameters():
        if not parameter.any():  # heads and ends of residual branches that start at zero would hide what comes before them
            nn.init.normal_(parameter, std=0.1)
    return model


def on_device(name: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    model = build(name) if name in MODELS else timm_model(name)
    inputs = MODELS[name][1](MODELS[name][2]) if name in MODELS else {"x": torch.randn(2, 3, 64, 64)}
    return model.to(DEVICE, dtype), pytree.tree_map_only(Tensor, lambda t: t.to(DEVICE), cast(inputs, dtype))


@HALF
@pytest.mark.parametrize("name", [*MODELS, *TIMM])
def test_inference(name: str, dtype: torch.dtype) -> None:
    model, inputs = on_device(name, dtype)
    check_inference(model, inputs, slack=8, **FAST)


@HALF
@pytest.mark.parametrize("name", [*MODELS, *TIMM])
def test_training_step(name: str, dtype: torch.dtype) -> None:
    model, inputs = on_device(name, dtype)
    check_training_step(model, inputs, slack=8, least=0.01, or_inductor=True, **FAST)


# What the profiler must see of each kernel: an operator of ATen, or a part of a CUDA kernel's name.
SEEN = {
    "aten.mm": "aten::mm|aten::addmm", "aten.bmm": "aten::bmm", "aten.conv": "aten::convolution", "cublas.merged": "aten::mm|aten::addmm",
    "cublas.addmm_activation": "aten::_addmm_activation", "cublas.conv1x1": "aten::mm|aten::addmm|aten::_addmm_activation",
    "cublas.im2col": "aten::mm|aten::addmm|aten::_addmm_activation", "cudnn.attention": "aten::_scaled_dot_product_cudnn_attention",
    "cudnn.conv": "aten::cudnn_convolution|aten::cudnn_convolution_relu|aten::cudnn_convolution_add_relu",
    "aten.flash_attention": "aten::_scaled_dot_product_flash_attention",
    "aten.efficient_attention": "aten::_scaled_dot_product_efficient_attention",
}  # fmt: skip


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "resnet"])
@pytest.mark.parametrize("freeze", [False, True], ids=["plain", "freeze"])
def test_chosen_kernels_ran(name: str, freeze: bool) -> None:
    """The profiler sees each operator at least as often as the plan, on measured prices, chose kernels that call it."""
    model, inputs = on_device(name, torch.bfloat16)
    with torch.no_grad():
        run = compiled(model, freeze=freeze)
        run(**inputs)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            run(**inputs)
            torch.cuda.synchronize()
    chosen = Counter(c.candidate.kernel for p in RECORDS[-1].plans for c in p.choices if c.candidate.region.op != "getitem")
    events = Counter(event.name for event in profiler.events())
    expected: Counter[str] = Counter()
    for kernel, count in chosen.items():
        if kernel in SEEN:
            expected[SEEN[kernel]] += count
    seen = {names: sum(events[n] for n in names.split("|")) for names in expected}
    assert expected, f"no kernel that the profiler could name: {chosen}"
    assert all(seen[names] >= count for names, count in expected.items()), (chosen, seen)


# --- attention --------------------------------------------------------------------------------------------------------------

SIZES = (64, 80, 96, 128, 256)
LENGTHS = ((1, 1), (7, 7), (128, 128), (1000, 1000), (4096, 4096), (1, 4096), (7, 1000))  # (queries, keys)
LAYOUTS = tuple(itertools.product((False, True), (False, True)))  # (grouped heads, heads inside: BSHD)
WINDOW = 5


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def visible_to(q: Tensor, k: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Key numbers, and of each query the last key that it may see."""
    keys = torch.arange(k.shape[2], device=k.device)
    return keys[None, None, None], (torch.arange(q.shape[2], device=q.device) + position)[None, None, :, None]


def padded(q: Tensor, k: Tensor, real: Tensor) -> Tensor:
    return real[:, None, None, :].expand(-1, 1, q.shape[2], -1)


def within_window(q: Tensor, k: Tensor, position: Tensor) -> Tensor:
    key, last = visible_to(q, k, position)
    return (key <= last) & (key > last - WINDOW)


def causal(q: Tensor, k: Tensor, position: Tensor) -> Tensor:
    key, last = visible_to(q, k, position)
    return key <= last


def middle(q: int, k: int, dtype: torch.dtype) -> Tensor:
    """A position from which on a part of the cache is still empty."""
    return torch.tensor((k - q) // 2, device=DEVICE)


def some(q: int, k: int, dtype: torch.dtype) -> Tensor:
    keep = draw(2, 1, q, k) > -0.5
    keep[..., 0] = True
    return keep


def not_padding(q: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(k, device=DEVICE) < torch.tensor([[k], [k // 2 + 1]], device=DEVICE)


# How a model computes its mask in the graph, and the tensor that it computes it from.
MASKS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor] | None, Callable[[int, int, torch.dtype], Tensor] | None]] = {
    "none": (None, None),
    "is_causal": (None, None),
    "causal": (causal, lambda q, k, dtype: torch.zeros((), dtype=torch.long, device=DEVICE)),
    "offset": (causal, middle),
    "window": (within_window, middle),
    "padding": (padded, not_padding),
    "boolean": (lambda q, k, mask: mask, some),
    "additive": (lambda q, k, mask: mask, lambda q, k, dtype: draw(2, 1, q, k, dtype=dtype)),
    "heads_inside": (lambda q, k, mask: mask, lambda q, k, dtype: draw(q, k, 4, dtype=dtype).permute(2, 0, 1)[None]),  # T5's bias
}


def attention_case(kind: str, queries: int, keys: int, size: int, grouped: bool, inside: bool, dtype: torch.dtype) -> Case:
    """Four heads on two batches, as a model writes it: mask computed in the graph, grouped heads repeated."""
    make, source = MASKS[kind]

    def operand(heads: int, length: int, seed: int) -> Tensor:
        x = draw(2 + seed, length, heads, size, dtype=dtype)[:2] if inside else draw(2 + seed, heads, length, size, dtype=dtype)[:2]
        return x.transpose(1, 2) if inside else x

    def fn(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        mask = make(q, k, rest[0]) if make else None
        if grouped:
            k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(x.shape[0], 4, *x.shape[2:]) for x in (k, v))
        return ops.sdpa(q, k, v, mask, kind == "is_causal", None, False)

    heads = 2 if grouped else 4
    args = (operand(4, queries, 0), operand(heads, keys, 1), operand(heads, keys, 2))
    args += (source(queries, keys, dtype),) if source else ()
    return Case(f"{kind} {queries}x{keys} {size} {grouped=} {inside=} {dtype}", fn, args)


def sweep(kind: str, size: int) -> list[Case]:
    """All lengths; heads, layouts and dtypes in turn, so that every pair of them meets every length, size or mask."""
    turn = list(MASKS).index(kind) + SIZES.index(size)
    dtypes = (torch.bfloat16, torch.float16)
    return [
        attention_case(kind, *length, size, *LAYOUTS[(i + turn) % 4], dtypes[(i + turn // 4) % 2])
        for i, length in enumerate(LENGTHS)
    ]  # fmt: skip


def offered(ctx: SelectionContext) -> list[Candidate]:
    """One candidate of each kernel: variants that differ in tuning alone cost a compilation each."""
    found: dict[str, Candidate] = {}
    for answer in backends.answers(ctx):
        if not isinstance(answer, Rejection):
            found.setdefault(answer.kernel, answer)
    return list(found.values())


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", MASKS)
def test_attention_kernels(kind: str, size: int) -> None:
    for case in sweep(kind, size):
        traced = trace(case)
        exact = case.fn(*(a.double() if a.is_floating_point() else a for a in case.args))
        theirs = float((case.fn(*case.args).double() - exact).abs().max())
        regions = [ctx for ctx in traced.contexts if ctx.region.op == "attention"]
        assert regions
        for ctx in regions:
            read, _ = placed_values(ctx, traced.values)
            allowed = 2 * theirs + measure.rounding(ctx) * float(exact.abs().max())
            for candidate in offered(ctx):
                with torch_private.real_tensors():
                    (y,) = leaves(measure.Bound(candidate, ctx).on(measure.Inputs(read))())
                error = float((y.double().reshape(exact.shape) - exact).abs().max())
                assert error <= allowed, f"{candidate.kernel}, {case}, reads {ctx.roles}: error {error:.3g}, allowed {allowed:.3g}"


@torch.no_grad()
def test_every_attention_kernel_is_swept() -> None:
    cases = [attention_case(kind, *length, 64, False, False, torch.bfloat16) for kind in MASKS for length in ((7, 7), (1, 128))]
    found = {c.kernel for case in cases for ctx in trace(case).contexts if ctx.region.op == "attention" for c in offered(ctx)}
    known = {name for library in backends.all_backends().values() for name in library.kernels if "attention" in name or "sdpa" in name}
    known = {name for name in known if "paged" not in name}
    absent = {name for library in backends.all_backends().values() if library.missing() for name in library.kernels}
    elsewhere = {"aten.flash_attention_cpu", "attention.brgemm", "inductor.attention", "flex.attention"}  # a CPU, float32, another mode
    assert known - absent - elsewhere <= found | {"xformers.attention"}  # which may be installed without its CUDA kernels


def test_attention_masks_are_understood() -> None:
    """No kernel has to read a mask that was computed from positions and lengths."""
    for kind, (make, _) in MASKS.items():
        contexts = trace(attention_case(kind, 7, 128, 64, False, False, torch.bfloat16)).contexts
        masked = ["mask" in ctx.roles for ctx in contexts if ctx.region.op == "attention"]
        assert all(masked) == (kind in ("boolean", "additive", "heads_inside")), kind
        assert make is not None or not any(masked), kind


@torch.no_grad()
@pytest.mark.parametrize("length", [(128, 128), (1, 4096)], ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_attention_compiled(kind: str, length: tuple[int, int]) -> None:
    """The whole way, on measured prices: keys and values grouped, heads inside, the output laid out for the next product."""
    case = attention_case(kind, *length, 64, True, True, torch.bfloat16)
    make, _ = MASKS[kind]

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        mask = make(q, k, rest[0]) if make else None
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=kind == "is_causal")
        return y.transpose(1, 2).flatten(2)

    exact = attend(*(a.double() if a.is_floating_point() else a for a in case.args))
    options = {"race": False, "measure_budget_s": 5.0}
    ours = torch.compile(attend, backend="layerzero", options=options)(*case.args)
    # TorchInductor itself lays out a dimension of size 1 as it likes.
    assert_lossless([ours], [attend(*case.args)], [exact], slack=4, strides=length[0] > 1)
    assert math.isfinite(float(exact.abs().max()))
    assert [c for p in RECORDS[-1].plans for c in p.choices if c.candidate.region.op == "attention"]


def paged_case(layout: str, queries: int, size: int, page_size: int, dtype: torch.dtype) -> Case:
    pool = Pool(2, size, page_size, layout, dtype, max_pages=20)
    args = (draw(len(pool.lengths), 8, queries, size, dtype=dtype), *(t.to(DEVICE) for t in pool.tensors()))
    return Case(f"paged {layout} {queries} {size} {dtype}", lambda *t: torch.ops.lz.paged_attention(*t, layout=layout), args)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(("queries", "size", "page_size"), [(1, 64, 16), (3, 80, 7), (1, 128, 16), (8, 128, 128), (1, 256, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_paged_attention(
    layout: str, queries: int, size: int, page_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Both kernels by the lossless rule on awkward lengths, and the Triton kernel placed in a compiled graph."""
    case = paged_case(layout, queries, size, page_size, dtype)
    exact = case.fn(*(a.double() if a.is_floating_point() else a for a in case.args))
    traced = trace(case)
    (ctx,) = traced.contexts
    read, (eager,) = placed_values(ctx, traced.values)
    allowed = 2 * float((eager.double() - exact).abs().max()) + measure.rounding(ctx) * float(exact.abs().max())
    candidates = offered(ctx)
    assert {c.kernel for c in candidates} >= {"aten.paged_attention", "triton.paged_attention"}
    for candidate in candidates:
        with torch_private.real_tensors():
            y = measure.Bound(candidate, ctx).on(measure.Inputs(read))()
        assert float((y.double() - exact).abs().max()) <= allowed, candidate.kernel
    prefer(monkeypatch, "triton.paged_attention")
    run = torch.compile(case.fn, backend="layerzero", options={"race": False, "cost_model": "roofline"})
    for _ in range(2):
        y = run(*case.args)
        assert float((y.double() - exact).abs().max()) <= allowed
        assert y.stride() == eager.stride()
    chosen = [c.candidate.kernel for p in RECORDS[-1].plans for c in p.choices if c.candidate.region.op == "paged_attention"]
    assert chosen == ["triton.paged_attention"]


def test_attention_kernels_are_compiled() -> None:
    assert not os.environ.get("TRITON_INTERPRET"), "Triton runs as an interpreter in this process"


# --- baked files ------------------------------------------------------------------------------------------------------------

BAKED = """
import sys
for name in ("lz_compiler", "networkx", "ortools"):
    sys.modules[name] = None
import torch, _layerzero_plan as p
# With CUDA graphs the three calls are run, captured, replayed.
torch.save([p.forward(x.cuda()).cpu() for x in torch.load("inputs.pt") for _ in range(3)], "outputs.pt")
print("torch._inductor" in sys.modules)
"""


@pytest.mark.parametrize("cudagraphs", [False, True])
def test_baked_triton_kernels_need_no_inductor(cudagraphs: bool, tmp_path: Path) -> None:
    """Bit for bit as `lz.compile` with the plan, from cubins alone; without a cubin its kernel's source is compiled."""
    model, given, _ = zoo.llama(length=64)
    model = model.eval().to(DEVICE, torch.bfloat16)
    args = (given[0].to(DEVICE),)
    dynamic: Any = {"input_ids": {1: "seq"}}
    own: Any = {**FAST, "policy": {"deny": [{"backend": name} for name in ("flashinfer", "liger", "xformers")]}}  # they need what they need
    plan = lz.solve(model, args, buckets={"seq": [1, 64]}, dynamic=dynamic, freeze=True, race=False, cudagraphs=cudagraphs, **own)
    folder = lz.bake(plan, tmp_path / "baked", model, args).parent
    cubins = sorted((folder / "kernels").glob("*.cubin"))
    text = (folder / "_layerzero_plan.py").read_text()
    assert len(cubins) == text.count("@_cubin(") > 5
    assert " = _compiled(" not in text
    inputs = [torch.randint(8000, (1, n)) for n in (1, 2, 37, 64)]
    torch.save(inputs, tmp_path / "inputs.pt")
    with torch.no_grad():
        run = lz.compile(model, plan=plan)
        expected = [run(x.to(DEVICE)).cpu() for x in inputs]
    for asks_inductor in (False, True):
        command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r}){BAKED}"]
        told = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        assert told.strip() == str(asks_inductor)
        found = torch.load(tmp_path / "outputs.pt")
        assert all(torch.equal(x, expected[i // 3]) for i, x in enumerate(found))
        cubins[0].unlink(missing_ok=True)


def test_a_baked_file_calls_a_library_that_was_chosen(tmp_path: Path) -> None:
    """Bit for bit as `lz.compile` with the plan; the package is the only thing that the process must have."""
    pytest.importorskip("flashinfer", reason="pip install 'lz-compiler[flashinfer]'")
    model, given, _ = zoo.llama(length=64)
    model, args = model.eval().to(DEVICE, torch.bfloat16), (given[0].to(DEVICE),)
    policy: Any = {"prefer": [{"kernel": "flashinfer.single", "factor": 0.001}]}
    plan = lz.solve(model, args, race=False, **{**FAST, "policy": policy})
    folder = lz.bake(plan, tmp_path / "baked", model, args).parent
    text = (folder / "_layerzero_plan.py").read_text()
    assert "= _flashinfer_single(" in text
    assert "torch.ops.lz." not in text
    x = torch.randint(8000, (1, 64))
    torch.save([x], tmp_path / "inputs.pt")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r}){BAKED}"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    with torch.no_grad():
        expected = lz.compile(model, plan=plan)(x.to(DEVICE)).cpu()
    assert all(torch.equal(y, expected) for y in torch.load(tmp_path / "outputs.pt"))


# --- a kernel that ends CUDA in its process -------------------------------------------------------------------------------------

FAULTY = """
import sys, torch
import lz_compiler as lz
from lz_compiler import backends
sys.path.insert(0, sys.argv[1])
import acme
from lz_compiler.backends.base import Kernel

def run(emit, t, p):
    outside = torch.full((1,), 1 << 20, device="cuda")
    return torch.ops.aten.index_select.default(t["x"], 1, outside).expand(-1, t["w"].shape[0])

class Faulty(acme.Acme):
    name, devices = "faulty", ("cuda",)
    kernels = {"acme.linear": Kernel("acme.linear", run)}

backends.register(Faulty())
with torch.no_grad():
    compiled = torch.compile(torch.nn.Linear(64, 64).cuda(), backend="layerzero", options={"race": False})
    compiled(torch.randn(32, 64, device="cuda"))
print(lz.explain(compiled))
"""


def test_a_kernel_that_breaks_the_device_is_named_and_not_tried_again(tmp_path: Path) -> None:
    env = os.environ | {"LAYERZERO_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", FAULTY, str(Path(__file__).parent)]
    first, second = (subprocess.run(command, env=env, capture_output=True, text=True, timeout=300) for _ in range(2))
    assert first.returncode != 0
    assert "the kernel acme.linear (linear of x (32, 64), w (64, 64)" in first.stderr
    assert "left the CUDA device unusable" in first.stderr
    assert second.returncode == 0, second.stderr[-3000:]
    assert "acme.linear" in second.stdout
    assert "device-side assert" in second.stdout


# --- kernels that are not safe in a CUDA graph, and one that writes where there is no memory ------------------------------------

UNSAFE = """
import ctypes
import torch, triton
from triton import language as tl
from lz_compiler.backends.base import Kernel
from lz_compiler.trust.capabilities import fitting

def product(t):
    return torch.nn.functional.linear(t["x"], t["w"], t["bias"])

def at_one_shape(fault):
    return lambda emit, t, p: fault(product(t)) if tuple(t["x"].shape) == (8, 128) and t["x"].is_contiguous() else product(t)

def synchronises(y):
    torch.cuda.synchronize()
    return y

def by_cuda_malloc(y):
    with open("/proc/self/maps") as file:
        runtime = ctypes.CDLL(next(line.split()[-1] for line in file if "libcudart" in line))
    pointer = ctypes.c_void_p()
    runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(1 << 20))  # leaked: cudaFree would be found as well
    return y

kept = {}

def on_another_stream(y):
    if not kept:  # what stays keeps the segment of that stream, so that nothing new is asked of CUDA while capturing
        kept["stream"] = torch.cuda.Stream()
        with torch.cuda.stream(kept["stream"]):
            kept["block"] = torch.empty(1, device="cuda")
    with torch.cuda.stream(kept["stream"]):
        scratch = torch.empty_like(y)
    scratch.copy_(y)
    return y.copy_(scratch)

@triton.jit
def write_far_away(pointer):
    tl.store(pointer + (1 << 40), 1.0)

def illegal(y):
    write_far_away[(1,)](y)
    return y

class Unsafe:
    name, devices = "unsafe", ("cuda",)
    kernels = {k.name: k for k in (
        Kernel("unsafe.good", lambda emit, t, p: product(t)),
        Kernel("unsafe.sync", at_one_shape(synchronises)),
        Kernel("unsafe.malloc", at_one_shape(by_cuda_malloc)),
        Kernel("unsafe.stream", at_one_shape(on_another_stream)),
        Kernel("unsafe.illegal", at_one_shape(illegal)),
    )}
    def version(self): return "1"
    def missing(self): return None
    def candidates(self, ctx):
        fit, refused = fitting(self, ctx)
        yield from refused
        for name in fit:
            yield ctx.candidate(self.kernels[name])
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Verdict]]:
    """What the canary says of each kernel on dense input, by its name."""
    site = tmp_path_factory.mktemp("site")
    kernels = ("good", "sync", "malloc", "stream", "illegal")
    entry = _declared(devices=["cuda"], cuda_graph_safe=True)
    (site / "unsafe").mkdir()
    (site / "unsafe" / "__init__.py").write_text(UNSAFE)
    (site / "unsafe" / "unsafe.json").write_text(
        json.dumps({"schema": 1, "backend": "unsafe", "kernels": {f"unsafe.{k}": entry for k in kernels}})
    )
    (site / "unsafe-1.dist-info").mkdir()
    (site / "unsafe-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: unsafe\nVersion: 1\n")
    (site / "unsafe-1.dist-info" / "entry_points.txt").write_text("[lz_compiler.backends]\nunsafe = unsafe:Unsafe\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        _forget()
        (run,) = canary(["unsafe"], cache_dir=str(tmp_path_factory.mktemp("cache"))).runs
    _forget()
    assert not run.incomplete
    yield {name.partition("|")[0]: v for name, v in run.capabilities.items() if name.endswith("|linear|float32|contiguous|bias+frozen")}
    others = {name: v for name, v in run.capabilities.items() if "|contiguous|" not in name}
    assert {v.status for v in others.values()} == {"passed"}


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        ("sync", "cuda_graph: cannot be captured"),
        ("malloc", "cuda_graph: cannot be captured"),
        ("stream", r"cuda_graph: \d+ bytes are allocated outside the graph's pool"),
        ("illegal", r"\w+Error: CUDA error: an illegal memory access"),
    ],
)
def test_what_is_not_safe_in_a_cuda_graph_costs_one_row(kernel: str, says: str, found: dict[str, Verdict]) -> None:
    verdict = found[f"unsafe.{kernel}"]
    assert (verdict.status, verdict.shape) == ("failed", "8x128x64"), verdict
    assert re.match(says, verdict.detail), verdict
    good = found["unsafe.good"]
    assert good.status == "passed"
    assert verdict.tried == good.tried > 1  # the rows before and behind it were tried


# --- profiles ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cudagraphs", [False, True])
def test_a_profile_gives_each_region_its_kernels_time(cudagraphs: bool) -> None:
    model, (ids,), _ = zoo.llama(zoo.LlamaConfig(hidden=1024, layers=2, intermediate=2816), 1, 512)
    model, ids = model.to(DEVICE, torch.bfloat16), ids.to(DEVICE)
    with torch.no_grad():
        run = lz.compile(model, race=False, freeze=True, cudagraphs=cudagraphs, **FAST)
        before = [run(ids).clone() for _ in range(3)][-1]
        (graph,) = lz.explain(run, profile=lambda: run(ids)).data["graphs"]
        torch.testing.assert_close(run(ids), before)  # the graph is replayed as before
    (plan,) = graph["plans"]
    timed = {f"{r['op']}: {r['kernel']}": r["profiled_ns"] for r in plan["regions"]}
    assert timed
    assert all(timed.values()), timed
    profiled = graph["profiled"]
    assert profiled["kernels_ns"] == pytest.approx(sum(r["profiled_ns"] * r["count"] for r in plan["regions"]), rel=0.01)
    assert 0 < profiled["kernels_ns"] <= profiled["call_ns"]


# --- what surrounds a race ----------------------------------------------------------------------------------------------


def test_a_graph_can_be_captured_while_its_race_is_on(tmp_path: Path) -> None:
    """Nothing is timed in a capture: what is captured is the leader."""
    model, x = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).cuda().eval(), torch.randn(8, 64, device="cuda")
    run = torch.compile(model, backend="layerzero", options={"cache_dir": str(tmp_path)})
    with torch.no_grad():
        for _ in range(3):
            run(x)
        assert not RECORDS[-1].decided
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y, model(x))
