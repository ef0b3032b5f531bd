"""Every option, once. The documentation's table, the environment names and the checks are read off this dataclass."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from .errors import OptionError, unknown
from .plan_io import digest
from .trust.policy import Policy, load_policy

PREFIX = "LAYERZERO_"
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_BOOLS = {"1": True, "true": True, "0": False, "false": False}
_warned: set[str] = set()


def _option(default: Any, text: str, *, choices: tuple[str, ...] = (), below: float = 1e9, plans: bool = True, own: bool = True) -> Any:
    """A field: `choices` are its allowed names, `below` a number's upper limit, `plans` whether it changes what is
    planned, `own` whether it can be set in the options dict and the environment."""
    metadata = {"help": text, "choices": choices, "below": below, "plans": plans, "own": own}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user may ask for. Hashable; every instance is valid, whichever way it was made: OptionError for a value that is not."""

    cost_model: Any = _option(  # noqa: RUF009  as the others
        "measured",
        "where prices come from: a name (plugins may register further ones), or an object with `name` and `price`",
        choices=("measured", "hybrid", "learned", "roofline", "inductor", "constant"),
    )
    solver: str = _option(
        "cp_sat",
        "what solves for the plan; all but `cp_sat` and `highs` are baselines",
        choices=("cp_sat", "highs", "greedy", "dynamic", "exhaustive", "lp_rounding", "one_layout", "priority", "local_search"),
    )
    layout_mode: str = _option("adapt", "`adapt` may convert layouts between kernels, `strict` keeps eager's", choices=("adapt", "strict"))
    error_budget: float = _option(0.0, "relative error that a plan may add; 0 allows lossless kernels only", below=1.0)
    freeze: bool = _option(False, "weights never change, so they may be packed, merged and folded")
    backends: tuple[str, ...] | None = _option(None, "kernel libraries that may be used (list, or names with commas); None is all")
    policy: Policy | None = _option(  # noqa: RUF009  it is frozen
        None, "rules that lock, prefer, avoid or deny kernels: path of a YAML or JSON file, or a dict; None is no rule"
    )
    cudagraphs: bool = _option(False, "run inside TorchInductor's CUDA graphs")
    measure_budget_s: float = _option(30.0, "seconds that measuring one graph's kernels may take", plans=False)
    solve_budget_s: float = _option(10.0, "seconds that solving one graph may take", plans=False)
    memory_limit: int | None = _option(None, "bytes of scratch memory, for kernels whose descriptor declares `workspace`; None is no limit")
    deterministic: bool = _option(
        False,
        "no race, no kernel that may give other bits: the plan follows from stored facts alone; on where torch's own flag is",
    )
    race: bool = _option(True, "compare plans end to end on the first real calls; False trusts the prices")
    ranks: bool = _option(True, "under torch.distributed, one rank plans for all; False: each for itself", plans=False)
    rank_timeout_s: float = _option(300.0, "seconds to wait for the other ranks to compile the same graph", plans=False)
    compile_in_background: bool = _option(
        False,
        "with a stored plan: a thread compiles a cell after its first call, and calls run its graph uncompiled until then",
        plans=False,
    )
    cache_dir: str | None = _option(None, "directory of the timings store; None is the user's cache", plans=False)
    problems: str | None = _option(
        None, "folder for each graph's problem as planned, one FILE.problem.json a graph; a stored verdict is then not used", plans=False
    )
    any_rows: bool = _option(False, "weights are to have one format for other shapes too: set by lz.solve", plans=False, own=False)
    mode: str = _option("default", "torch.compile's `mode`", choices=MODES, own=False)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _checked(field, getattr(self, field.name), f"option {field.name!r}")
            object.__setattr__(self, field.name, value)

    @staticmethod
    def resolve(options: Mapping[str, object] | None = None, mode: str | None = None) -> Options:
        """The options in force: the given ones, else LAYERZERO_<NAME> from the environment, else the defaults.

        A policy alone is joined: what an operator rules by the environment holds beside what the code rules.
        """
        if options is not None and not isinstance(options, Mapping):
            raise OptionError(f"options is {options!r}. Give a dict of option names to values.")
        given = dict(options or {})
        settable = {f.name: f for f in dataclasses.fields(Options) if f.metadata["own"]}
        for name in given:
            if name == "mode":
                raise OptionError(
                    "'mode' is not an option. Give it to torch.compile or lz.compile as mode=...; plans and the command line have none."
                )
            if name not in settable:
                raise OptionError(unknown("option", name, settable))
        _warn_unknown(settable)
        values: dict[str, Any] = {} if mode is None else {"mode": mode}
        for name, field in settable.items():
            variable = PREFIX + name.upper()
            text = os.environ.get(variable, "").strip()
            if name in given and not (name == "policy" and text):
                values[name] = given[name]
            elif text:  # empty counts as not set, as is usual in shells
                where = f"environment variable {variable}"
                values[name] = _checked(field, _parsed(field, text, where), where)
                if name == "policy" and given.get(name) is not None:
                    values[name] = load_policy(given[name], "option 'policy'").joined(values[name], variable)
        found = Options(**values)
        if found.problems is not None:
            _make_folder(found.problems)  # now: while a graph is compiled, an error would cost the plan
        return found

    @property
    def graphs(self) -> bool:
        """Whether the compiled graph is replayed from CUDA graphs (on a CPU this means nothing)."""
        return self.cudagraphs or self.mode in ("reduce-overhead", "max-autotune")

    @property
    def cost_model_name(self) -> str:
        """The cost model as text: its name, or of an object `module.Class:name`."""
        if isinstance(self.cost_model, str):
            return self.cost_model
        kind = type(self.cost_model)
        return f"{kind.__module__}.{kind.__qualname__}:{self.cost_model.name}"

    def as_data(self) -> dict[str, Any]:
        """What decides a plan, as JSON has it; where facts are kept, and for how long they are sought, does not."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["plans"]}
        values["cost_model"] = self.cost_model_name
        values["policy"] = self.policy and self.policy.to_data()  # its content, wherever the file lies
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def key(self) -> str:
        """Short and stable: equal for options that lead to the same plans."""
        values = self.as_data()
        if self.backends is not None:  # an allow-list has no order
            values["backends"] = sorted(self.backends)
        if self.policy is None:  # so that what was stored before there were policies is found
            del values["policy"]
        return digest(values)


def option_table() -> list[tuple[str, str, str, str]]:
    """(name, type or allowed names, default, help) of each option that can be set, for the documentation."""
    rows = []
    for field in dataclasses.fields(Options):
        if field.metadata["own"]:
            kind = " | ".join(field.metadata["choices"]) or str(field.type)
            rows.append((field.name, kind, str(field.default), str(field.metadata["help"])))
    return rows


def parse_text(name: str, text: str) -> object:
    """One option's text (of a command line, say) as the environment variable of that name would be read."""
    settable = {f.name: f for f in dataclasses.fields(Options) if f.metadata["own"]}
    if name not in settable:
        raise OptionError(unknown("option", name, settable))
    where = f"option {name!r}"
    return _checked(settable[name], _parsed(settable[name], text.strip(), where), where)


