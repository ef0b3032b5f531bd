"""Real model definitions with random weights: outputs and gradients by the lossless rule, and which kernels ran."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

from lz_compiler.backend import RECORDS

TEXT = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 128}
DECODER = {**TEXT, "intermediate_size": 96, "num_key_value_heads": 2, "use_cache": False}
ONE = {**DECODER, "num_hidden_layers": 1}  # what repeats in two layers, BERT, GPT-2, Llama and ViT show
IMAGE = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 128, shape, generator=torch.Generator().manual_seed(sum(shape)))


def image(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def text(length: int) -> dict[str, Any]:
    return {"input_ids": ids(2, length)}


def padded(length: int) -> dict[str, Any]:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, length // 2 :] = 0
    return {"input_ids": ids(2, length), "attention_mask": mask}


def pair(length: int) -> dict[str, Any]:
    return {"input_ids": ids(2, length), "decoder_input_ids": ids(2, 5)}


def pixels(size: int) -> dict[str, Any]:
    return {"pixel_values": image(size)}


def sound(_: int) -> dict[str, Any]:
    return {"input_features": torch.randn(2, 20, 40), "decoder_input_ids": ids(2, 5)}


def both(_: int) -> dict[str, Any]:
    return {"input_ids": ids(2, 9), "pixel_values": image()}


GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 128, "use_cache": False}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, "vocab_size": 128, "use_cache": False}
WHISPER = {
    "vocab_size": 128, "num_mel_bins": 20, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 96,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "max_source_positions": 20,
    "max_target_positions": 16, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
CLIP = {
    "text_config": {**TEXT, "num_hidden_layers": 1, "intermediate_size": 96, "eos_token_id": 2},
    "vision_config": {**IMAGE, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}, "projection_dim": 32,
}  # fmt: skip

Build = Callable[[], nn.Module]
MODELS: dict[str, tuple[Build, Callable[[int], dict[str, Any]], int, int]] = {
    "bert": (lambda: hf.BertModel(hf.BertConfig(**TEXT, intermediate_size=96)), padded, 12, 19),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), text, 12, 19),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), text, 12, 19),
    "qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**ONE, head_dim=16)), text, 12, 19),
    "mistral": (lambda: hf.MistralForCausalLM(hf.MistralConfig(**ONE, sliding_window=4)), text, 12, 19),
    "mixtral": (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**ONE, num_local_experts=4)), text, 12, 19),
    "t5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), pair, 12, 19),
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**IMAGE, image_size=32, patch_size=8)), pixels, 32, 0),
    "resnet": (lambda: hf.ResNetModel(hf.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1])), pixels, 64, 48),
    "convnext": (lambda: hf.ConvNextModel(hf.ConvNextConfig(num_stages=2, hidden_sizes=[16, 32], depths=[1, 1])), pixels, 64, 48),
    "whisper": (lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)), sound, 0, 0),
    "clip": (lambda: hf.CLIPModel(hf.CLIPConfig(**CLIP)), both, 0, 0),
}  # fmt: skip


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return trained(MODELS[name][0]().eval())


def trained(model: nn.Module) -> nn.Module:
    """With batch norms as after training: folding them must change the weights."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    return model


def in_float64(model: nn.Module) -> nn.Module:
    double = copy.deepcopy(model).double()
    if hasattr(double, "set_experts_implementation"):
        double.set_experts_implementation("eager")  # torch's grouped product has no float64
    return double


def compiled(model: nn.Module, **options: Any) -> Any:
    dynamic = options.pop("dynamic", None)
    return torch.compile(model, backend="layerzero", dynamic=dynamic, options={"race": False, "measure_budget_s": 5.0, **options})


def tensors(output: Any) -> list[Tensor]:
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()]


