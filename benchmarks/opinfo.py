"""The op sweep: torch's own sample inputs of every op, through eager, TorchInductor and LayerZero.

    python benchmarks/opinfo.py [--ops mm,addmm] [--limit-samples 2] [--jobs 2] [--resume results.jsonl] [--json out.json]

The requirement: every sample that Inductor compiles and answers right, LayerZero compiles and answers right too. Exit
code 1 if one is missed. Right means: as eager within the op's own tolerance, with eager's shapes, dtypes and strides
(strides where eager's output is dense), and inputs changed as eager changes them. Where two eager runs differ (random
ops, uninitialised memory) only shapes and dtypes count.

LayerZero runs with `cost_model="roofline"` and without its race: nothing is timed, so a sweep does not depend on the
machine's load. And kernels that the graph does not have already are priced below what it has (`prefer_kernels`), so that
wherever one is offered, one is placed: with honest prices nearly every graph of this size stays as it is, and the sweep
would test nothing. The summary says in how many samples a kernel was placed. Where a layer's weight is an input there is
nothing to freeze, so `freeze` has no part in it.

Samples of an op are compiled in groups, as one graph: most of a sample's time is what any graph costs (a run of the C++
compiler, tracing). A group counts only if everything in it is right with both backends and LayerZero changed nothing.
Else its samples are run in smaller groups; where LayerZero placed a kernel, or a process died, each alone.

Interrupt it at any time and go on with the same --resume file.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
import torch._dynamo
from torch import Tensor
from torch.utils import _pytree as pytree

ATOL, RTOL = 1e-5, 1e-5  # as torch's own tests of Inductor, with room for another order of summation
OPTIONS = {"race": False, "measure_budget_s": 0.0, "cost_model": "roofline"}
UNSET = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
SAMPLE_TIMEOUT_S = 300.0
GROUP = 12  # samples in one graph
WORKER_SAMPLES = 500  # then a fresh process: compiled code is never unloaded
OK, SKIPPED = "ok", "skipped"


@dataclass(frozen=True, slots=True)
class Result:
    """One sample. `inductor` and `layerzero` are "ok", or what went wrong; LayerZero is "skipped" where Inductor failed.

    `kernels` counts the regions that LayerZero gave to another kernel than the graph had.
    """

    op: str
    index: int
    inductor: str
    layerzero: str
    kernels: int = 0

    @property
    def missed(self) -> bool:
        return self.inductor == OK and self.layerzero != OK


def op_infos() -> dict[str, Any]:
    """torch's op database by full name, float32 only."""
    from torch.testing._internal import common_methods_invocations as module

    # Attention, dropout and others are wrapped in a context that sets the seed; Dynamo breaks the graph there and would run
    # all of it eagerly. `run` sets the seed itself.
    module.wrapper_set_seed = lambda fn, *args, **kwargs: fn(*args, **kwargs)
    return {full_name(op): op for op in module.op_db if torch.float32 in op.dtypes}


def full_name(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def tolerance(op: Any) -> tuple[float, float]:
    """(atol, rtol): the widest that torch's own tests of this op allow for float32."""
    from torch.testing._internal.common_device_type import toleranceOverride

    atol, rtol = ATOL, RTOL
    for decorator in op.decorators or ():
        for inner in getattr(decorator, "decorators", (decorator,)):
            if isinstance(inner, toleranceOverride) and torch.float32 in inner.d:
                atol, rtol = max(atol, inner.d[torch.float32].atol), max(rtol, inner.d[torch.float32].rtol)
    return atol, rtol


def samples(op: Any, limit: int | None) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    torch.manual_seed(0)
    for sample in islice(op.sample_inputs("cpu", torch.float32), limit):
        yield (sample.input, *sample.args), dict(sample.kwargs)


def run(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], seed: int = 0) -> tuple[Any, Any]:
    """(output, inputs afterwards) of `fn` on copies that share memory, and have strides, as the originals do."""
    args, kwargs = copy.deepcopy((args, kwargs))
    torch.manual_seed(seed)
    with torch.no_grad():
        return fn(*args, **kwargs), (args, kwargs)


