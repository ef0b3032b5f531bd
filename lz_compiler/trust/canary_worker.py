"""The process in which one backend's capabilities are tried: `python -m lz_compiler.trust.canary_worker BACKEND DEVICE ROW_S TOTAL_S`.

It imports what is needed and then forks; the child runs one region after the other and says what it is about to do before it does
it. When the child dies or hangs, the row that it was at is given up and a new child goes on behind it: a fault costs one row, and
no second start-up. A row that hangs is first tried again, with more time: the machine may be busy. Lines of JSON go to stdout:

    {"regions": 120}                                                            how many there are
    {"at": [3, 1], "capability": "...", "shape": "..."}                         about to run candidate 1 of region 3
    {"at": [3, 1], "capability": "...", "shape": "...", "status": "passed", "detail": ""}
    {"end": ""}                                                                 done; a text says why it is not complete
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

import torch
from torch import Tensor

from .. import backends, measure, semantics, torch_private
from ..backends.base import Backend, SelectionContext
from ..types import Candidate, Rejection
from .canary_regions import capability_of, contexts, feature_of, worst_layout
from .capabilities import descriptor, refusal, subject
from .descriptors import FLOATS, Capability, Descriptor

LOSSY = 0.1  # relative error, beyond eager's own, above which not even a lossy kernel computes the region
START_S = 120.0  # to import a backend and make its regions
PATIENCE = 4  # times the limit, for a row that took too long: it counts only if it does so again

Place = tuple[int, int]
Emit = Callable[[dict[str, Any]], None]


# --- one candidate ------------------------------------------------------------------------------------------------------


def check(known: Capability, ctx: SelectionContext, candidate: Candidate, truth: measure.Truth) -> str | None:
    """Why the candidate fails, or None: numbers against float64, NaN, the outputs' dtype and layout, determinism, capture."""
    layouts = [(known.inputs, f.layout) for f in candidate.in_formats] + [(known.outputs, f.layout) for f in candidate.out_formats]
    for allowed, layout in layouts:
        if layout not in allowed:
            return f"layout: {layout} is not declared"
    bound = measure.Bound(candidate, ctx)
    error, epsilon = measure.judged(bound, ctx, truth)
    if error is None and epsilon > LOSSY:
        error = f"wrong: relative error {epsilon:.3g}, and a lossy kernel may have {LOSSY}"
    if error is not None:
        return error
    run = bound.on(truth.inputs)
    first = measure.leaves(run())
    for y, spec, fmt in zip(first, ctx.outputs, candidate.out_formats, strict=True):
        if y.dtype != semantics.torch_dtype(fmt.dtype) or y.numel() != torch.Size(spec.shape).numel():
            return f"result: {tuple(y.shape)} of {y.dtype}, and {spec.shape} of {fmt.dtype} was promised"
        if fmt.layout == "channels_last" and not y.is_contiguous(memory_format=torch.channels_last):
            return f"result: strides {y.stride()} are not channels last"
    error = _misdescribed(bound, truth, first)
    if error is not None:
        return error
    if known.deterministic and not all(_same_bits(a, b) for a, b in zip(first, measure.leaves(run()), strict=True)):
        return "nondeterministic: two runs on the same inputs differ"
    if known.backward and bound.kernel.prepare is None:
        error = _backward(bound, ctx, truth)
        if error is not None:
            return error
    if known.cuda_graph_safe and ctx.specs[0].device == "cuda":
        return _captured(run, first)
    return None


def _misdescribed(bound: measure.Bound, truth: measure.Truth, results: tuple[Tensor, ...]) -> str | None:
    """Whether the result has the dtype, sizes and strides that the operators' shape rules promise to the compiler."""
    values = truth.inputs.formatted(bound.candidate, bound.ctx)
    ready = bound.kernel.prepare(measure.EagerEmitter(), values, bound.params) if bound.kernel.prepare else values
    if bound.kernel.compiled or any(t.is_mkldnn for t in ready.values() if isinstance(t, Tensor)):  # opaque, without strides
        return None
    promised = measure.leaves(torch_private.fake_results(lambda t: bound.kernel.run(measure.EagerEmitter(), t, bound.params), ready))
    for y, fake in zip(results, promised, strict=True):
        steps = [(s, f) for n, s, f in zip(y.shape, y.stride(), fake.stride(), strict=False) if n > 1]
        if y.dtype != fake.dtype or y.shape != fake.shape or any(s != f for s, f in steps):
            return f"fake: {tuple(y.shape)} with strides {y.stride()}, its shape rule says {tuple(fake.shape)} with {fake.stride()}"
    return None


