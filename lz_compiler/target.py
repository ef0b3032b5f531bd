"""The device that plans are made for: its peaks, measured once and kept in the timings store."""

from __future__ import annotations

import functools
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from . import torch_private
from .errors import OptionError, unknown
from .pace import PACE
from .timings import TimingStore
from .types import Target

PEAK_S = 0.15  # for which a peak is measured
REPLAYED = 100  # calls in one CUDA graph


@functools.cache
def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    return f"{named.get('model name', platform.machine())} f{named.get('cpu family', '?')}m{named.get('model', '?')}"


@functools.cache
def library_versions(device: str) -> Mapping[str, str]:
    if device == "cuda":
        return {"torch": torch.__version__, "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {
        "threads": str(torch.get_num_threads()), "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip


@functools.cache
def onednn_computes(dtype: str) -> bool:
    """Whether oneDNN computes in this dtype here: the 16-bit ones depend on the CPU's instructions."""
    if not torch.backends.mkldnn.is_available():
        return False
    known = torch.ops.mkldnn
    match dtype:
        case "float16":
            return bool(known._is_mkldnn_fp16_supported())
        case "bfloat16":
            return bool(known._is_mkldnn_bf16_supported())
    return dtype == "float32"


def last_level_cache(device: str = "cpu") -> int:
    """Bytes of the last-level cache that one core sees, 32 MiB where the system does not say."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties().L2_cache_size)
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [re.fullmatch(r"(\d+)([KM])", file.read_text().strip()) for file in files]
    return max((int(m[1]) << (10 if m[2] == "K" else 20) for m in sizes if m), default=32 << 20)


def environment(device: str) -> dict[str, str]:
    """What a timing or a plan is valid for."""
    return {"device": device, "name": device_name(device), **library_versions(device)}


def detect(device: str, store: TimingStore, graphs: bool = False) -> Target:
    """The target for a device type, with stored peaks or freshly measured ones (about a second).

    `graphs`: kernels are replayed from CUDA graphs, so that a launch costs what the device needs, not the host.
    """
    env = environment(device)
    key = "|".join(f"{k}={v}" for k, v in sorted(env.items()))
    peaks = store.get_record("peaks", key)
    if peaks is None or not _readable(peaks):
        peaks = measure_peaks(device)
        store.put_record("peaks", key, peaks)
    if device == "cpu":
        PACE.expect(peaks.get("product_s"))  # older records have none
    return _target(env, peaks, graphs)


def stored_target(store: TimingStore, name: str, graphs: bool = False) -> Target:
    """The target of a device that need not be here, from its stored peaks: of that name (`NVIDIA H200`), this torch's or else the newest.

    OptionError if the store has none.
    """
    known: dict[str, tuple[dict[str, str], str]] = {}
    own = f"|torch={torch.__version__}"  # rather than a newer row of another torch
    for entry in sorted((e for e in store.ls().entries if e.kind == "peaks"), key=lambda e: (own in e.key, e.created or 0.0, e.key)):
        env = dict(part.split("=", 1) for part in entry.key.split("|") if "=" in part)
        if {"name", "device"} <= set(env) and _readable(store.get_record("peaks", entry.key) or {}):
            known[env["name"]] = env, entry.key
    if name not in known:
        raise OptionError(unknown("target", name, known))
    env, key = known[name]
    peaks = store.get_record("peaks", key)
    assert peaks is not None
    return _target(env, peaks, graphs)


def _readable(peaks: Mapping[str, Any]) -> bool:
    """Whether a stored record has what a target is made of, as positive numbers."""
    numbers = [
        *_rates(peaks, "transcendental"),
        *(_rates(peaks["inductor"]) if peaks.get("inductor") else ()),  # a CPU's and older records have none
        *(peaks.get(k, 1) for k in ("cache_bytes", "cache_bandwidth")),
        peaks.get("launch_ns"),
    ]
    return all(isinstance(n, int | float) and 0 < n < float("inf") for n in numbers)


def _rates(record: Any, *more: str) -> list[Any]:
    """A record's bandwidth and rates, None among them where it lacks one."""
    flops = record.get("flops") if isinstance(record, dict) else None
    if not isinstance(flops, dict) or not {"float32", "bfloat16", "float16", *more} <= set(flops):
        return [None]
    return [record.get("bandwidth"), *flops.values()]


def is_here(target: Target) -> bool:
    """Whether kernels can be measured for the target: it is a device of this machine, with the same libraries."""
    present = target.device == "cpu" or torch.cuda.is_available()
    return present and environment(target.device) == dict(target.environment)


def _target(env: dict[str, str], peaks: dict[str, Any], graphs: bool) -> Target:
    return Target(
        device=env["device"], name=env["name"], bandwidth=float(peaks["bandwidth"]), flops=dict(peaks["flops"]),
        launch_ns=int(peaks.get("graph_launch_ns", 0) if graphs else 0) or int(peaks["launch_ns"]),
        environment=env, cache_bytes=int(peaks.get("cache_bytes", 0)), cache_bandwidth=float(peaks.get("cache_bandwidth", 0)),
        inductor=peaks.get("inductor") or {},
    )  # fmt: skip


def _best(run: Callable[[], object], device: str) -> float:
    """Shortest of the calls made in PEAK_S: a peak is the best that was seen."""
    run()
    samples: list[float] = []
    end = time.perf_counter() + PEAK_S
    while time.perf_counter() < end or len(samples) < 3:
        samples.append(event_timed(run) if device == "cuda" else _timed(run))
    return min(samples)


def measure_peaks(device: str) -> dict[str, Any]:
    """Bandwidth from a copy past the last-level cache (on a CPU also inside it), flop/s by dtype from a square product, exp/s, cost
    of one call; on a GPU also what TorchInductor takes for its rates."""
    with torch_private.real_tensors():
        cache = last_level_cache(device)
        elements = cache if device == "cpu" else 256 << 20
        a = torch.ones(elements, device=device)
        b = torch.empty_like(a)
        peaks: dict[str, float] = {}
        bandwidth = {"bandwidth": 8.0 * elements / _best(lambda: b.copy_(a), device)}
        if device == "cpu":  # both copies together take a quarter of the cache, since other threads use it, too
            a, b = a[: cache // 32], b[: cache // 32]
            bandwidth |= {"cache_bandwidth": 8.0 * a.numel() / _best(lambda: b.copy_(a), device), "cache_bytes": cache // 2}
        small = torch.randn(1 << (18 if device == "cpu" else 26), device=device)
        peaks["transcendental"] = small.numel() / _best(lambda: torch.exp(small), device)
        n = 768 if device == "cpu" else 8192
        for name in ("float32", "bfloat16", "float16"):
            x = torch.randn(n, n, device=device).to(getattr(torch, name))
            runs: list[Callable[[], object]] = [lambda x=x: x @ x]  # type: ignore[misc]
            if device == "cpu" and onednn_computes(name):
                runs.append(lambda x=x: torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], ""))  # type: ignore[misc]
            peaks[name] = 2.0 * n**3 / min(_best(run, device) for run in runs)
        tiny = torch.ones(1, device=device)
        calls = [_timed(lambda: tiny.add_(0)) for _ in range(200)]
        more: dict[str, Any] = {"launch_ns": int(statistics.median(calls) * 1e9)}
        if device == "cpu":
            more["product_s"] = _best(PACE.now, device)
        if device == "cuda":
            more |= {"graph_launch_ns": int(_replay_timed(lambda: tiny.add_(0)) * 1e9), "inductor": torch_private.estimated_rates()}
    return {**bandwidth, "flops": peaks, **more}


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def event_timed(run: Callable[[], object]) -> float:
    """Seconds between two events around the call on the current CUDA stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _replay_timed(run: Callable[[], object]) -> float:
    """Seconds a call inside a CUDA graph of many."""
    graph = torch_private.capture(run, REPLAYED)
    graph.replay()
    return min(event_timed(graph.replay) for _ in range(5)) / REPLAYED