def difference(found: Any, expected: Any, atol: float, rtol: float, values: bool = True) -> str | None:
    """What distinguishes two results, or None."""
    ours, theirs = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    if len(ours) != len(theirs):
        return f"{len(ours)} outputs, eager has {len(theirs)}"
    for y, x in zip(ours, theirs, strict=True):
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            if isinstance(x, Tensor) or isinstance(y, Tensor):
                return f"{type(y).__name__}, eager has {type(x).__name__}"
            if values and isinstance(x, int | float | complex | bool | str) and not _equal_scalars(y, x, atol, rtol):
                return f"{y!r}, eager has {x!r}"
            continue
        why = _tensors_differ(y, x, atol, rtol, values)
        if why is not None:
            return why
    return None


def _equal_scalars(y: Any, x: Any, atol: float, rtol: float) -> bool:
    if isinstance(x, bool | str):
        return bool(y == x)
    return bool(torch.isclose(torch.tensor(y), torch.tensor(x), atol=atol, rtol=rtol, equal_nan=True))


def _tensors_differ(y: Tensor, x: Tensor, atol: float, rtol: float, values: bool) -> str | None:
    for fact in ("shape", "dtype", "layout", "device"):
        if getattr(y, fact) != getattr(x, fact):
            return f"{fact} {getattr(y, fact)}, eager has {getattr(x, fact)}"
    if x.layout is torch.strided and _dense(x):
        # The stride of a dimension of one element says nothing.
        pairs = [(a, b) for size, a, b in zip(x.shape, y.stride(), x.stride(), strict=True) if size > 1]
        if any(a != b for a, b in pairs):
            return f"strides {tuple(y.stride())}, eager has {tuple(x.stride())}"
    if not values:
        return None
    try:
        torch.testing.assert_close(y, x, atol=atol, rtol=rtol, equal_nan=True)
    except AssertionError as error:
        return " ".join(str(error).split())[:300]
    return None


def _dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return x.numel() > 0


def compiled(fn: Callable[..., Any], backend: str, count: int = 1) -> Callable[..., Any]:
    """`fn` called `count` times, as one function of its own (builtins are not compiled by themselves).

    Its calls are written out, since Dynamo does not compile a loop in which its graph breaks.
    """
    torch._dynamo.reset()
    calls = ", ".join(f"fn(*args[{i}], **kwargs[{i}])" for i in range(count))
    scope: dict[str, Any] = {"fn": fn}
    exec(f"def call(args, kwargs): return [{calls}]", scope)
    options = dict(OPTIONS) if backend == "layerzero" else None
    return torch.compile(scope["call"], backend=backend, options=options)


def attempt(op: Any, backend: str, group: Sequence[Sample]) -> str:
    """ "ok", or what went wrong. Whatever a compiler raises is a result of the sweep, hence the wide except."""
    try:
        call = compiled(op.get_op(), backend, len(group))
        inputs = copy.deepcopy([(s.args, s.kwargs) for s in group])
        torch.manual_seed(0)
        with torch.no_grad():
            outputs = call([args for args, _ in inputs], [kwargs for _, kwargs in inputs])
    except Exception as error:
        return f"error: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
    for sample, found in zip(group, zip(outputs, inputs, strict=True), strict=True):
        why = difference(found, sample.expected, *tolerance(op), values=sample.values)
        if why is not None:
            return f"wrong: {why}"
    return OK


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample and what eager makes of it; `values` is False where two runs of eager differ."""

    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    expected: Any = None
    values: bool = True
    failed: str | None = None


def run_eagerly(op: Any, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sample:
    fn = op.get_op()
    try:
        expected = run(fn, args, kwargs)
        again = run(fn, args, kwargs, seed=1)
    except Exception as error:
        failed = f"eager: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Sample(index, args, kwargs, failed=failed)
    values = op.name not in UNSET and difference(again, expected, *tolerance(op)) is None
    return Sample(index, args, kwargs, expected, values)


def check_sample(op: Any, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Result:
    """One sample through both backends, none where eager itself does not run."""
    (result,) = check_samples(op, [run_eagerly(op, index, args, kwargs)], lambda indices, phase: None)
    return result


def check_samples(op: Any, group: list[Sample], begin: Callable[[list[int], str], None]) -> list[Result]:
    """The samples' results, from one graph if that says enough. `begin` is told which samples go into which backend."""
    from torch._dynamo.utils import counters

    name = full_name(op)
    failed = [Result(name, s.index, s.failed, SKIPPED) for s in group if s.failed is not None]
    group = [s for s in group if s.failed is None]
    if not group:
        return failed
    begin([s.index for s in group], "inductor")
    inductor = attempt(op, "inductor", group)
    layerzero, kernels = SKIPPED, 0
    if inductor == OK:
        begin([s.index for s in group], "layerzero")
        before = counters["layerzero"]["kernels"]
        layerzero = attempt(op, "layerzero", group)
        kernels = counters["layerzero"]["kernels"] - before
    if len(group) == 1 or (layerzero == OK and not kernels):
        return failed + [Result(name, s.index, inductor, layerzero, kernels) for s in group]
    size = 1 if kernels else len(group) // 2
    parts = [group[i : i + size] for i in range(0, len(group), size)]
    return failed + [result for part in parts for result in check_samples(op, part, begin)]


