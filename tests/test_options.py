from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest

from lz_compiler import options as module
from lz_compiler.errors import OptionError
from lz_compiler.options import Options, option_table


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, *_ in option_table():
        monkeypatch.delenv(f"LAYERZERO_{name.upper()}", raising=False)
    monkeypatch.setattr(module, "_warned", set())


def test_given_before_environment_before_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERZERO_SOLVER", "highs")
    monkeypatch.setenv("LAYERZERO_FREEZE", "TRUE")
    monkeypatch.setenv("LAYERZERO_RACE", "0")
    monkeypatch.setenv("LAYERZERO_BACKENDS", "onednn, aten,onednn")
    monkeypatch.setenv("LAYERZERO_ERROR_BUDGET", "1e-2")
    monkeypatch.setenv("LAYERZERO_MEMORY_LIMIT", "4096")
    monkeypatch.setenv("LAYERZERO_LAYOUT_MODE", "")  # empty counts as not set
    given = {"solver": "greedy", "memory_limit": None, "solve_budget_s": 3, "cache_dir": Path("a")}
    found = Options.resolve(given, mode="max-autotune")
    assert found == Options(
        solver="greedy", freeze=True, race=False, backends=("onednn", "aten"), error_budget=0.01, memory_limit=None,
        solve_budget_s=3.0, cache_dir="a", mode="max-autotune",
    )  # fmt: skip
    assert type(found.solve_budget_s) is float
    assert Options.resolve({"cache_dir": None, "backends": ["aten"]}).backends == ("aten",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"solvr": "greedy"}, "unknown option 'solvr'. Did you mean 'solver'?"),
        ({"solver": "highz"}, "unknown solver 'highz'. Did you mean 'highs'?"),
        ({"solver": 3}, "option 'solver' is 3. Give one of: cp_sat"),
        ({"cost_model": "roofl"}, "Did you mean 'roofline'?"),
        ({"mode": "default"}, "Give it to torch.compile"),
        ({"freeze": 1}, "True or False"),
        ({"freeze": "true"}, "True or False"),
        ({"error_budget": True}, "at least 0 and below 1."),
        ({"error_budget": 1.0}, "at least 0 and below 1."),
        ({"error_budget": -1e-9}, "at least 0"),
        ({"error_budget": "0.1"}, "Give a number"),
        ({"measure_budget_s": True}, "Give a number"),
        ({"measure_budget_s": float("nan")}, "at least 0"),
        ({"measure_budget_s": 10**400}, "at least 0"),
        ({"memory_limit": 0}, "above 0"),
        ({"memory_limit": 1.5}, "whole number"),
        ({"memory_limit": True}, "whole number"),
        ({"backends": "aten,,onednn"}, "names"),
        ({"backends": ["aten", 1]}, "names"),
        ({"cache_dir": ""}, "path"),
        ({"solver": None}, "Give one of"),
        ([("freeze", True)], "Give a dict"),
    ],
)
def test_wrong_options_are_named(given: Any, message: str) -> None:
    with pytest.raises(OptionError) as raised:
        Options.resolve(given)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("FREEZE", "yes", "LAYERZERO_FREEZE is 'yes'. Allowed: 1, 0, true, false."),
        ("SOLVE_BUDGET_S", "10s", "LAYERZERO_SOLVE_BUDGET_S is '10s'. Give a number"),
        ("ERROR_BUDGET", "2", "LAYERZERO_ERROR_BUDGET is 2.0. Give a number, at least 0 and below 1."),
        ("MEMORY_LIMIT", "1e9", "LAYERZERO_MEMORY_LIMIT is '1e9'. Give a whole number"),
        ("LAYOUT_MODE", "strikt", "LAYERZERO_LAYOUT_MODE: unknown layout_mode 'strikt'. Did you mean 'strict'?"),
    ],
)
def test_wrong_environment_is_named(monkeypatch: pytest.MonkeyPatch, name: str, text: str, message: str) -> None:
    monkeypatch.setenv(f"LAYERZERO_{name}", text)
    with pytest.raises(OptionError) as raised:
        Options.resolve()
    assert message in str(raised.value)


def test_wrong_mode_and_wrong_constructor_arguments() -> None:
    with pytest.raises(OptionError, match="Did you mean 'max-autotune'"):
        Options.resolve(mode="max-autotun")
    with pytest.raises(OptionError, match="unknown solver 'x'"):
        Options(solver="x")


def test_unknown_environment_names_warn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERZERO_SOLVR", "highs")
    monkeypatch.setenv("LAYERZERO_MODE", "max-autotune")  # an argument of torch.compile, not a setting
    with pytest.warns(UserWarning, match="^ignored: unknown environment variable") as caught:
        assert Options.resolve() == Options()
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2
    assert "Did you mean 'LAYERZERO_SOLVER'?" in messages[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Options.resolve()


def test_registered_cost_models_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Registered:
        names = ("learned",)

    monkeypatch.setattr(module, "entry_points", lambda group: Registered())
    assert Options(cost_model="learned").cost_model == "learned"
    with pytest.raises(OptionError, match="Did you mean 'learned'"):
        Options(cost_model="leaned")


def test_key_holds_what_changes_plans() -> None:
    other = {
        "cost_model": "roofline", "solver": "highs", "layout_mode": "strict", "error_budget": 0.1, "freeze": True,
        "backends": ("aten",), "cudagraphs": True, "measure_budget_s": 1.0, "solve_budget_s": 1.0, "memory_limit": 1,
        "deterministic": True, "race": False, "cache_dir": "x", "problems": "y", "mode": "max-autotune",
        "ranks": False, "rank_timeout_s": 1.0, "compile_in_background": True, "any_rows": True,
        "policy": {"deny": [{"kernel": "aten.mm"}]},
    }  # fmt: skip
    assert set(other) == {f.name for f in dataclasses.fields(Options)}
    keys = {name: Options(**{name: value}).key() for name, value in other.items()}  # type: ignore[arg-type]
    same = {name for name, key in keys.items() if key == Options().key()}
    unplanned = {
        "measure_budget_s",
        "solve_budget_s",
        "cache_dir",
        "problems",
        "ranks",
        "rank_timeout_s",
        "compile_in_background",
        "any_rows",
    }
    assert same == unplanned
    assert len(set(keys.values())) == len(keys) - len(same) + 1
    assert Options(backends=("a", "b")).key() == Options(backends=("b", "a")).key()
    assert Options(error_budget=0).key() == Options(error_budget=-0.0).key() == Options().key()
    # Stored plans are found by it: a new value loses them all, so it changes only together with an option.
    assert Options().key() == "e715516370a159df"
    assert len({Options(), Options(), Options(freeze=True)}) == 2


def test_table_lists_each_option() -> None:
    rows = {name: rest for name, *rest in option_table()}
    assert set(rows) == {f.name for f in dataclasses.fields(Options)} - {"mode", "any_rows"}
    assert rows["solver"][:2] == [
        "cp_sat | highs | greedy | dynamic | exhaustive | lp_rounding | one_layout | priority | local_search",
        "cp_sat",
    ]
    assert rows["memory_limit"][:2] == ["int | None", "None"]
    assert all(text and "\n" not in text for *_, text in rows.values())
