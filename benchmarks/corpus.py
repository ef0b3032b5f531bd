"""Collect the corpora: problems and timings of many models, as files that `lz ablate` reads without a model or a device.

    python benchmarks/corpus.py --out benchmarks/corpora/cpu [--cases 'bert*'] [--seconds 1500] [--cache-dir DIR]
    python benchmarks/corpus.py --out benchmarks/corpora/h200 --device cuda
    python benchmarks/corpus.py --out benchmarks/corpora/h200 --timings tests/data/h200_timings.jsonl

Every case is planned once with everything measured, and then every kernel is measured a second time, independently: the
difference is the noise floor. A case that is there already is left alone, so that a stopped run goes on. With `--timings`, the
problems of the device whose timings these are, traced on a CPU, with nothing measured.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, fx, nn

from lz_compiler import backend, measure
from lz_compiler.capture import GraphView
from lz_compiler.cost_models.measured import Measured
from lz_compiler.cost_models.roofline import Roofline
from lz_compiler.options import Options
from lz_compiler.planning import DILUTION
from lz_compiler.problem import add_defaults, build, enumerate_regions
from lz_compiler.research import corpus
from lz_compiler.research.corpus import Case, Sample
from lz_compiler.target import detect, stored_target
from lz_compiler.timings import TimingStore
from lz_compiler.types import Target

Inputs = dict[str, Any]
Make = Callable[[], tuple[nn.Module, Inputs]]

FREE = {"freeze": True, "error_budget": 5e-2}
WIDE = {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 4, "vocab_size": 8000}
SMALL = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 4, "vocab_size": 4000}
IMAGE = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 4, "intermediate_size": 1536}


def text(model: type[nn.Module], config: Any, batch: int, length: int, **more: Any) -> Make:
    def make() -> tuple[nn.Module, Inputs]:
        return model(config).eval(), {"input_ids": torch.randint(config.vocab_size, (batch, length)), **more}

    return make


def padded(model: type[nn.Module], config: Any, batch: int, length: int) -> Make:
    lengths = torch.linspace(length, length // 4, batch).long()
    return text(model, config, batch, length, attention_mask=(torch.arange(length) < lengths[:, None]).long())


def pair(model: type[nn.Module], config: Any, batch: int, length: int, reply: int) -> Make:
    return text(model, config, batch, length, decoder_input_ids=torch.randint(config.vocab_size, (batch, reply)))


def image(model: type[nn.Module], config: Any, batch: int, size: int) -> Make:
    return lambda: (model(config).eval(), {"pixel_values": torch.randn(batch, 3, size, size)})


def decoder(config: type[Any], **more: Any) -> Any:
    return config(**{**WIDE, "intermediate_size": 1536, "num_key_value_heads": 4, "use_cache": False, **more})


def mlp(width: int, rows: int) -> Make:
    def make() -> tuple[nn.Module, Inputs]:
        layers = [layer for _ in range(6) for layer in (nn.Linear(width, width), nn.GELU())]
        return nn.Sequential(*layers), {"input": torch.randn(rows, width)}

    return make


def whisper(width: int = 384, heads: int = 6, positions: int = 200, batch: int = 1, layers: int = 4) -> tuple[nn.Module, Inputs]:
    """Of the least spectrogram that fills all `positions`."""
    config = hf.WhisperConfig(
        vocab_size=4000, num_mel_bins=80, d_model=width, encoder_layers=layers, decoder_layers=layers, encoder_ffn_dim=4 * width,
        encoder_attention_heads=heads, decoder_attention_heads=heads, decoder_ffn_dim=4 * width, max_source_positions=positions,
        use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    inputs = {"input_features": torch.randn(batch, 80, 2 * positions), "decoder_input_ids": torch.randint(4000, (batch, 24))}
    return hf.WhisperForConditionalGeneration(config).eval(), inputs


def clip(words: Inputs, pixels: Inputs, batch: int, length: int = 16, patch: int = 32) -> tuple[nn.Module, Inputs]:
    """A batch of captions for each image."""
    config = hf.CLIPConfig(
        text_config={**words, "eos_token_id": 2}, vision_config={**pixels, "image_size": 224, "patch_size": patch}, projection_dim=128
    )
    ids = torch.randint(words["vocab_size"], (4 * batch, length))
    return hf.CLIPModel(config).eval(), {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 224, 224)}


BERT = hf.BertConfig(**WIDE, intermediate_size=2048)
LLAMA = decoder(hf.LlamaConfig)
GPT2 = hf.GPT2Config(n_embd=384, n_head=6, n_layer=4, vocab_size=8000, use_cache=False)
T5 = hf.T5Config(d_model=256, d_kv=32, d_ff=1024, num_layers=4, num_heads=8, vocab_size=4000, use_cache=False)
BART = hf.BartConfig(
    d_model=256, encoder_layers=4, decoder_layers=4, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=1024,
    decoder_ffn_dim=1024, vocab_size=4000, use_cache=False,
)  # fmt: skip
SWIN = hf.SwinConfig(embed_dim=48, depths=[2, 2, 2, 2], num_heads=[2, 4, 8, 16])

# family, options, and what makes the model with its inputs
CPU: dict[str, tuple[str, Mapping[str, Any], Make]] = {
    "bert_4x128": ("bert", FREE, padded(hf.BertModel, BERT, 4, 128)),
    "bert_1x32": ("bert", FREE, padded(hf.BertModel, BERT, 1, 32)),
    "bert_8x64_plain": ("bert", {}, padded(hf.BertModel, BERT, 8, 64)),
    "llama_1x256": ("llama", FREE, text(hf.LlamaForCausalLM, LLAMA, 1, 256)),
    "llama_4x32": ("llama", FREE, text(hf.LlamaForCausalLM, LLAMA, 4, 32)),
    "llama_1x1": ("llama", FREE, text(hf.LlamaForCausalLM, LLAMA, 1, 1)),
    "llama_1x128_plain": ("llama", {}, text(hf.LlamaForCausalLM, LLAMA, 1, 128)),
    "resnet50_1x224": ("resnet", FREE, image(hf.ResNetModel, hf.ResNetConfig(), 1, 224)),
    "resnet18_4x96": ("resnet", FREE, image(
        hf.ResNetModel, hf.ResNetConfig(layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2]), 4, 96)),
    "vit_1x224": ("vit", FREE, image(hf.ViTModel, hf.ViTConfig(**IMAGE), 1, 224)),
    "vit_4x224_plain": ("vit", {}, image(hf.ViTModel, hf.ViTConfig(**IMAGE), 4, 224)),
    "gpt2_1x128": ("gpt2", FREE, text(hf.GPT2LMHeadModel, GPT2, 1, 128)),
    "gpt2_8x16": ("gpt2", FREE, text(hf.GPT2LMHeadModel, GPT2, 8, 16)),
    "convnext_1x224": ("convnext", FREE, image(hf.ConvNextModel, hf.ConvNextConfig(), 1, 224)),
    "t5_2x48": ("t5", FREE, pair(hf.T5ForConditionalGeneration, T5, 2, 48, 12)),
    "qwen3_1x96": ("qwen3", FREE, text(hf.Qwen3ForCausalLM, decoder(hf.Qwen3Config, head_dim=64), 1, 96)),
    "mistral_1x160": ("mistral", FREE, text(hf.MistralForCausalLM, decoder(hf.MistralConfig, sliding_window=64), 1, 160)),
    "mixtral_1x24": ("mixtral", FREE, text(hf.MixtralForCausalLM, decoder(hf.MixtralConfig, num_local_experts=4), 1, 24)),
    "whisper_1x400": ("whisper", FREE, whisper),
    "clip_4x16": ("clip", FREE, lambda: clip({**SMALL, "intermediate_size": 1024}, IMAGE, 1)),
    "mlp_512x8": ("mlp", FREE, mlp(512, 8)),
    "mlp_256x2": ("mlp", FREE, mlp(256, 2)),
    "mlp_1024x64_plain": ("mlp", {}, mlp(1024, 64)),
    "roberta_2x48": ("roberta", FREE, padded(hf.RobertaModel, hf.RobertaConfig(**SMALL, intermediate_size=1024), 2, 48)),
    "electra_4x64": ("electra", FREE, padded(
        hf.ElectraModel, hf.ElectraConfig(**SMALL, embedding_size=128, intermediate_size=1024), 4, 64)),
    "distilbert_2x96": ("distilbert", FREE, padded(
        hf.DistilBertModel, hf.DistilBertConfig(dim=384, n_heads=6, n_layers=4, hidden_dim=1536, vocab_size=4000), 2, 96)),
    "opt_1x64": ("opt", FREE, text(
        hf.OPTForCausalLM, hf.OPTConfig(**SMALL, ffn_dim=1024, word_embed_proj_dim=256, use_cache=False), 1, 64)),
    "gpt_neox_2x64": ("gpt_neox", FREE, text(
        hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**SMALL, intermediate_size=1024, use_cache=False), 2, 64)),
    "gemma_1x48": ("gemma", FREE, text(
        hf.GemmaForCausalLM, decoder(hf.GemmaConfig, hidden_size=256, num_key_value_heads=1, head_dim=64, intermediate_size=1024), 1, 48)),
    "phi_1x80": ("phi", FREE, text(hf.PhiForCausalLM, hf.PhiConfig(**SMALL, intermediate_size=1024, use_cache=False), 1, 80)),
    "bart_2x40": ("bart", FREE, pair(hf.BartModel, BART, 2, 40, 16)),
    "deit_2x224": ("deit", FREE, image(hf.DeiTModel, hf.DeiTConfig(hidden_size=192, num_attention_heads=3, num_hidden_layers=4,
                                                               intermediate_size=768), 2, 224)),
    "dinov2_1x224": ("dinov2", FREE, image(hf.Dinov2Model, hf.Dinov2Config(hidden_size=192, num_attention_heads=3, num_hidden_layers=4,
                                                                   image_size=224), 1, 224)),
    "swin_1x224": ("swin", FREE, image(hf.SwinModel, SWIN, 1, 224)),
    "regnet_1x224": ("regnet", FREE, image(hf.RegNetModel, hf.RegNetConfig(hidden_sizes=[32, 64, 160, 384], depths=[1, 2, 3, 1],
                                                                   groups_width=16), 1, 224)),
    "mobilenet_v2_1x224": ("mobilenet_v2", FREE, image(hf.MobileNetV2Model, hf.MobileNetV2Config(), 1, 224)),
    "segformer_1x128": ("segformer", FREE, image(hf.SegformerModel, hf.SegformerConfig(), 1, 128)),
}  # fmt: skip

# One GPU: two layers of models as they are used, in bfloat16, inside CUDA graphs; an error budget makes 8-bit kernels candidates.
GRAPHS = {**FREE, "cudagraphs": True}
EXACT = {**GRAPHS, "error_budget": 0.0}
PLAIN = {"cudagraphs": True}
BIG = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 2, "intermediate_size": 4096}
LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 2, "intermediate_size": 4096, "image_size": 224}
LLAMA8 = decoder(
    hf.LlamaConfig, hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=32000, max_position_embeddings=8192,
)  # fmt: skip


def wide(config: type[Any], hidden: int, middle: int, heads: int, groups: int, **more: Any) -> Any:
    return decoder(config, hidden_size=hidden, intermediate_size=middle, num_hidden_layers=2, num_attention_heads=heads,
                   num_key_value_heads=groups, vocab_size=32000, **more)  # fmt: skip


CUDA: dict[str, tuple[str, Mapping[str, Any], Make]] = {
    "llama_1x512": ("llama", GRAPHS, text(hf.LlamaForCausalLM, LLAMA8, 1, 512)),
    "bert_64x128": ("bert", GRAPHS, padded(hf.BertModel, hf.BertConfig(**BIG), 64, 128)),
    "vit_32x224": ("vit", GRAPHS, image(hf.ViTModel, hf.ViTConfig(**LARGE), 32, 224)),
    "convnext_32x224": ("convnext", GRAPHS, image(hf.ConvNextModel, hf.ConvNextConfig(), 32, 224)),
    "gpt2_8x512": ("gpt2", GRAPHS, text(
        hf.GPT2LMHeadModel, hf.GPT2Config(n_embd=1024, n_head=16, n_layer=2, vocab_size=32000, use_cache=False), 8, 512)),
    "t5_8x256": ("t5", GRAPHS, pair(
        hf.T5ForConditionalGeneration, hf.T5Config(d_model=1024, d_kv=64, d_ff=4096, num_layers=2, num_heads=16, vocab_size=32000,
                                                   use_cache=False), 8, 256, 64)),
    "qwen3_1x1024": ("qwen3", GRAPHS, text(
        hf.Qwen3ForCausalLM, wide(hf.Qwen3Config, 2560, 9728, 32, 8, head_dim=128), 1, 1024)),
    "mistral_1x2048": ("mistral", EXACT, text(
        hf.MistralForCausalLM, wide(hf.MistralConfig, 4096, 14336, 32, 8, sliding_window=1024), 1, 2048)),
    "swin_32x224": ("swin", GRAPHS, image(hf.SwinModel, SWIN, 32, 224)),
    "regnet_32x224": ("regnet", GRAPHS, image(hf.RegNetModel, hf.RegNetConfig(hidden_sizes=[64, 128, 320, 768], depths=[1, 2, 3, 1],
                                                                        groups_width=32), 32, 224)),
    "gemma_1x512": ("gemma", GRAPHS, text(hf.GemmaForCausalLM, wide(hf.GemmaConfig, 2048, 16384, 8, 1, head_dim=256), 1, 512)),
    "phi_4x256": ("phi", GRAPHS, text(hf.PhiForCausalLM, wide(hf.PhiConfig, 2560, 10240, 32, 32), 4, 256)),
    "roberta_16x256": ("roberta", GRAPHS, padded(hf.RobertaModel, hf.RobertaConfig(**BIG), 16, 256)),
    "whisper_4x3000": ("whisper", GRAPHS, lambda: whisper(1280, 20, 1500, 4, 2)),
    "clip_32x64": ("clip", GRAPHS, lambda: clip({**BIG, "vocab_size": 32000}, LARGE, 32, 64)),
    "opt_4x256": ("opt", GRAPHS, text(
        hf.OPTForCausalLM, hf.OPTConfig(hidden_size=2048, num_attention_heads=32, num_hidden_layers=2, ffn_dim=8192,
                                        word_embed_proj_dim=2048, vocab_size=32000, use_cache=False), 4, 256)),
    "gpt_neox_4x256": ("gpt_neox", GRAPHS, text(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(
        hidden_size=2048, num_attention_heads=16, num_hidden_layers=2, intermediate_size=8192, vocab_size=32000, use_cache=False), 4, 256)),
    "bart_8x256": ("bart", GRAPHS, pair(hf.BartModel, hf.BartConfig(
        d_model=1024, encoder_layers=2, decoder_layers=2, encoder_attention_heads=16, decoder_attention_heads=16, encoder_ffn_dim=4096,
        decoder_ffn_dim=4096, vocab_size=32000, use_cache=False), 8, 256, 64)),
    "mobilenet_v2_64x224": ("mobilenet_v2", GRAPHS, image(hf.MobileNetV2Model, hf.MobileNetV2Config(), 64, 224)),
    "deit_64x224": ("deit", GRAPHS, image(hf.DeiTModel, hf.DeiTConfig(
        hidden_size=768, num_attention_heads=12, num_hidden_layers=2, intermediate_size=3072), 64, 224)),
    "dinov2_16x224": ("dinov2", GRAPHS, image(hf.Dinov2Model, hf.Dinov2Config(
        hidden_size=1024, num_attention_heads=16, num_hidden_layers=2, image_size=224), 16, 224)),
    "segformer_8x512": ("segformer", GRAPHS, image(hf.SegformerModel, hf.SegformerConfig(), 8, 512)),
    "distilbert_32x128": ("distilbert", GRAPHS, padded(
        hf.DistilBertModel, hf.DistilBertConfig(dim=768, n_heads=12, n_layers=2, hidden_dim=3072, vocab_size=30000), 32, 128)),
    "electra_32x128": ("electra", GRAPHS, padded(
        hf.ElectraModel, hf.ElectraConfig(**{**BIG, "hidden_size": 768, "num_attention_heads": 12}, embedding_size=768), 32, 128)),
    "resnet18_32x224": ("resnet", GRAPHS, image(
        hf.ResNetModel, hf.ResNetConfig(layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2]), 32, 224)),
    "llama_1x1": ("llama", GRAPHS, text(hf.LlamaForCausalLM, LLAMA8, 1, 1)),
    "llama_4x1024_plain": ("llama", PLAIN, text(hf.LlamaForCausalLM, LLAMA8, 4, 1024)),
    "bert_8x512_plain": ("bert", PLAIN, padded(hf.BertModel, hf.BertConfig(**BIG), 8, 512)),
    "mlp_4096x16": ("mlp", GRAPHS, mlp(4096, 16)),
    "mixtral_1x64": ("mixtral", GRAPHS, text(
        hf.MixtralForCausalLM, wide(hf.MixtralConfig, 2048, 7168, 32, 8, num_local_experts=4), 1, 64)),
}  # fmt: skip


class Captured(BaseException):
    """Ends a compilation whose graph is all that is wanted. No Exception: Dynamo would wrap it."""


@contextmanager
def stopping(take: Callable[[fx.Graph, Mapping[fx.Node, Tensor]], None]) -> Iterator[None]:
    """While this holds, a compilation hands its graph to `take` where it would plan, and goes no further."""
    normal = backend.plan_and_apply

    def stop(graph: fx.Graph, _options: Options, _target: Target, _store: TimingStore, frozen: Mapping[fx.Node, Tensor], *_: Any) -> None:
        take(graph, frozen)
        raise Captured

    backend.plan_and_apply = stop  # type: ignore[assignment]
    try:
        yield
    finally:
        backend.plan_and_apply = normal


def graph_of(model: nn.Module, inputs: Inputs, freeze: bool) -> GraphView:
    """The functional graph that the planner is given in the model's first call (the first graph, where there are several)."""
    found: list[GraphView] = []

    def take(graph: fx.Graph, frozen: Mapping[fx.Node, Tensor]) -> None:
        gm = fx.GraphModule(graph.owning_module, copy.deepcopy(graph))
        values = {node.name: value for node, value in frozen.items()}
        found.append(GraphView(gm.graph, {node: values[node.name] for node in gm.graph.nodes if node.name in values}))

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="layerzero", options={"freeze": freeze, "race": False})
    with stopping(take), torch.no_grad(), suppress(Captured):
        compiled(**inputs) if "input" not in inputs else compiled(inputs["input"])
    return found[0]


