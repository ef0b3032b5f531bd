"""`lz.warmup`: everything that a plan's cells need is compiled, loaded and captured before the first real call."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils import _pytree as pytree

from . import export
from .errors import OptionError, PlanError
from .offline import PlannedModel, check_bundle

FILE = "_layerzero_plan.py"


def load_baked(folder: str | os.PathLike[str], bundle: str | os.PathLike[str] | None = None) -> ModuleType:
    """The module of a folder that `lz.bake` wrote. PlanError where there is none, or it was baked for another machine.

    `bundle`: the model's folder, to be compared with the one that the plan was solved for.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise PlanError(f"there is no {FILE} in {os.fspath(folder)!r}. Give a folder that lz.bake wrote.")
    spec = importlib.util.spec_from_file_location(f"layerzero_plan_{path.parent.name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except RuntimeError as error:
        raise PlanError(str(error)) from error
    if bundle is not None:
        manifest = json.loads(path.with_name("manifest.json").read_text())
        check_bundle(manifest.get("bundle", {}), bundle, strict=module.LAYOUT_MODE == "strict")
    return module


def warmup(
    target: str | os.PathLike[str] | PlannedModel, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *,
    bundle: str | os.PathLike[str] | None = None, calls: int = 3, progress: bool = False,
) -> Any:  # fmt: skip
    """Run every cell `calls` times, so that the first real call costs what any other does; returns what is then ready.

    `target`: a folder of `lz.bake`, which is loaded and needs nothing else; or a model of `lz.compile(plan=...)` with example
    arguments, as for `lz.solve`. Buffers that the model writes into are put back after each call. Compiled kernels stay in Inductor's and
    Triton's caches, where the next process finds them. `bundle`: as for `load_baked`. `progress` draws a bar on stderr.
    """
    if calls < 1:
        raise OptionError(f"calls is {calls}; at least 1 is needed.")
    ready: Any = target if isinstance(target, PlannedModel) else load_baked(target, bundle)
    if isinstance(target, PlannedModel):
        done, cells = _planned(target, args, kwargs, calls), len(target.plan.cells)
    else:
        done, cells = ready.warmup(calls), len(ready.EXAMPLES)
    if not progress:
        for _ in done:
            pass
        return ready
    from rich.console import Console
    from rich.progress import track

    for _ in track(done, "warming up", total=cells, console=Console(stderr=True)):
        pass
    return ready


def _planned(target: PlannedModel, args: Sequence[Any], kwargs: Mapping[str, Any] | None, calls: int) -> Iterator[int]:
    named = export.bind(target.model, args, kwargs)
    plan, kept = target.plan, [buffer.clone() for buffer in target.model.buffers()]
    with torch.no_grad():
        for index, cell in enumerate(plan.cells, 1):
            example = export.resized(named, plan.dynamic, {s: high for s, (_, high) in cell.ranges.items()})
            for _ in range(calls):
                target(**pytree.tree_map_only(torch.Tensor, torch.clone, example))
                for buffer, value in zip(target.model.buffers(), kept, strict=True):
                    buffer.copy_(value)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            yield index
