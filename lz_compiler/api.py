"""The public functions of `import lz_compiler as lz`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from . import backends
from .backend import RECORDS, GraphRecord, layerzero
from .errors import OptionError
from .options import Options
from .reports.profiling import profile as profile_records
from .reports.report import Report, explain_model_plan, explain_plan, explain_records
from .target import detect
from .timings import user_store
from .types import Plan

if TYPE_CHECKING:
    from .deploy.offline import ModelPlan

F = TypeVar("F", bound=Callable[..., Any])


def compile(
    model: F, *, mode: str | None = None, dynamic: bool | None = None, fullgraph: bool = False,
    plan: ModelPlan | str | os.PathLike[str] | None = None, bundle: str | os.PathLike[str] | None = None, **options: Any,
) -> F:  # fmt: skip
    """`torch.compile(model, backend="layerzero", ...)` with LayerZero's options as keyword arguments, beside a mode.

    `plan`: of `lz.solve`, or its file. The module then runs by it, for inference, and nothing is planned (offline.PlannedModel).
    `bundle`: the model's folder, to be compared with the one that the plan was solved for.

    OptionError for a wrong option, or what does not go with `plan`. PlanError for a plan that cannot be read, or is not for this machine,
    these options or, with layout_mode="strict", this bundle (else a warning); FingerprintError for a bundle that has no fingerprint.
    """
    if not callable(model):
        raise OptionError(f"compile takes an nn.Module or a function; given: {model!r:.200}.")
    if plan is not None:
        from .deploy import offline

        if not isinstance(model, torch.nn.Module) or mode is not None or dynamic is not None:
            raise OptionError("with plan=..., compile takes an nn.Module, and neither mode nor dynamic: the plan holds them.")
        stored = plan if isinstance(plan, offline.ModelPlan) else offline.load_plan(plan)
        return offline.PlannedModel(model, stored, options, bundle)  # type: ignore[return-value]
    if bundle is not None:
        raise OptionError("bundle=... is compared with a plan's: give plan=... too.")
    given = Options.resolve(options, mode)  # a wrong option is reported here, not at the first call
    backends.check_names(given)

    def backend(gm: Any, inputs: Any) -> Any:
        return layerzero(gm, inputs, mode=mode, options=options)

    backend.__name__ = "layerzero"  # as torch's errors call it
    return torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=fullgraph)  # type: ignore[return-value, call-overload]


def explain(compiled: Any = None, profile: Callable[[], object] | None = None) -> Report:
    """What was decided for a compiled module or function, for a Plan, a ModelPlan or its file, or (no argument) in this whole process.

    A compiled module is known by its parameters, a function by the source lines that its graphs were traced from. `profile` calls what was
    compiled, `lambda: compiled(x)`: then each region shows what its kernel takes inside that call, too.
    OptionError for anything else, or where there is nothing to profile; PlanError for a file that is no plan.
    """
    from .deploy.offline import ModelPlan, load_plan

    if isinstance(compiled, Plan | ModelPlan | str | os.PathLike) and profile is not None:
        raise OptionError(
            "a plan runs nothing that could be profiled. Give what lz.compile(model, plan=...) returned, and profile a call of it."
        )
    if isinstance(compiled, Plan):
        return explain_plan(compiled)
    if isinstance(compiled, str | os.PathLike):
        compiled = load_plan(compiled)
    if isinstance(compiled, ModelPlan):
        return explain_model_plan(compiled)
    records = list(RECORDS) if compiled is None else _records_of(compiled)
    if profile is not None:
        profile_records(records, profile)
    what = "in this process" if compiled is None else "of this module" if isinstance(compiled, torch.nn.Module) else "of this function"
    call = "call a compiled model" if compiled is None else "call it"
    return explain_records(records, f"  nothing {what} was compiled by backend='layerzero' yet: {call} first")


def _records_of(compiled: Any) -> list[GraphRecord]:
    module = getattr(compiled, "_orig_mod", compiled)
    is_module = isinstance(module, torch.nn.Module)
    mine = {id(t) for t in (*module.parameters(), *module.buffers())} if is_module else set()
    function = type(module).forward if is_module else inspect.unwrap(getattr(compiled, "_torchdynamo_orig_callable", compiled))
    try:
        source, first = inspect.getsourcelines(function)
        path = inspect.getsourcefile(function)
    except TypeError:
        given = type(compiled).__name__
        raise OptionError(f"explain takes what torch.compile returned, a plan, or nothing; given: {given}") from None
    except OSError:  # typed in, say: known by parameters alone
        source, first, path = [], 0, None

    def belongs(record: GraphRecord) -> bool:
        theirs = {id(t) for ref in record.parameters if (t := ref()) is not None}
        if is_module and (mine or theirs):
            return bool(mine & theirs)
        return any(file == path and first <= line < first + len(source) for file, line in record.lines)

    return [record for record in list(RECORDS) if belongs(record)]


def doctor(cache_dir: str | None = None) -> Report:
    """Device, measured peaks, kernel libraries and what is missing, caches.

    `cache_dir`: the folder of the timings store (by default option `cache_dir`). In the report's data, bandwidths are in bytes/s, `flops`
    in flop/s by dtype ("transcendental": exp/s), launches in ns.
    """
    store = user_store(cache_dir)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    targets, lines = {}, []
    for device in devices:
        target = detect(device, store)
        flops = {k: v for k, v in target.flops.items() if k != "transcendental"}
        graph_launch = detect(device, store, graphs=True).launch_ns
        targets[device] = {
            **target.environment, "bandwidth": target.bandwidth, "flops": dict(target.flops), "launch_ns": target.launch_ns,
            "graph_launch_ns": graph_launch, "cache_bytes": target.cache_bytes, "cache_bandwidth": target.cache_bandwidth,
        }  # fmt: skip
        rates = ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in flops.items())
        details = ", ".join(f"{k} {v}" for k, v in target.environment.items() if k not in ("device", "name"))
        replayed = f", {graph_launch} ns in a CUDA graph" if device == "cuda" else ""
        lines += [f"  {device}: {target.name} ({details})"]
        cached = f" ({target.cache_bandwidth / 1e9:.1f} in cache)" if target.cache_bytes else ""
        lines += [f"    measured peaks: {target.bandwidth / 1e9:.1f} GB/s{cached}, {rates}, {target.launch_ns} ns a call{replayed}"]
    libraries = {}
    lines.append("  kernel libraries:")
    for name, library in backends.all_backends().items():
        here = any(device in library.devices for device in devices)
        missing = library.missing() or (None if here else "for CUDA devices, of which torch finds none here")
        libraries[name] = {"version": library.version(), "missing": missing, "kernels": sorted(library.kernels)}
        lines.append(f"    {name} {library.version()}: {missing or ', '.join(sorted(library.kernels))}")
    held = store.ls()
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(held.counts.items()))
    lines.append(f"  cache: {held.path or 'in memory only'}, {held.bytes} bytes ({kinds or 'empty'})")
    data = {
        "torch": torch.__version__,
        "targets": targets,
        "libraries": libraries,
        "cache": str(held.path) if held.path else None,
        "stored": dict(held.counts),
    }
    return Report(f"LayerZero on torch {torch.__version__}", data, tuple(lines))