def configure() -> None:
    """More of each op inside the graph, and identical generated code compiled once."""
    import torch._inductor.config as inductor

    inductor.fx_graph_cache = True
    torch._dynamo.config.capture_scalar_outputs = True
    torch._dynamo.config.capture_dynamic_output_shape_ops = True


def prefer_kernels() -> None:
    """Price every kernel at 1 ns, and what the graph has already at a second: a plan then uses all that is offered."""
    from lz_compiler.cost_models.roofline import Roofline
    from lz_compiler.types import Cost

    def cost(self: Any, ctx: Any, candidate: Any) -> Any:
        return Cost(10**9 if dict(candidate.params).get("as_is") else 1, "assumed")

    Roofline.cost = cost  # type: ignore[method-assign]


# --- workers: one process each, since an op that crashes must not end the sweep ---------------------------------------------


def work(limit: int | None) -> None:
    """Read `{"op", "done"}` lines from stdin; write what happens to the real stdout, whatever torch prints elsewhere."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    configure()
    prefer_kernels()
    infos = op_infos()
    for line in sys.stdin:
        task = json.loads(line)
        op, done, alone = infos[task["op"]], set(task["done"]), set(task["alone"])

        def begin(indices: list[int], phase: str) -> None:
            out.write(json.dumps({"begin": indices, "phase": phase}) + "\n")

        def finish(group: list[Sample], op: Any = op) -> None:
            for result in check_samples(op, group, begin):
                out.write(json.dumps({"result": asdict(result)}) + "\n")

        group: list[Sample] = []
        for index, (args, kwargs) in enumerate(samples(op, limit)):
            if index in done:
                continue
            begin([index], "eager")
            sample = run_eagerly(op, index, args, kwargs)
            if index in alone:
                finish([sample])
                continue
            group.append(sample)
            if len(group) == GROUP:
                finish(group)
                group = []
        finish(group)
        out.write(json.dumps({"end": True}) + "\n")


class Worker:
    """A worker process and the sample it is at."""

    def __init__(self, limit: int | None) -> None:
        command = [sys.executable, os.path.abspath(__file__), "--worker"]
        command += [] if limit is None else ["--limit-samples", str(limit)]
        env = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=env)
        self.samples = 0

    def sweep(self, op: str, done: set[int], alone: set[int], put: Callable[[Result], object]) -> bool:
        """Whether the op was finished; False after a crash, which is one sample's result, or leaves a group to be run one by one."""
        source, sink = self.process.stdout, self.process.stdin
        assert source is not None
        assert sink is not None
        at: list[int] = []
        phase = "start"
        with suppress(BrokenPipeError):
            sink.write(json.dumps({"op": op, "done": sorted(done), "alone": sorted(alone)}) + "\n")
            sink.flush()
        while line := self._line(source):
            told = json.loads(line)
            if "end" in told:
                return True
            if "begin" in told:
                at, phase = told["begin"], told["phase"]
                continue
            result = Result(**told["result"])
            self.samples += 1
            done.add(result.index)
            put(result)
        died = f"crash: exit code {self.process.wait()}"
        if phase == "start" or self.process.returncode > 0:  # an exception of this file's own, no op's
            self.log.seek(0)
            raise RuntimeError(f"a worker failed ({died}): {self.log.read()[-2000:]}")
        if len(at) > 1:
            alone.update(at)
            return False
        done.update(at)
        put(Result(op, at[0], OK, died) if phase == "layerzero" else Result(op, at[0], f"{phase} {died}", SKIPPED))
        return False

    def _line(self, source: IO[str]) -> str:
        timer = threading.Timer(SAMPLE_TIMEOUT_S, self.process.kill)
        timer.start()
        try:
            return source.readline()
        finally:
            timer.cancel()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def sweep(ops: Sequence[str], limit: int | None, jobs: int, known: Iterable[Result], put: Callable[[Result], object]) -> None:
    """All samples of the ops that are not among `known`; `put` is told each result, one at a time."""
    done: dict[str, set[int]] = {}
    for result in known:
        done.setdefault(result.op, set()).add(result.index)
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in ops:
        waiting.put(name)
    lock, failures = threading.Lock(), []

    def store(result: Result) -> None:
        with lock:
            put(result)

    def shard() -> None:
        worker = Worker(limit)
        try:
            while True:
                name = waiting.get_nowait()
                alone: set[int] = set()
                while not worker.sweep(name, done.setdefault(name, set()), alone, store):
                    worker = Worker(limit)
                if worker.samples > WORKER_SAMPLES:
                    worker.stop()
                    worker = Worker(limit)
        except queue.Empty:
            return
        except RuntimeError as error:
            failures.append(error)
        finally:
            worker.stop()

    threads = [threading.Thread(target=shard) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def read_results(path: Path) -> list[Result]:
    """Results of an earlier run; a line cut off by an interrupt is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):
            found.append(Result(**json.loads(line)))
    return found


def summary(results: Sequence[Result]) -> dict[str, Any]:
    reasons = Counter(r.inductor.partition(":")[0] for r in results if r.inductor != OK)
    return {
        "torch": torch.__version__,
        "samples": len(results),
        "ops": len({r.op for r in results}),
        "inductor": sum(r.inductor == OK for r in results),
        "layerzero": sum(r.inductor == OK and r.layerzero == OK for r in results),
        "with_kernels": sum(r.kernels > 0 for r in results),
        "inductor_failures": dict(reasons),
        "missed": [asdict(r) for r in results if r.missed],
    }


def select(infos: dict[str, Any], names: str | None) -> list[str]:
    """Names as given, each standing for all variants of an op if it is no full name."""
    if names is None:
        return list(infos)
    chosen = []
    for name in names.split(","):
        found = [name] if name in infos else [full for full, op in infos.items() if op.name == name]
        if not found:
            raise SystemExit(f"no op {name!r} in torch's op database with float32")
        chosen += found
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", help="names with commas between; all if left out")
    parser.add_argument("--limit-samples", type=int, help="the first N samples of each op")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--resume", type=Path, help="JSON lines: what is there is not run again, what is new is appended")
    parser.add_argument("--json", type=Path, help="write the summary here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.limit_samples)
        return 0
    chosen = select(op_infos(), options.ops)
    wanted = set(chosen)
    known = read_results(options.resume) if options.resume else []
    results = [r for r in known if r.op in wanted]

    def put(result: Result) -> None:
        results.append(result)
        if options.resume:
            with options.resume.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
        if result.missed:
            print(f"missed: {result.op} sample {result.index}: {result.layerzero}", file=sys.stderr, flush=True)

    sweep(chosen, options.limit_samples, options.jobs, known, put)
    found = summary(results)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{found['samples']} samples of {found['ops']} ops on torch {found['torch']}")
    print(f"  right with inductor:              {found['inductor']}")
    print(f"  of these right with layerzero:    {found['layerzero']}")
    print(f"  samples with a kernel LayerZero placed: {found['with_kernels']}")
    for r in found["missed"]:
        print(f"  missed: {r['op']} sample {r['index']}: {r['layerzero']}")
    return 1 if found["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