def _backward(bound: measure.Bound, ctx: SelectionContext, truth: measure.Truth) -> str | None:
    """Why the gradients that autograd takes through the kernel are not as close to float64's as eager's are, or None."""

    def gradients(run: Callable[[Any, Any], Any], values: dict[str, Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            leaves = {r: v.detach().requires_grad_() if v.is_floating_point() else v for r, v in values.items()}
            total = torch.stack([y.double().square().sum() for y in measure.leaves(run(leaves, ctx.params))]).sum()
            return list(torch.autograd.grad(total, [v for v in leaves.values() if v.requires_grad]))

    reference, values = semantics.REFERENCES[ctx.region.op], truth.inputs.values
    own = gradients(lambda t, _: bound.kernel.run(measure.EagerEmitter(), t, bound.params), truth.inputs.formatted(bound.candidate, ctx))
    eager = gradients(reference, values)
    exact = gradients(reference, {r: v.double() if v.is_floating_point() else v for r, v in values.items()})
    for mine, theirs, x in zip(own, eager, exact, strict=True):
        allowed = 2 * measure.max_error(theirs, x) + 4 * measure.rounding(ctx) * float(x.abs().max())
        if not measure.max_error(mine, x) <= allowed:
            limit = f"allowed is {allowed:.3g}" if allowed == allowed else "eager's own is NaN"
            return f"backward: error {measure.max_error(mine, x):.3g}, {limit}"
    return None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(bits), b.view(bits))


def _captured(run: Callable[[], Any], expected: tuple[Tensor, ...]) -> str | None:
    """Whether a CUDA graph of the kernel replays to the same numbers, and needs no memory but its pool's. Capturing finds
    synchronisation and cudaMalloc; memory of another stream is captured without a word."""
    results: list[tuple[Tensor, ...]] = []
    with torch_private.recorded_allocations() as begin:

        def once() -> None:
            if torch.cuda.is_current_stream_capturing():
                begin()
            results.append(measure.leaves(run()))

        try:
            graph = torch_private.capture(once)
        except RuntimeError as error:
            return f"cuda_graph: cannot be captured: {str(error).splitlines()[0]}"
        outside = torch_private.allocated_outside(graph)
    if outside:
        return f"cuda_graph: {outside} bytes are allocated outside the graph's pool"
    for y in results[-1]:
        y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    if not all(torch.allclose(y, x, equal_nan=True) for y, x in zip(results[-1], expected, strict=True)):
        return "cuda_graph: a replay gives other numbers"
    return None


# --- all regions of a backend -------------------------------------------------------------------------------------------


def regions(known: Descriptor, device: str) -> Iterator[tuple[str, SelectionContext, list[str]]]:
    """(shape, region, kernels) wherever the declaration of some kernel allows the region."""
    for op in dict.fromkeys(op for kernel in known.kernels.values() for op in kernel.ops):
        for dtype in FLOATS:
            for shape, ctx in contexts(op, dtype, device) if op in semantics.REFERENCES else ():
                fit = [name for name, kernel in known.kernels.items() if subject(kernel, ctx) and refusal(kernel, ctx) is None]
                if fit:
                    yield shape, ctx, fit


def _try_region(
    backend: Backend, known: Descriptor, region: tuple[str, SelectionContext, list[str]], place: Place, tried: set[tuple[str, str]],
    emit: Emit,
) -> None:  # fmt: skip
    """Say and do one region from a place on; `tried` remembers what is slow and need not be done again."""
    (shape, ctx, fit), (number, start) = region, place
    plain = f"|{ctx.region.op}|{ctx.specs[0].dtype}|{worst_layout(ctx.specs)}|{feature_of(ctx)}"
    emit({"at": [number, -1], "capability": fit[0] + plain, "shape": shape})
    answers = list(backend.candidates(ctx))
    offered = [a for a in answers if isinstance(a, Candidate) and a.kernel in known.kernels]
    for name in fit if start < 0 else ():
        if all(candidate.kernel != name for candidate in offered):
            reason = next((a.detail for a in answers if isinstance(a, Rejection) and a.kernel == name), "not offered")
            emit({"at": [number, -1], "capability": name + plain, "shape": shape, "status": "not_offered", "detail": reason})
    if not offered or not measure.measurable(ctx):
        return
    with torch_private.real_tensors():
        truth = measure.truth_of(ctx)
        for j, candidate in enumerate(offered):
            if j <= start:
                continue
            row: dict[str, Any] = {"at": [number, j], "capability": capability_of(ctx, candidate), "shape": shape}
            once = (row["capability"], "" if backend.kernels[candidate.kernel].compiled else shape)
            if _slow(backend, candidate) and once in tried:
                continue
            tried.add(once)
            emit(row)
            try:
                why = check(known.kernels[candidate.kernel], ctx, candidate, truth)
                if ctx.specs[0].device == "cuda":
                    torch.cuda.synchronize()  # a fault shows up here at the latest
            except torch_private.kernel_errors() as error:
                why = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
                if torch_private.out_of_memory(error):  # says nothing of the kernel
                    emit({**row, "status": "not_offered", "detail": f"not tried: {why}"})
                    continue
            emit({**row, "status": "failed" if why else "passed", "detail": why or ""})
            if why and "CUDA error" in why:
                os._exit(0)  # this process' context is lost; the next child begins after this row


def _slow(backend: Backend, candidate: Candidate) -> bool:
    """Kernels that are compiled for each try: by Inductor (one shape is enough), or for each tuning (one tuning of each shape: the
    others are checked when they are first measured)."""
    return backend.kernels[candidate.kernel].compiled or "variant" in dict(candidate.params)


def _child(name: str, device: str, share: tuple[int, int], after: Place, emit: Emit) -> None:
    """Try every region of a share (which of how many; of neighbours, that ask for the same kernels) from the given place on, in a
    process of its own."""
    torch.set_num_threads(min(2, torch.get_num_threads()))  # the regions are small
    torch.backends.cudnn.allow_tf32 = False  # which torch allows for convolutions unless told otherwise: float32 means float32 here
    backend = backends.all_backends()[name]
    known = descriptor(backend)
    assert known is not None
    if device == "cpu" and any(kernel.compiled for kernel in backend.kernels.values()):
        with torch_private.real_tensors():
            torch_private.precompile_headers()  # here, so that no row's time pays for it
    found = list(regions(known, device))
    emit({"regions": len(found)})
    tried: set[tuple[str, str]] = set()
    job, jobs = share
    for number in range(len(found) * job // jobs, len(found) * (job + 1) // jobs):
        if number >= after[0]:
            region = found[number]
            _try_region(backend, known, region, (number, after[1] if number == after[0] else -1), tried, emit)
    emit({"end": ""})


# --- the process that watches -------------------------------------------------------------------------------------------


def lines(fd: int, seconds: Callable[[], float]) -> Iterator[dict[str, Any] | None]:
    """Objects from a pipe, until it is closed; None where the next one takes longer than `seconds()`."""
    pending = b""
    while True:
        if not select.select([fd], [], [], max(0.0, seconds()))[0]:
            yield None
            return
        block = os.read(fd, 1 << 16)
        *whole, pending = (pending + block).split(b"\n")
        yield from (json.loads(line) for line in whole)
        if not block:
            return


def watch(name: str, device: str, row_s: float, total_s: float, share: tuple[int, int], out: IO[str]) -> None:
    """Run children until all regions of a share are done, or `total_s` seconds are over."""
    end, after, slow = time.monotonic() + total_s, (0, -1), (-1, -1)
    if device == "cpu":  # seconds of imports, which else each child's first row pays for; with CUDA, what they start cannot be forked
        torch_private.fake_results(lambda t: torch.nn.functional.linear(t["x"], t["x"]), {"x": torch.ones(2, 2)})

    def emit(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    while time.monotonic() < end:
        last, status, detail = _one_child(name, device, share, after, slow, row_s, end, emit)
        if status == "end":
            emit({"end": ""})
            return
        if status == "stopped":  # all the time is over: nothing is known of the row that was running
            break
        if "at" not in last:
            emit({"end": f"{status} before the first region: {detail}"})
            return
        number, candidate = last["at"]
        after = (number, candidate)
        if "status" in last and candidate >= 0:  # it died between two rows
            continue
        if status == "timed_out" and slow < (number, candidate):
            slow, after = (number, candidate), (number, max(candidate - 1, -1))
            continue
        emit({**last, "status": status, "detail": detail})
        after = (number, candidate) if candidate >= 0 else (number + 1, -1)
    emit({"end": f"stopped after {total_s:.0f} s"})


def _one_child(
    name: str, device: str, share: tuple[int, int], after: Place, slow: Place, row_s: float, end: float, emit: Emit
) -> tuple[dict[str, Any], str, str]:
    """(last line, `end`, `crashed`, `timed_out` or `stopped`, what is known of it) of a forked child that begins behind a place, and
    has more time up to `slow`."""
    read, write = os.pipe()
    with tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            os.close(read)
            os.dup2(errors.fileno(), 1)  # libraries print
            os.dup2(errors.fileno(), 2)
            with os.fdopen(write, "w") as pipe:
                _child(name, device, share, after, lambda message: print(json.dumps(message), file=pipe, flush=True))
            os._exit(0)
        os.close(write)
        last: dict[str, Any] = {}

        def limit() -> float:
            if "at" not in last:
                return max(row_s, START_S)
            return row_s * (PATIENCE if tuple(last["at"]) <= slow else 1)

        status = "crashed"
        for message in lines(read, lambda: min(limit(), end - time.monotonic())):
            if message is None:
                status = "timed_out" if time.monotonic() < end else "stopped"
                os.kill(child, signal.SIGKILL)
            elif "end" in message:
                status = "end"
            else:
                last = last if "regions" in message else message
                emit(message) if "at" not in message or "status" in message else None
        os.close(read)
        _, code = os.waitpid(child, 0)
        if status == "timed_out":
            return last, status, f"no answer within {limit():.0f} s"
        errors.seek(0)
        said = errors.read()[-2000:].decode("utf-8", "replace").strip().splitlines()
        number = os.waitstatus_to_exitcode(code)
        how = f"signal {signal.Signals(-number).name}" if number < 0 else f"exit code {number}"
        return last, status, how + (f": {said[-1][:200]}" if said and number > 0 else "")


if __name__ == "__main__":
    try:
        watch(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]), (int(sys.argv[5]), int(sys.argv[6])), sys.stdout)
    except BrokenPipeError:  # nobody listens any more; os._exit, since Python would try to flush again
        os._exit(1)
