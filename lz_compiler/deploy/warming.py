"""`lz.warmup`: everything that a plan's cells need is compiled, loaded and captured before the first real call."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, PlanError
from ..plan_io import read_limited

if TYPE_CHECKING:  # a process that only runs a baked folder loads no planner
    from .offline import PlannedModel

FILE = "_layerzero_plan.py"
MANIFEST = "manifest.json"
MAX_MANIFEST = 1 << 22  # bytes


def load_baked(folder: str | os.PathLike[str], bundle: str | os.PathLike[str] | None = None) -> ModuleType:
    """The module of a folder that `lz.bake` wrote, which is code that runs now.

    Before, every file is compared with manifest.json (about a second for each gigabyte of weights). That finds damage; who can
    write to the folder can write a manifest too. PlanError where something differs, or it was baked for another machine.
    `bundle`: the model's folder, to be compared with the one that the plan was solved for; FingerprintError if it has no fingerprint.
    """
    path = baked_file(folder)
    check_manifest(path.parent)
    source = path.read_bytes()
    spec = importlib.util.spec_from_file_location(f"layerzero_plan_{path.parent.name}", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    try:
        exec(compile(source, path, "exec"), module.__dict__)  # the loader would prefer a file in __pycache__, which no hash covers
    except RuntimeError as error:
        raise PlanError(str(error)) from error
    if bundle is not None:
        from .model_fingerprint import check_bundle

        manifest = json.loads(path.with_name(MANIFEST).read_text())
        check_bundle(manifest.get("bundle", {}), bundle, strict=module.LAYOUT_MODE == "strict")
    return module


def baked_file(folder: str | os.PathLike[str]) -> Path:
    """The Python file of a folder that `lz.bake` wrote. PlanError if there is none."""
    if not isinstance(folder, (str, os.PathLike)):
        raise OptionError(f"a folder that lz.bake wrote is needed; given: {folder!r:.200}.")
    path = Path(folder) / FILE
    if not os.path.isfile(path):
        raise PlanError(f"there is no {FILE} in {os.fspath(folder)!r}. Give a folder that lz.bake wrote.")
    return path


def check_manifest(folder: Path) -> None:
    """PlanError if a file that manifest.json lists is missing, or other than it was, or a name leads out of the folder."""
    where, again = os.fspath(folder), "Bake again, or copy the folder again."
    try:
        data = json.loads(read_limited(folder / MANIFEST, MAX_MANIFEST))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{where!r} has no {MANIFEST} that can be read ({error}): it is not loaded. {again}") from error
    files = data.get("files") if isinstance(data, dict) and data.get("layerzero_bake") == 1 else None
    if not isinstance(files, dict) or FILE not in files or not isinstance(data.get("bundle", {}), dict):
        raise PlanError(f"the {MANIFEST} of {where!r} is not one of this version, or does not list {FILE}: it is not loaded. {again}")
    for name, digest in files.items():
        parts = PurePosixPath(name)
        if not parts.parts or parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name or str(parts) != name:
            raise PlanError(f"the {MANIFEST} of {where!r} names {name!r:.200}, which is no file in the folder: it is not loaded.")
        path = folder / name
        if any(os.path.islink(p) for p in (path, *path.parents) if p.is_relative_to(folder) and p != folder):
            raise PlanError(f"{name!r:.200} in {where!r} is a link; a baked folder has plain files: it is not loaded. {again}")
        there = os.path.isfile(path)  # False for names that no file can have, where pathlib raises
        if parts.parts[0] == "kernels" and not os.path.exists(path):
            continue  # the Python file then compiles its own source
        if not there or sha256(path) != digest:
            what = "is not what was baked (another sha256)" if there else "is missing"
            raise PlanError(f"{name!r:.200} in {where!r} {what}: it is not loaded. {again}")
    extra = {p.relative_to(folder).as_posix() for p in (folder / "kernels").glob("*")} - set(files)
    if extra:
        raise PlanError(f"{min(extra)!r:.200} in {where!r} is not listed in {MANIFEST}: it is not loaded. {again}")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def warmup(
    target: str | os.PathLike[str] | ModuleType | PlannedModel, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *,
    bundle: str | os.PathLike[str] | None = None, calls: int = 3, progress: bool = False,
) -> Any:  # fmt: skip
    """Run every cell `calls` times, so that the first real call costs what any other does; returns what is then ready.

    `target`: a folder of `lz.bake`, which is loaded and needs nothing else, or the loaded module; or a model of `lz.compile(plan=...)`
    with example arguments, as for `lz.solve`. Buffers that the model writes into are put back after each call. Compiled kernels stay
    in Inductor's and Triton's caches, where the next process finds them. `bundle`: as for `load_baked`. `progress` draws a bar on stderr.

    OptionError for another target, or less than one call; PlanError for arguments that are not the plan's; what `load_baked` raises.
    """
    if not isinstance(calls, int) or calls < 1:
        raise OptionError(f"calls is {calls!r}; at least 1 is needed.")
    _check_target(target)
    ready = load_baked(target, bundle) if isinstance(target, (str, os.PathLike)) else target
    if isinstance(ready, ModuleType):
        done, cells = ready.warmup(calls), len(ready.EXAMPLES)
    else:
        done, cells = _planned(ready, args, kwargs, calls), len(ready.plan.cells)
    if not progress:
        for _ in done:
            pass
        return ready
    from rich.console import Console
    from rich.progress import track

    for _ in track(done, "warming up", total=cells, console=Console(stderr=True)):
        pass
    return ready


def _check_target(target: object) -> None:
    """OptionError for what is neither baked nor compiled by a plan."""
    if isinstance(target, (str, os.PathLike)) or (isinstance(target, ModuleType) and hasattr(target, "EXAMPLES")):
        return
    from .offline import PlannedModel

    if not isinstance(target, PlannedModel):
        what = f"{type(target).__module__}.{type(target).__qualname__}"
        raise OptionError(
            f"warmup takes a folder of lz.bake, its loaded module, or what lz.compile(model, plan=...) returned; given: {what}."
        )


def _planned(target: PlannedModel, args: Sequence[Any], kwargs: Mapping[str, Any] | None, calls: int) -> Iterator[int]:
    import torch
    from torch.utils import _pytree as pytree

    from . import export

    named = export.bind(target.model, args, kwargs, target.plan.arguments)
    plan, kept = target.plan, [buffer.clone() for buffer in target.model.buffers()]
    with torch.no_grad():
        for index, cell in enumerate(plan.cells, 1):
            example = export.resized(named, plan.dynamic, cell.ranges)
            for _ in range(calls + target.options.compile_in_background):
                target(**pytree.tree_map_only(torch.Tensor, torch.clone, example))
                for buffer, value in zip(target.model.buffers(), kept, strict=True):
                    buffer.copy_(value)
                target.wait()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            yield index