def cast(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def assert_lossless(
    ours: list[Tensor], eager: list[Tensor], exact: list[Tensor], slack: float = 32, strides: bool = True, least: float = 0.0,
    inductors: Sequence[Tensor] = (),
) -> None:  # fmt: skip
    """Error against float64 at most twice eager's own (or Inductor's, if given and larger), plus a few ulps of the output's scale
    (which counts as `least` or more)."""
    assert len(ours) == len(eager) == len(exact)
    for y, e, x, i in zip(ours, eager, exact, inductors or eager, strict=True):
        assert y.shape == e.shape
        assert y.dtype == e.dtype
        assert y.stride() == e.stride() or not strides
        own, theirs, compiled = ((t.double() - x).abs().max().item() for t in (y, e, i))
        theirs = max(theirs, compiled)
        allowed = 2 * theirs + slack * torch.finfo(y.dtype).eps * max(x.abs().max().item(), least)
        assert own <= allowed, f"error {own:.3g}, eager's {theirs:.3g}, allowed {allowed:.3g}"


def check_inference(model: nn.Module, inputs: dict[str, Any], slack: float = 32, **options: Any) -> None:
    with torch.no_grad():
        exact = tensors(in_float64(model)(**cast(inputs, torch.float64)))
        eager, ours = tensors(model(**inputs)), tensors(compiled(model, **options)(**inputs))
    assert_lossless(ours, eager, exact, slack)
    counters = torch._dynamo.utils.counters["layerzero"]
    assert counters["graphs"] >= 1
    assert counters["kernels"] + sum(len(r.plans) for r in RECORDS[-counters["graphs"] :]) > 0


def check_training_step(
    model: nn.Module, inputs: dict[str, Any], slack: float, least: float = 0.0, or_inductor: bool = False, **options: Any
) -> None:
    """Gradients of all parameters after one backward pass, and parameters after one optimizer step: as near to float64 as
    eager's, or (`or_inductor`) as those of Inductor alone, whose normalisations round otherwise in 16 bits.

    The model is in eval mode: no dropout, so that the three runs compute the same function. A gradient below `least` of the
    largest one counts as noise: some are 0 but for rounding (of a bias before a softmax, say).
    """

    def step(model: nn.Module, run: Any, inputs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        outputs = tensors(run(**inputs))
        sum(o.pow(2).mean() for o in outputs).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        return [p.grad for p in model.parameters() if p.grad is not None], list(model.parameters())

    other, double = copy.deepcopy(model), in_float64(model)
    exact, exact_after = step(double, double, cast(inputs, torch.float64))
    third = copy.deepcopy(model)
    inductors, inductors_after = step(third, torch.compile(third), inputs) if or_inductor else ((), ())
    eager, eager_after = step(model, model, inputs)
    ours, ours_after = step(other, compiled(other, **options), inputs)
    scale = least * max(float(x.abs().max()) for x in exact)
    # Autograd lets a gradient have any dense strides.
    assert_lossless(ours, eager, exact, slack, strides=False, least=scale, inductors=inductors)
    assert_lossless(ours_after, eager_after, exact_after, slack, least=scale, inductors=inductors_after)


def some(names: Iterable[str], usual: Sequence[str]) -> list[Any]:
    """Parameters of a test: those that are not among the usual ones are slow."""
    return [pytest.param(name, marks=() if name in usual else pytest.mark.slow) for name in names]


USUAL = ("bert", "gpt2", "llama", "resnet")


def combinations() -> Iterator[Any]:
    """Each model with plain and with frozen weights; bfloat16 with both at once for three models only: the other paths are the same.
    Usual are four models, with the weights' precision that differs most."""
    plain, plain16, frozen, frozen16 = ((w, d) for w in ("plain", "freeze") for d in ("float32", "bfloat16"))
    for name in MODELS:
        narrow = name in ("bert", "llama", "resnet")
        usual = [plain, frozen16 if narrow else frozen] if name in USUAL else []
        for how in (plain, plain16, frozen, *([frozen16] if narrow else [])):
            yield pytest.param(name, *how, marks=() if how in usual else pytest.mark.slow)


@pytest.mark.parametrize(("name", "weights", "precision"), list(combinations()))
def test_inference(name: str, weights: str, precision: str) -> None:
    dtype, freeze = getattr(torch, precision), weights == "freeze"
    model = build(name).to(dtype)
    inputs = cast(MODELS[name][1](MODELS[name][2]), dtype)
    check_inference(model, inputs, freeze=freeze)


@pytest.mark.parametrize("name", some(MODELS, ("bert",)))
def test_training_step(name: str) -> None:
    check_training_step(build(name), MODELS[name][1](MODELS[name][2]), slack=256, least=1e-2)


@pytest.mark.parametrize("name", some((n for n, m in MODELS.items() if m[3]), ("bert",)))
def test_second_size_under_dynamic_shapes(name: str) -> None:
    model = build(name)
    run = compiled(model, dynamic=True)
    with torch.no_grad():
        for size in MODELS[name][2:4]:
            inputs = MODELS[name][1](size)
            exact = tensors(in_float64(model)(**cast(inputs, torch.float64)))
            assert_lossless(tensors(run(**inputs)), tensors(model(**inputs)), exact)


# The vendor's operator that each kernel must be seen to call, where it is one of its own
# (aten.sdpa leaves the choice to ATen's rule, and aten.sdpa_math is a Python operator around it).
VENDOR = {
    "onednn.linear": "mkldnn::_linear_pointwise", "onednn.linear_packed": "mkldnn::_linear_pointwise",
    "onednn.merged_linear_packed": "mkldnn::_linear_pointwise", "onednn.conv": "mkldnn::_convolution_pointwise",
    "onednn.conv_packed": "mkldnn::_convolution_pointwise", "onednn.conv1x1": "mkldnn::_linear_pointwise",
    "mkl.linear_packed": "mkl::_mkl_linear", "attention.brgemm": "lz::attention_brgemm",
    "aten.conv": "aten::convolution", "aten.flash_attention_cpu": "aten::_scaled_dot_product_flash_attention_for_cpu",
}  # fmt: skip


CHOSEN = [f"{weights}-{name}" for weights in ("plain", "freeze") for name in ("bert", "gpt2", "llama", "vit", "resnet")]


@pytest.mark.parametrize("name", some(CHOSEN, ("plain-bert", "plain-resnet", "freeze-gpt2", "freeze-llama", "freeze-resnet")))
def test_the_chosen_kernels_ran(name: str) -> None:
    """The profiler sees each vendor operator exactly as often as the plan chose its kernels."""
    weights, _, name = name.partition("-")
    freeze = weights == "freeze"
    model, inputs = build(name), MODELS[name][1](MODELS[name][2])
    with torch.no_grad():
        run = compiled(model, freeze=freeze)
        run(**inputs)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            run(**inputs)
    record = RECORDS[-1]
    chosen = Counter(c.candidate.kernel for p in record.plans for c in p.choices if c.candidate.region.op != "getitem")
    seen = Counter(event.name for event in profiler.events())
    expected: Counter[str] = Counter()
    for kernel, count in chosen.items():
        if kernel in VENDOR:
            expected[VENDOR[kernel]] += count
    assert expected or chosen["aten.mm"], f"no library kernel in the plan: {chosen}"
    # An attention that stays ATen's calls the flash kernel by itself.
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    if flash in expected:
        expected[flash] += min(chosen["aten.sdpa"], seen[flash] - expected[flash])
    assert {op: seen[op] for op in expected} == dict(expected)
    assert seen["aten::mm"] + seen["aten::addmm"] == chosen["aten.mm"]