def collect(name: str, family: str, view: GraphView, options: Mapping[str, Any], target: Target, store: TimingStore) -> Case:
    """Plan once with everything measured (or known), then measure every kernel again if the device is here."""
    chosen = Options.resolve({**options, "measure_budget_s": 600.0})
    model = Measured(target, store, 600.0)
    recorder = corpus.Recorder(model)
    start = time.perf_counter()
    found = enumerate_regions(view, chosen, recorder)
    roofline = Roofline(target)
    add_defaults(view, found, roofline, lossy=chosen.error_budget > 0)
    problem = replace(build(view, found, chosen, roofline), error_budget=chosen.error_budget / DILUTION)
    seconds = time.perf_counter() - start
    known = store.get_many(key for _, keys in recorder.regions.values() for key in keys)
    timings = {key: (Sample(t.ns, t.spread, t.samples),) for key, t in known.items() if t.ns is not None}
    case = Case(name, family, target, options, problem, tuple(recorder.regions.values()), timings, seconds, time.strftime("%Y-%m-%d"))
    return again(case) if model.measures else case


def again(case: Case) -> Case:
    """With one more measurement of every kernel."""
    candidates, timings = case.candidates(), dict(case.timings)
    for ctx, keys in case.regions:
        fresh = [key for key in keys if key in candidates and len(timings[key]) == len(case.timings[key])]
        taken = measure.measure(ctx, [candidates[key] for key in fresh], time.perf_counter() + 60.0)
        for i, m in taken.items():
            if m.ns is not None:
                timings[fresh[i]] += (Sample(m.ns, m.spread, m.samples),)
    return replace(case, timings=timings)


