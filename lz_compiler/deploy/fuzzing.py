"""`lz.fuzz`: a baked folder proved from its text, then tried on random shapes against the model that was baked."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import OptionError, PlanError
from . import export
from .proof import Finding, always, prove, ranges_of
from .warming import FILE, MANIFEST, baked_file

ENDED = "its process ended"  # how a crash is told
Sizes = Mapping[str, int]
Case = tuple[Sizes, bool, int]  # sizes by symbol or by place, whether they are outside, and a number for the values

# Runs in a process of its own, which a kernel that writes beyond its memory may end: one line in, one line out.
WORKER = """
import sys
for name in ("lz_compiler", "networkx", "ortools"):
    sys.modules[name] = None
import torch, warnings
from safetensors.torch import load_file, save_file
warnings.simplefilter("ignore")
import _layerzero_plan as plan
plan.REFERENCES.clear()  # a kernel that raises is a failure here
kept = {name: getattr(plan, name).clone() for name in plan.STATE}
print("ready", flush=True)
for line in sys.stdin:
    given = {name: value.to(plan.DEVICE) for name, value in load_file(sys.argv[1] + "/in").items()}
    for name, value in kept.items():
        getattr(plan, name).copy_(value)
    try:
        out = plan.forward(**given)
    except Exception as error:
        print(type(error).__name__ + ": " + " ".join(str(error).split()), flush=True)
        continue
    leaves = [v for v in torch.utils._pytree.tree_leaves(out) if isinstance(v, torch.Tensor)]
    leaves += [given[name] for name in plan.WRITTEN]
    save_file({str(i): v.cpu().contiguous().clone() for i, v in enumerate(leaves)}, sys.argv[1] + "/out")
    print("done", flush=True)