def _warn_unknown(settable: Mapping[str, object]) -> None:
    """A misspelt variable would be ignored silently. Only a warning: the name may be somebody else's."""
    allowed = [PREFIX + name.upper() for name in settable]
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in allowed and name not in _warned:
            _warned.add(name)
            warnings.warn(f"ignored: {unknown('environment variable', name, allowed)}", stacklevel=3)


def _parsed(field: dataclasses.Field[Any], text: str, where: str) -> object:
    """An environment variable's text as a value of the field's type, not yet checked."""
    kind = str(field.type)
    if kind == "bool":
        if text.lower() not in _BOOLS:
            raise OptionError(f"{where} is {text!r}. Allowed: 1, 0, true, false.")
        return _BOOLS[text.lower()]
    number = {"float": float, "int | None": int}.get(kind)
    if number is None:
        return text
    try:
        return number(text)
    except ValueError:
        raise OptionError(f"{where} is {text!r}. {_expected(field)}") from None


def _expected(field: dataclasses.Field[Any]) -> str:
    """What a field takes, as the end of an error message."""
    kind, below = str(field.type), field.metadata["below"]
    if kind == "float":
        return f"Give a number, at least 0 and below {below:g}."
    return {
        "bool": "Give True or False.",
        "int | None": "Give a whole number of bytes above 0, or None.",
        "tuple[str, ...] | None": "Give a list of backend names, a string of names with commas between, or None.",
        "str | None": "Give a path, or None.",
        "Policy | None": "Give a path, a dict of rules, or None.",
        "str": f"Give one of: {', '.join(field.metadata['choices'])}.",
        "Any": f"Give one of: {', '.join(field.metadata['choices'])}; or an object with a `name` and a method `price`.",
    }[kind]


def _checked(field: dataclasses.Field[Any], value: object, where: str) -> object:
    """The value in its normal form, or an OptionError."""
    kind = str(field.type)
    wrong = OptionError(f"{where} is {value!r}. {_expected(field)}")
    if value is None and kind.endswith("| None"):
        return None
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        if 0 <= value < field.metadata["below"]:
            return abs(float(value))  # abs: -0.0 would be a second key for the same options
        raise wrong
    if kind == "int | None" and isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if kind == "Policy | None":
        return load_policy(value, where)
    if kind == "str | None" and isinstance(value, str | os.PathLike) and str(value):
        return str(os.fspath(value))
    if kind == "tuple[str, ...] | None" and isinstance(value, str | list | tuple):
        names = value.split(",") if isinstance(value, str) else value
        if all(isinstance(name, str) and name.strip() for name in names):
            return tuple(dict.fromkeys(name.strip() for name in names))
        if all(isinstance(name, str) for name in names) and len(names) > 1:
            raise OptionError(f"{where} is {value!r}, with an empty name. {_expected(field)}")
        raise wrong
    if kind == "Any" and isinstance(getattr(value, "name", None), str) and callable(getattr(value, "price", None)):
        return value
    if kind in ("str", "Any") and isinstance(value, str):
        _check_name(field, value, where)
        return value
    raise wrong


def _make_folder(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        why = f"option 'problems' is {path!r}, which is no folder and cannot be made one: {error.strerror}"
        raise OptionError(f"{why}. Give another.") from error


def _check_name(field: dataclasses.Field[Any], value: str, where: str) -> None:
    choices = field.metadata["choices"]
    if value in choices:
        return
    if field.name == "cost_model":  # asked only here: reading every package's entry points takes milliseconds
        choices = (*choices, *entry_points(group="lz_compiler.cost_models").names)
    if value not in choices:
        raise OptionError(f"{where}: {unknown(field.name, value, choices)}")