def h200() -> dict[str, tuple[str, Mapping[str, Any], Callable[[], GraphView]]]:
    """The four graphs of the golden plans, as traced for a CUDA device."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests import test_golden_plans as golden

    options = {"freeze": True, "cudagraphs": True, "error_budget": 0.0}

    def graph(make: Callable[[], tuple[GraphView, GraphView]]) -> Callable[[], GraphView]:
        def view() -> GraphView:
            torch._dynamo.reset()
            return make()[1]

        return view

    return {
        "h200_llama_decode_1x4096": ("llama", options, graph(lambda: golden.decode(1, 4096))),
        "h200_llama_decode_32x4096": ("llama", options, graph(lambda: golden.decode(32, 4096))),
        "h200_bert_32x512": ("bert", options, graph(golden.bert)),
        "h200_resnet50_64x224": ("resnet", options, graph(golden.resnet)),
    }


def seen_on(device: str, make: Make, options: Mapping[str, Any]) -> GraphView:
    """A model's graph in float32 on a CPU, in bfloat16 on a GPU."""
    torch.manual_seed(0)
    with torch.device(device):
        model, inputs = make()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    inputs = {name: t.to(device, dtype if t.is_floating_point() else None) for name, t in inputs.items()}
    return graph_of(model.to(dtype), inputs, freeze=bool(options.get("freeze")))