"""


@dataclass(frozen=True, slots=True)
class Failure:
    """The smallest sizes found for which the baked file is wrong, and what happened there."""

    sizes: Sizes
    why: str


@dataclass(frozen=True, slots=True)
class FuzzReport:
    """`findings` of the proof (code, detail); `tried` calls, `outside` of them beyond the declared range; `worst` is the largest
    error over the tried calls, relative to the largest value of the output. `reference`: what it was compared with."""

    folder: str
    paths: int  # 0 if nothing was to be proved
    cells: int
    findings: tuple[Finding, ...]
    tried: int
    outside: int
    failures: tuple[Failure, ...]
    worst: float
    reference: str

    @property
    def ok(self) -> bool:
        return not self.findings and not self.failures

    def __str__(self) -> str:
        lines = [f"{self.folder}: {'not proved' if self.findings or not self.paths else 'proved'}: {self.paths} paths, {self.cells} cells"]
        lines += [f"  {code}: {detail}" for code, detail in self.findings]
        if self.tried:
            shapes = f"{self.tried} calls tried ({self.outside} outside of the declared range) against {self.reference}"
            lines.append(f"{shapes}: {'all right' if not self.failures else 'wrong'}, worst relative error {self.worst:.1e}")
        lines += [f"  {', '.join(f'{k} {v}' for k, v in f.sizes.items()) or 'the given shapes'}: {f.why}" for f in self.failures]
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps({"ok": self.ok, **dataclasses.asdict(self)}, indent=1)


def fuzz(
    plan_dir: str | os.PathLike[str], *, examples: int = 500, model: nn.Module | None = None, proof: bool = True, seed: int = 0
) -> FuzzReport:
    """Prove that a folder of `lz.bake` has a right cell for every declared size, and try it.

    The proof reads the file, and runs nothing. With `model`, the one that was baked, `examples` calls are tried in a process of
    their own: every bucket edge and its neighbours, 1, primes, the largest, outside. Inside, the result must be as near to the model
    in float64 as the model itself, times two and rounding, or within the plan's error budget; outside, ValueError must come. Calls that
    the model itself refuses are not counted.
    `proof=False`: only the trial. `seed`: of the shapes that are drawn.

    PlanError for a folder that is not one of `lz.bake`, or is of another model; OptionError for what is no module, or a trial without
    hypothesis.
    """
    if not isinstance(model, (nn.Module, type(None))):
        raise OptionError(f"fuzz takes the nn.Module that was baked; given: {type(model).__name__}.")
    if not isinstance(examples, int) or examples < 1:
        raise OptionError(f"examples is {examples!r}. Give 1 or more.")
    folder = baked_file(plan_dir).parent
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        source = (folder / FILE).read_text()
        findings, paths = prove(source, manifest) if proof else ([], [])
    except (OSError, ValueError, KeyError, TypeError, SyntaxError) as error:
        raise PlanError(f"{os.fspath(folder)!r} is no folder of lz.bake ({type(error).__name__}: {error}). Bake it.") from error
    trial = _Trial(folder, source, manifest, model) if model is not None else None
    failures = trial.run(examples, seed) if trial is not None else ()
    tried = (trial.tried, trial.outside, failures, trial.worst, trial.reference) if trial is not None else (0, 0, (), 0.0, "")
    return FuzzReport(os.fspath(folder), len(paths), len(manifest["cells"]), tuple(findings), *tried)


class _Wrong(AssertionError):
    """The baked file failed on one call."""


class _Trial:
    def __init__(self, folder: Path, source: str, manifest: Mapping[str, Any], model: nn.Module) -> None:
        self.folder, self.model = folder, model
        self.shapes: Mapping[str, list[int | str]] = manifest["inputs"]
        self.buckets: Mapping[str, list[int]] = manifest["buckets"]
        self.budget = float(manifest["error_budget"])
        self.lowest: Mapping[str, int] = dict.fromkeys(self.buckets, 1) | manifest.get("at_least", {})
        self.cells = export.cells(self.buckets, self.lowest)
        general = [(ranges_of(cell), tuple(cell.get("asked", ()))) for cell in manifest.get("general", ())]
        body = ast.parse(source).body
        assigned = {n.targets[0].id: n.value for n in body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)}
        self.examples, self.written, mode = (ast.literal_eval(assigned[name]) for name in ("EXAMPLES", "WRITTEN", "LAYOUT_MODE"))
        self.general = general if mode == "adapt" else []
        (forward,) = (n for n in body if isinstance(n, ast.FunctionDef) and n.name == "forward")
        taken = forward.args
        pairs = [*zip(taken.args[len(taken.args) - len(taken.defaults) :], taken.defaults, strict=True)]
        pairs += [(a, d) for a, d in zip(taken.kwonlyargs, taken.kw_defaults, strict=True) if d is not None]
        self.constants = {a.arg: _constant(d) for a, d in pairs if a.arg not in self.shapes}
        self._check_weights()
        self.kept = {name: value.clone() for name, value in model.named_buffers()}
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.terms = sum(w[0].numel() for w in model.parameters() if w.dim() > 1)
        self.exact, self.reference = self._in_float64()
        self.tried = self.outside = 0
        self.failures: list[Failure] = []
        self.worst = 0.0

    def _check_weights(self) -> None:
        """PlanError for a model whose arguments or weights are not the folder's."""
        export.bind(self.model, (), dict.fromkeys([*self.shapes, *self.constants]))
        state = self.model.state_dict()
        with safe_open(self.folder / "weights.safetensors", framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                if name.split(".")[0] in ("constant", "plain") or name.split(".")[-1].startswith("lifted_tensor_"):
                    continue  # made while it was compiled
                try:
                    mine = state[name] if name in state else attrgetter(name)(self.model)
                except AttributeError as error:
                    raise PlanError(
                        f"{type(self.model).__name__} has no {name!r}, the folder has. Give the model that was baked."
                    ) from error
                if not torch.equal(stored.get_tensor(name), mine.cpu()):
                    hint = "Give the model that was baked; a factory has to return the same weights each time"
                    raise PlanError(f"the model's {name!r} is not the folder's. {hint}.")

    def _in_float64(self) -> tuple[nn.Module | None, str]:
        """The model in float64, if it can run so."""
        exact = copy.deepcopy(self.model).double()
        inputs = self.inputs({s: ends[0] for s, ends in self.buckets.items()}, 0)
        try:
            self._call(exact, inputs, torch.float64)
        except export.RAISED:  # dtypes are written out in it
            return None, "the model"
        return exact, "the model in float64"

    def inputs(self, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        """Made-up inputs: normal, or integers from 0 to what the example shows. Sizes by symbol, or by input and dimension."""
        generator = torch.Generator().manual_seed(seed)
        index = next(export.covering(self.cells, sizes), len(self.cells) - 1)
        made = {}
        for name, (_, dtype, highest) in self.examples[index].items():
            kind = getattr(torch, dtype)
            shape = [sizes.get(f"{name}.shape[{d}]", s if isinstance(s, int) else sizes[s]) for d, s in enumerate(self.shapes[name])]
            floating = kind.is_floating_point or kind.is_complex
            value = (
                torch.randn(shape, generator=generator) if floating else torch.randint(0, max(highest, 0) + 1, shape, generator=generator)
            )
            made[name] = value.to(kind)
        return made

    def _call(self, model: nn.Module, inputs: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        given = {n: v.to(self.device, dtype if dtype and v.is_floating_point() else v.dtype, copy=True) for n, v in inputs.items()}
        with torch.no_grad():
            try:
                out = model(**given, **self.constants)
            finally:
                for name, value in model.named_buffers():  # what the call wrote into
                    value.copy_(self.kept[name])
        return [v.cpu() for v in [*pytree.tree_leaves(out), *(given[n] for n in self.written)] if isinstance(v, Tensor)]

    def run(self, examples: int, seed: int) -> tuple[Failure, ...]:
        """The smallest failure, if there is one."""
        try:
            import hypothesis
        except ImportError as error:
            raise OptionError("lz.fuzz draws shapes with hypothesis. Install it: pip install 'lz-compiler[fuzz]'") from error
        edges = self._edges()[:examples]

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=max(examples - len(edges), 1), deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck),
            phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        )  # fmt: skip
        @hypothesis.given(self._cases())
        def attempt(case: Case) -> None:
            if not self._try(case):
                raise _Wrong

        with tempfile.TemporaryDirectory() as files:
            self.baked = _Baked(self.folder, Path(files))
            try:
                all(self._try(case) for case in edges)
                attempt()
            except _Wrong:
                pass
            finally:
                self.baked.close()
        return (min(self.failures, key=lambda f: sum(f.sizes.values())),) if self.failures else ()

    def _try(self, case: Case) -> bool:
        sizes, outside, number = case
        self.tried, self.outside = self.tried + 1, self.outside + outside
        why = self._attempt(sizes, outside, number)
        self.failures += [Failure(sizes, why)] if why else []
        return not why

    def _bounds(self, symbol: str) -> list[int]:
        """The sizes at buckets' ends, and beside them."""
        low, ends = self.lowest[symbol], self.buckets[symbol]
        return sorted(n for n in {e + d for e in (low, *ends) for d in (-1, 0, 1)} if low <= n <= ends[-1])

    def _wrong(self) -> list[dict[str, int]]:
        """What makes sizes wrong: one beyond a range, another fixed size, two sizes of one symbol."""
        found = [{s: n} for s, ends in self.buckets.items() for n in (0, self.lowest[s] - 1, ends[-1] + 1, ends[-1] + 2, 2 * ends[-1] + 1)]
        limits = {(s, high) for box, _ in self.general for s, (_, high) in box.items() if 1 < high < export.ENDLESS}
        found += [{s: n} for s, high in sorted(limits) for n in (high, high + 1) if n > self.buckets[s][-1]]
        seen: set[str] = set()
        for name, dim, s in ((name, dim, s) for name, shape in self.shapes.items() for dim, s in enumerate(shape)):
            if isinstance(s, int):
                found.append({f"{name}.shape[{dim}]": s + 1})
            elif s in seen and self.buckets[s][-1] > 1:
                found.append({s: 2, f"{name}.shape[{dim}]": 1})
            seen |= {s} if isinstance(s, str) else set()
        return found

    def _edges(self) -> list[Case]:
        """Every edge once, the other symbols at their largest, and everything that is wrong."""
        largest = {s: ends[-1] for s, ends in self.buckets.items()}
        inside: list[Case] = [({**largest, s: n}, False, 0) for s in self.buckets for n in self._bounds(s)]
        return inside + [({**largest, **wrong}, True, 0) for wrong in self._wrong()]

    def _cases(self) -> Any:
        """A strategy: sizes, whether they are outside, and a number for the values. Small ones first, to which failures shrink."""
        from hypothesis import strategies as st

        def inside(symbol: str) -> Any:
            bounds, low, last = self._bounds(symbol), self.lowest[symbol], self.buckets[symbol][-1]
            primes = [n for n in range(max(2, low), min(last, 500)) if _prime(n)] or bounds
            return st.sampled_from(bounds) | st.sampled_from(primes) | st.integers(low, last)

        right = st.fixed_dictionaries({s: inside(s) for s in self.buckets})
        numbers = st.integers(0, 1 << 16)
        good = st.tuples(right, st.just(False), numbers)
        bad = st.tuples(st.tuples(right, st.sampled_from(self._wrong() or [{}])).map(lambda p: p[0] | p[1]), st.just(True), numbers)
        return st.integers(0, 4).flatmap(lambda kind: bad if kind == 4 and self._wrong() else good)

    def _in_general(self, sizes: Sizes) -> bool:
        """Whether a general cell must take what is outside: no dimension of fixed size is another, no symbol has two sizes."""
        if sizes.keys() != self.buckets.keys():
            return False
        found = export.covering([box for box, _ in self.general], sizes)
        return any(all(always(text, {s: (n, n) for s, n in sizes.items()}) for text in self.general[i][1]) for i in found)

    def _attempt(self, sizes: Sizes, outside: bool, number: int) -> str:
        """Why the baked file is wrong there, if it is."""
        inputs = self.inputs(sizes, zlib.crc32(repr((sorted(sizes.items()), number)).encode()))
        said, found = self.baked.call(inputs)
        if outside and not self._in_general(sizes):
            return "" if said.startswith("ValueError: ") else f"outside of the declared range, and no ValueError came: {said}"
        try:
            eager = self._call(self.model, inputs)
        except export.RAISED:  # values that the model itself refuses, an index beyond these sizes: nothing to compare with
            self.tried -= not said.startswith(ENDED)
            return said if said.startswith(ENDED) else ""
        if said != "done":
            return said
        exact = self._call(self.exact, inputs, torch.float64) if self.exact else eager
        if [(y.shape, y.dtype) for y in found] != [(y.shape, y.dtype) for y in eager]:
            return f"outputs {[(tuple(y.shape), y.dtype) for y in found]}, the model's {[(tuple(y.shape), y.dtype) for y in eager]}"
        return next((why for three in zip(found, eager, exact, strict=True) if (why := self._differs(*three))), "")

    def _differs(self, found: Tensor, eager: Tensor, exact: Tensor) -> str:
        if found.is_complex():
            found, eager, exact = (torch.view_as_real(t.resolve_conj()) for t in (found, eager, exact))
        if not found.is_floating_point():
            return "" if torch.equal(found, eager) else f"{int((found != eager).sum())} of {found.numel()} values differ"
        finite = eager.isfinite()
        if any(not torch.equal(kind(found), kind(eager)) for kind in (torch.isnan, torch.isposinf, torch.isneginf)):
            return "NaN or infinity is where the model has none, or the other way round"
        y, e, x = (t[finite].double() for t in (found, eager, exact))
        if not y.numel():
            return ""
        scale = max(float(x.abs().max()), 1e-30)
        own, eagers = float((y - x).abs().max()), float((e - x).abs().max())
        self.worst = max(self.worst, own / scale)
        # As in measure.py: half an ulp of float32 for each term in any order, and a few of the output's dtype.
        rounding = 0.5 * math.sqrt(self.terms) * torch.finfo(torch.float32).eps + 4 * torch.finfo(found.dtype).eps
        if own <= 2 * eagers + rounding * scale or float((y - e).norm()) <= self.budget * float(e.norm()):
            return ""
        return f"error {own:.2e}, the model's own is {eagers:.2e} at scale {scale:.2e}"


class _Baked:
    """A process with the baked file; a new one after a crash."""

    def __init__(self, folder: Path, files: Path) -> None:
        self.folder, self.files = folder.absolute(), files
        self.process: subprocess.Popen[str] | None = None

    def call(self, inputs: Mapping[str, Tensor]) -> tuple[str, list[Tensor]]:
        """("done", outputs) or (what happened instead, [])."""
        if self.process is None:
            command = [sys.executable, "-c", WORKER, str(self.files)]
            environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # its threads must not spin while the model runs here
            with (self.files / "errors").open("wb") as errors:  # a pipe that nobody reads would fill, and stop it
                self.process = subprocess.Popen(
                    command, cwd=self.folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
                )
            if self._line() != "ready":
                raise PlanError(f"{self.folder} cannot be loaded: {self._last_words()}")
        save_file(dict(inputs), self.files / "in")
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        said = self._line()
        if said:
            found = load_file(self.files / "out") if said == "done" else {}
            return said, [found[str(i)] for i in range(len(found))]
        words = self._last_words()
        return f"{ENDED}: {words}", []

    def _line(self) -> str:
        assert self.process is not None
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def _last_words(self) -> str:
        assert self.process is not None
        self.process.communicate()
        code, self.process = self.process.returncode, None
        return f"exit {code} {' '.join((self.files / 'errors').read_text(errors='replace').split())[-300:]}"

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()
            self.process = None


def _constant(node: ast.expr) -> Any:
    """What stands in a signature: a literal, or one of the numbers that have none."""
    match node:
        case ast.Name("inf" | "nan" as name):
            return float(name)
        case ast.UnaryOp(ast.USub(), ast.Name("inf")):
            return -math.inf
    return ast.literal_eval(node)


def _prime(n: int) -> bool:
    return all(n % d for d in range(2, math.isqrt(n) + 1))