def say(case: Case, path: Path, seconds: float) -> None:
    kernels, regions = len(case.timings), len(case.regions)
    size = path.stat().st_size
    print(
        f"{case.name}: {regions} regions, {kernels} kernels, {len(case.problem.candidates)} candidates, {size} bytes, {seconds:.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", default="*", help="a pattern of names")
    parser.add_argument("--seconds", type=float, default=1500.0, help="start no further case after this long")
    parser.add_argument("--cache-dir", help="folder of the timings store; a fresh one if left out")
    parser.add_argument("--again", action="store_true", help="measure every kernel of the cases that are there once more")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="of a CPU; one, since others may use the machine")
    parser.add_argument("--timings", help="a file of `lz cache export`, for a device that is not here")
    args = parser.parse_args()
    end = time.perf_counter() + args.seconds
    torch.set_num_threads(args.threads)
    if args.again:
        for case in corpus.load_all([args.out]):
            if fnmatch.fnmatch(case.name, args.cases) and time.perf_counter() < end:
                start = time.perf_counter()
                case = again(case)
                say(case, corpus.save(case, args.out), time.perf_counter() - start)
        return
    with tempfile.TemporaryDirectory() as fresh:
        store = TimingStore.open(args.cache_dir or fresh)
        views: dict[str, Any] = {}
        if args.timings:
            store.merge(args.timings)
            target = stored_target(store, "NVIDIA H200", graphs=True)
            views = h200()
        else:
            target = detect(args.device, store, graphs=args.device == "cuda")
            for name, (family, options, make) in (CPU if args.device == "cpu" else CUDA).items():
                views[name if args.device == "cpu" else f"{args.out.name}_{name}"] = (
                    family,
                    options,
                    partial(seen_on, args.device, make, options),
                )
        for name, (family, options, view) in views.items():
            path = args.out / f"{name}{corpus.SUFFIX}"
            if fnmatch.fnmatch(name, args.cases) and not path.exists() and time.perf_counter() < end:
                start = time.perf_counter()
                case = collect(name, family, view(), options, target, store)
                say(case, corpus.save(case, args.out), time.perf_counter() - start)


if __name__ == "__main__":
    main()
