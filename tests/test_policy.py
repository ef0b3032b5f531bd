"""Policies, determinism and circuit breaking: what may run, what ran, and what happens when it raises."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import acme
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import plant
from test_golden_plans import capture
from torch import Tensor, nn
from torch._inductor import config as inductor
from typer.testing import CliRunner

import lz_compiler as lz
from lz_compiler import backends, cli, semantics, zoo
from lz_compiler.backend import RECORDS
from lz_compiler.capture import GraphView
from lz_compiler.errors import KernelError, OptionError, PlanError, PolicyError
from lz_compiler.measure import Measurement
from lz_compiler.options import Options
from lz_compiler.planning import make_plan
from lz_compiler.reports.report import explain_plan
from lz_compiler.target import detect
from lz_compiler.timings import TimingStore, open_store
from lz_compiler.trust import circuit, failures, first_use
from lz_compiler.trust.policy import MAX_BYTES, SIZES, Policy, load_policy
from lz_compiler.types import EAGER, INDUCTOR, PLANNED, Plan

FIXED = {"race": False, "cost_model": "roofline"}
TINY = zoo.LlamaConfig(hidden=64, layers=2, heads=4, kv_heads=4, intermediate=96, vocab=128, max_len=64, tied=True)
ACME = {"prefer": [{"kernel": "acme.linear", "factor": 0.001}], "deny": [{"kernel": "acme.atomic"}]}
PRODUCTS = {"prefer": [{"kernel": "acme.product", "factor": 0.001}]}


@pytest.fixture(autouse=True)
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """acme's backend, found through its distribution's entry point; nothing left in the store but the device's peaks."""
    info = tmp_path / "site" / "acme-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lz_compiler.backends]\nacme = acme:Acme\n")
    monkeypatch.syspath_prepend(str(info.parent))
    forget()
    acme.licence.update(valid=True, calls=0, products=True)
    # Its kernels were right when they were first tried; what they do later is the tests' business.
    monkeypatch.setattr(first_use, "checked", lambda ctx, candidate: Measurement(None, 0, 0, 0.0, None))
    for cached in (backends.all_backends, backends.owners, backends.kernel):
        cached.cache_clear()
    yield
    forget()
    monkeypatch.undo()
    for cached in (backends.all_backends, backends.owners, backends.kernel):
        cached.cache_clear()


def store() -> TimingStore:
    return open_store(Options.resolve().cache_dir)


def forget() -> None:
    for kind in (failures.KIND, first_use.CHECKED, "verdict"):
        store().clear(kind)


def linear(*features: int) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(features))).eval()


def compiled(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="layerzero", options={**FIXED, **options})


def kernels(plan: Plan | None = None) -> list[str]:
    plans = [plan] if plan else RECORDS[-1].plans
    return [c.candidate.kernel for p in plans for c in p.choices if c.candidate.kernel != "inductor.loop"]


def ran(model: Any, *args: Any) -> set[str]:
    """Names of the operators that one call really ran."""
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(*args)
    return {event.name for event in profile.events()}


# --- what a policy says ---------------------------------------------------------------------------------------------------


def test_sizes_are_named_for_every_op() -> None:
    assert set(SIZES) == set(semantics.REFERENCES)


def test_a_file_a_dict_and_the_environment_are_one_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"deny": [{"name": "slow", "kernel": "mkl.*", "op": ["linear", "bmm"], "rows": ">= 128, <4096", "dtype": "float32"}],
             "avoid": [{"backend": "inductor", "factor": 3}]}  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(given))
    (tmp_path / "b.yaml").write_text(
        "deny:\n- {name: slow, kernel: mkl.*, op: [linear, bmm], rows: '>=128, < 4096', dtype: float32}\n"
        "avoid: [{backend: inductor, factor: 3.0}]"
    )
    found = [Options.resolve({"policy": p}) for p in (given, str(tmp_path / "a.json"), tmp_path / "b.yaml")]
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(PolicyError, match=r"is empty\. Give a dict of lock, prefer"):
        load_policy(tmp_path / "empty.yaml", "option 'policy'")
    monkeypatch.setenv("LAYERZERO_POLICY", str(tmp_path / "b.yaml"))
    found.append(Options.resolve())
    assert len(set(found)) == 1
    assert len({o.key() for o in found}) == 1
    policy = found[0].policy
    assert policy is not None
    assert load_policy(policy.to_data(), "") == policy
    assert Options.resolve({"policy": None}).policy == policy  # the environment's rules hold whatever the code gives
    assert Options().key() != found[0].key()
    (tmp_path / "b.yaml").write_text("deny: [{kernel: mkl.*}]")
    assert Options.resolve().key() != found[0].key()  # the content counts, not the path
    joined = Options.resolve({"policy": given}).policy
    assert joined is not None
    assert joined.rules[:-1] == policy.rules


WRONG: list[tuple[Any, str]] = [
    ({"denny": []}, "unknown policy key 'denny'. Did you mean 'deny'?"),
    ({"deny": [{"op": "liner"}]}, "unknown op 'liner'. Did you mean 'linear'?"),
    ({"deny": [{"op": "linear", "dtype": "float33"}]}, "unknown dtype 'float33'. Did you mean 'float32'?"),
    ({"deny": [{"op": "linear", "dtype": ["float32", "half"]}]}, "unknown dtype 'half'"),
    ({"deny": [{"op": "linear", "device": "gpu"}]}, "unknown device 'gpu'. Did you mean 'cpu'? Allowed: cpu, cuda."),
    ({"deny": [{"op": "linear", "head": 64}]}, "unknown condition 'head'"),
    ({"deny": [{"kernel": "aten.mm", "row": 1}]}, "Did you mean 'rows'?"),
    ({"deny": [{"kernel": "aten.mm", "factor": 0.5}]}, "unknown condition 'factor'"),
    ({"deny": [{"op": "linear", "rows": "> many"}]}, "comparisons such as '>= 128, < 4096'"),
    ({"deny": [{"op": "linear", "rows": True}]}, "whole number"),
    ({"deny": [{"op": "linear", "rows": -1}]}, "whole number"),
    ({"deny": [{}]}, "has no condition"),
    ({"lock": [{"op": "linear"}]}, "no kernel or backend to lock to"),
    ({"prefer": [{"op": "linear", "factor": 2}]}, "from 0.001 to 1"),
    ({"avoid": [{"op": "linear", "factor": float("nan")}]}, "from 1 to 1000"),
    ({"deny": {"kernel": "aten.mm"}}, "Give a list of rules"),
    ({"deny": ["aten.mm"]}, "Give a dict of conditions"),
    ({"deny": [{"kernel": ["aten.mm", 3]}]}, "list of names"),
    ({"deny": [{"name": "x", "op": "bmm"}], "avoid": [{"name": "x", "op": "bmm"}]}, "two rules are named 'x'"),
    ({"deny": [{"kernel": "aten.mm\n"}]}, "list of names"),
    (["deny"], "Give a path"),
    (7, "Give a path"),
    ("nowhere.yaml", "no such file"),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "message"), WRONG)
def test_wrong_policies_are_one_clear_error(policy: Any, message: str) -> None:
    with pytest.raises(OptionError) as raised:
        Options.resolve({"policy": policy})
    assert message in str(raised.value)
    assert len(str(raised.value)) < 700


@pytest.mark.parametrize(
    ("where", "message"),
    [({"kernel": "onednn.liner*"}, "Did you mean 'onednn.linear'"), ({"backend": "onednnn"}, "Did you mean 'onednn'")],
)
def test_kernels_that_do_not_exist_are_named(where: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        lz.compile(linear(8, 8), policy={"deny": [where]})


BOMB = "a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)) + "deny: *u\n"
FILES = [
    b"\xff\xfe\x00", b"deny: [", b"deny: [{kernel: !!python/object/apply:os.system [id]}]", BOMB.encode(), b"[" * 5000, b"{" * 5000,
    b"deny: [{kernel: a.*}]\ndeny: []", b"deny: [{kernel: a, kernel: b}]", b"x" * (MAX_BYTES + 1), b"deny: [{op: linear, rows: !!int ''}]",
    b"deny: [{op: linear, rows: !!timestamp x}]", b"- 1", b"deny: &a [*a]", b"deny: [{? [1]: 2}]", b"",
    b"deny: [{op: linear, rows: 1" + b"0" * 5000 + b"}]",
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["yaml", "json"])
@pytest.mark.parametrize("data", FILES, ids=range(len(FILES)))
def test_hostile_files(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"p.{suffix}"
    path.write_bytes(data)
    with pytest.raises(PolicyError) as raised:
        load_policy(str(path), "option 'policy'")
    assert len(str(raised.value)) < 800


def test_a_folder_and_a_device_are_not_policies(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "it is a folder"), (Path("/dev/zero"), "no such file")):
        with pytest.raises(PolicyError, match=message):
            load_policy(path, "option 'policy'")


TAGS = ["!!int", "!!float", "!!timestamp", "!!bool", "!!binary", "!!set", "!!omap", "!!str", "!!null", ""]
words = st.sampled_from([
    *TAGS, "deny", "lock", "op", "linear", "rows", ">= 1", "kernel", "*", "[", "]", "{", "}", ":", "- ", "\n", "  ", ",", "&a", "*a", "<<",
    "1:2:3.5",
    ".inf", "0x", "?", "|", ">", "'", '"', "#",
])  # fmt: skip


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.one_of(st.binary(max_size=60), st.lists(words, max_size=14).map(lambda w: " ".join(w).encode())))
def test_any_bytes_are_a_policy_or_one_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(data)
    try:
        found = load_policy(path, "option 'policy'")
    except PolicyError:
        return
    assert load_policy(found.to_data(), "") == found


# --- plans obey it --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(2, 8, 2, 16).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return nn.functional.gelu(self.out(y.transpose(1, 2).reshape(2, 8, 32)))


@functools.cache
def block() -> GraphView:
    return capture(Block().eval(), x=torch.randn(2, 8, 32))[0]


def planned(policy: Any) -> Plan:
    options = Options.resolve({**FIXED, "freeze": True, "policy": policy})
    return make_plan(block(), options, detect("cpu", store()), store(), fingerprint="", kind="inference")


globs = st.sampled_from(
    ["aten.*", "aten.mm", "mkl.*", "onednn.*", "onednn.merged_linear_packed", "*sdpa*", "acme.*", "aten.flash_attention_cpu", "*"]
)
conditions = st.fixed_dictionaries(
    {"kernel": globs},
    optional={
        "op": st.sampled_from(["linear", "attention", "merged_linear"]),
        "backend": st.sampled_from(["aten", "onednn", "attention", "acme"]),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
    },
)
policies = st.dictionaries(st.sampled_from(["lock", "deny", "prefer", "avoid"]), st.lists(conditions, min_size=1, max_size=2), min_size=1)


def breaks(policy: Policy, plan: Plan) -> list[str]:
    """Rules that the plan breaks, read off its choices alone: a merged product counts for its linears too."""
    wrong = []
    for choice in plan.choices:
        c = choice.candidate
        owner = backends.owners().get(c.kernel)
        if owner is None:
            continue
        ops = {c.region.op, "linear"} if c.region.op == "merged_linear" else {c.region.op}
        for rule in policy.rules:
            where = {k: set(v) for k, v in rule.where}
            dtype = c.in_formats[0].dtype
            if not where.get("op", ops) & ops or dtype not in where.get("dtype", {dtype}):
                continue
            named = Path(c.kernel).match(next(iter(where["kernel"]))) and owner in where.get("backend", {owner})
            if named is (rule.action == "deny") and rule.action in ("deny", "lock"):
                wrong.append(f"{rule} by {c.kernel}")
    return wrong


@settings(max_examples=60, deadline=None, derandomize=True)
@given(policies)
def test_plans_obey_any_policy(given: Any) -> None:
    policy = load_policy(given, "")
    try:
        plan = planned(policy)
    except PolicyError as error:
        # A minimal core: its rules alone leave no plan, and without any one of them there is one.
        core = [r for r in policy.rules if f"{r.action} {r.name!r} (" in str(error)]
        assert core
        with pytest.raises(PolicyError):
            planned(Policy(tuple(core)))
        for rule in core:
            planned(Policy(tuple(r for r in core if r is not rule)))
        return
    assert not breaks(policy, plan)
    assert all(c.cost.factor == 1.0 for c in plan.choices if c.candidate.kernel not in backends.owners())


def test_conflicting_rules_are_named_and_no_others() -> None:
    rules = {
        "lock": [{"name": "a", "op": "linear", "kernel": "onednn.*"}],
        "deny": [{"name": "b", "backend": "onednn", "rows": ">= 16"}, {"name": "c", "op": "attention", "kernel": "aten.flash*"}],
        "avoid": [{"name": "d", "kernel": "aten.*"}],
    }
    with pytest.raises(PolicyError) as raised:
        planned(rules)
    text = str(raised.value)
    assert "lock 'a'" in text
    assert "deny 'b'" in text
    assert "'c'" not in text
    assert "'d'" not in text
    assert "Nothing is left for linear" in text


def test_the_environments_policy_is_joined_to_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERZERO_POLICY", "{deny: [{kernel: 'acme.*'}], avoid: [{backend: onednn}]}")
    alone = Options.resolve().policy
    assert alone is not None
    assert [r.name for r in alone.rules] == ["deny 1", "avoid 1"]
    both = Options.resolve({"policy": PRODUCTS}).policy
    assert both is not None
    assert [r.name for r in both.rules] == ["prefer 1", "deny 1 (LAYERZERO_POLICY)", "avoid 1 (LAYERZERO_POLICY)"]
    assert Options.resolve({"policy": both.to_data()}).policy == both  # given again, as a stored plan has it
    assert Options.resolve({"policy": None}).policy == alone
    model, x = linear(16, 16), torch.randn(3, 16)
    with torch.no_grad():
        compiled(model, policy=ACME)(x)
    assert "acme.linear" not in kernels()
    assert "deny 'deny 1 (LAYERZERO_POLICY)'" in str(lz.explain())
    monkeypatch.setenv("LAYERZERO_POLICY", "{deny: [")
    with pytest.raises(PolicyError, match=r"environment variable LAYERZERO_POLICY .* cannot be read as a policy"):
        Options.resolve()
    monkeypatch.delenv("LAYERZERO_POLICY")  # the fixture resolves options too


def test_a_locked_kernel_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acme.Acme, "missing", lambda self: "acme is not installed: buy it")
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="leaves no plan") as raised:
        compiled(linear(16, 16), policy={"lock": [{"op": "linear", "kernel": "acme.linear"}]})(torch.randn(3, 16))
    assert "acme cannot run: acme is not installed: buy it (library_missing)." in str(raised.value)


def test_a_merged_product_is_locked_with_its_linears() -> None:
    assert "onednn.merged_linear_packed" in kernels(planned({"prefer": [{"kernel": "onednn.merged*"}]}))
    locked = planned({"lock": [{"op": "linear", "kernel": "mkl.linear_packed", "out_features": 32, "rows": 16}]})
    assert [k for k in kernels(locked) if "linear" in k or k == "aten.mm"] == ["mkl.linear_packed"] * 4
    assert "onednn.merged_linear_packed" in kernels(planned({"deny": [{"op": "linear", "kernel": "*", "rows": "> 16"}]}))


def test_a_preference_weighs_and_leaves_the_price() -> None:
    plain, locked = planned(None), planned({"lock": [{"op": "linear", "kernel": "acme.linear"}]})
    price = {choice.candidate.kernel: choice.cost.ns for choice in locked.choices}
    preferred = planned({"prefer": [{"name": "ours", "kernel": "acme.linear", "factor": 0.01}]})
    chosen = [c for c in preferred.choices if c.candidate.kernel == "acme.linear"]
    assert chosen
    assert all((c.cost.ns, c.cost.factor) == (price["acme.linear"], 0.01) for c in chosen)
    assert preferred.predicted > preferred.objective
    assert preferred.bound == preferred.objective  # and so the solver's claim still holds
    text = str(explain_plan(preferred))
    assert "x0.01 by the policy" in text
    assert "policy: prefer 'ours' (kernel acme.linear): 4 prices weighed" in text
    avoided = planned({"avoid": [{"kernel": kernel} for kernel in set(kernels(plain)) if kernel != "aten.sdpa"]})
    assert kernels(avoided) != kernels(plain)


FLASH, MATH, ONEDNN, MKL = "flash_attention_for_cpu", "_attention_math", "mkldnn::_linear_pointwise", "mkl::_mkl_linear"


@pytest.mark.parametrize(
    ("rules", "present", "absent"),
    [
        (
            {"lock": [{"op": "attention", "kernel": "aten.sdpa_math", "head": 16}], "deny": [{"backend": "onednn"}]},
            {MATH, MKL},
            {FLASH, ONEDNN},
        ),
        (
            {"lock": [{"op": "attention", "kernel": "aten.flash*"}], "deny": [{"kernel": "mkl.*", "rows": ">= 12"}]},
            {FLASH, ONEDNN},
            {MATH, MKL},
        ),
    ],
    ids=["math and mkl", "flash and onednn"],
)
def test_which_kernel_ran(rules: dict[str, Any], present: set[str], absent: set[str]) -> None:
    model = zoo.Llama(TINY).eval()
    ids = torch.randint(0, TINY.vocab, (1, 20))
    fast = compiled(model, policy={**rules, "deny": [*rules["deny"], {"kernel": ["aten.mm", "acme.*"]}]}, freeze=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(ids), model(ids), rtol=1e-4, atol=1e-4)
    names = ran(fast, ids)
    assert {op for op in (*present, *absent) if any(op in name for name in names)} == present


def test_rejections_name_the_rule() -> None:
    with torch.no_grad():
        fast = compiled(linear(8, 8), policy={"deny": [{"name": "no MKL", "kernel": "mkl.*"}]}, freeze=True)
        fast(torch.randn(3, 8))  # its graph lives as long as the model does
    (choice,) = [c for c in RECORDS[-1].plans[0].choices if c.candidate.region.op == "linear"]
    assert ("mkl.linear_packed", "policy") in {(r.kernel, r.code) for r in choice.rejections}
    assert "deny 'no MKL' (kernel mkl.*)" in str(lz.explain())


@pytest.mark.parametrize(
    ("policy", "finalists"),
    [
        ({"deny": [{"kernel": "acme.*"}]}, {PLANNED, INDUCTOR, EAGER}),
        ({"deny": [{"kernel": "inductor.gemv"}]}, {PLANNED, EAGER}),
        ({"lock": [{"op": "linear", "kernel": "acme.linear"}]}, {PLANNED}),
        ({"deny": [{"kernel": "aten.mm"}]}, {PLANNED}),
        ({"lock": [{"op": "attention", "kernel": "cudnn.attention"}]}, {PLANNED, INDUCTOR, EAGER}),  # nothing here to lock
    ],
)
def test_finalists_that_a_policy_forbids_do_not_race(policy: Any, finalists: set[str]) -> None:
    prefer = {"prefer": [{"backend": ["acme", "onednn"], "factor": 0.001}]}
    fast = compiled(linear(64, 64), policy={**policy, **prefer}, race=True)
    x = torch.randn(1, 64)
    with torch.no_grad():
        fast(x)
    record = RECORDS[-1]
    assert kernels(record.plans[0])[0].startswith(("acme", "onednn"))
    left = {INDUCTOR, EAGER} - set(record.plans[0].barred)
    assert {PLANNED, *left} == finalists
    with torch.no_grad():
        for _ in range(40):
            fast(x)
    assert set(record.times) <= finalists
    assert record.decided
    if finalists == {PLANNED}:
        assert record.winner == PLANNED
        assert any("not raced against" in note for note in record.notes)


def test_a_stored_verdict_is_of_its_policy() -> None:
    x = torch.randn(3, 16)
    model = linear(16, 16)
    found = []
    for kernel in ("acme.linear", "aten.mm", "acme.linear"):
        with torch.no_grad():
            compiled(model, policy={"lock": [{"op": "linear", "kernel": kernel}]}, race=True)(x)
        found.append(kernels())
    assert found == [["acme.linear"], ["aten.mm"], ["acme.linear"]]
    assert torch._dynamo.utils.counters["layerzero"]["plans"] == 2  # the third is of the first's verdict


# --- determinism ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch_flag() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


ATOMIC = {"prefer": [{"kernel": "acme.atomic", "factor": 0.001}]}


def test_deterministic_rejects_what_is_not() -> None:
    x, model = torch.randn(3, 16), linear(16, 16)
    with torch.no_grad():
        compiled(model, policy=ATOMIC)(x)
        assert kernels() == ["acme.atomic"]
        compiled(model, policy=ATOMIC, deterministic=True, race=True)(x)
    assert "acme.atomic" not in kernels()
    assert "acme.atomic (nondeterministic)" in str(lz.explain())


def test_torchs_own_flag_is_honoured(torch_flag: None) -> None:
    x, model = torch.randn(3, 16), linear(16, 16)
    with torch.no_grad():
        fast = compiled(model, policy=ATOMIC, race=True)
        for _ in range(3):
            assert torch.equal(fast(x), fast(x))
    record = RECORDS[-1]
    assert record.options.deterministic
    assert "acme.atomic" not in kernels()
    assert not record.times
    torch.use_deterministic_algorithms(False)
    with torch.no_grad():
        compiled(model, policy=ATOMIC)(x)  # Dynamo guards on the flag; so do our keys
    assert kernels() == ["acme.atomic"]


def test_a_deterministic_plan_is_kept(tmp_path: Path) -> None:
    """The first process had no time to measure; the second one must not plan otherwise for having more."""
    x, model = torch.randn(3, 16), linear(16, 16)
    plant(str(tmp_path / "cache"))
    options: dict[str, Any] = {
        "deterministic": True,
        "cost_model": "measured",
        "race": True,
        "policy": ACME,
        "cache_dir": str(tmp_path / "cache"),
    }
    with torch.no_grad():
        compiled(model, measure_budget_s=60.0, **options)(x)
        first = kernels()
        assert first == ["acme.linear"]
        open_store(options["cache_dir"]).clear("timing")
        compiled(model, measure_budget_s=0.0, **options)(x)
    assert kernels() == first


# --- circuit breaking -----------------------------------------------------------------------------------------------------


def quarantined() -> dict[str, Any]:
    return store().get_records(failures.KIND)


@pytest.mark.parametrize("race", [False, True])
def test_a_kernel_that_raises_is_quarantined(race: bool) -> None:
    model, x = linear(16, 16), torch.randn(3, 16)
    fast = compiled(model, policy=ACME, race=race)
    acme.licence["valid"] = False
    with torch.no_grad():
        with pytest.warns(UserWarning, match=r"acme\.linear raised RuntimeError: acme: the licence has expired") as caught:
            torch.testing.assert_close(fast(x), model(x))
        assert len([w for w in caught if "acme" in str(w.message)]) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(40):
                torch.testing.assert_close(fast(x), model(x))
    assert acme.licence["calls"] == 1
    record = RECORDS[-1]
    assert record.winner in (EAGER, INDUCTOR)
    assert any("licence" in note for note in record.notes)
    ((key, value),) = quarantined().items()
    assert key.startswith("acme.linear#1|1.0|linear|float32|")
    assert "licence" in value["error"]
    shown = CliRunner().invoke(cli.app, ["cache", "ls"]).output
    assert "quarantine: 1" in shown
    assert "acme.linear for linear in float32: RuntimeError: acme: the licence has expired" in shown
    # The next plan of this and of other graphs avoids it, and says why.
    for other, y in ((model, x), (linear(8, 8), torch.randn(2, 8))):
        with torch.no_grad():
            torch.testing.assert_close(compiled(other, policy=ACME, race=race)(y), other(y))
        assert "acme.linear" not in kernels()
        assert "acme.linear (quarantined)" in str(lz.explain())
    assert "licence has expired" in str(lz.explain())
    # Another dtype was not tried, and a new version is another capability.
    assert acme.licence["calls"] == 1
    acme.licence["valid"] = True
    with torch.no_grad():
        compiled(linear(8, 8).bfloat16(), policy=ACME)(torch.randn(2, 8).bfloat16())
    assert kernels() == ["acme.linear"]
    assert CliRunner().invoke(cli.app, ["cache", "clear", "quarantine"]).output == "1 removed\n"


def test_a_plan_that_cannot_be_compiled_leaves_the_graph_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(*args: object) -> None:
        raise NotImplementedError("no code for this")

    monkeypatch.setitem(torch._inductor.lowering.lowerings, torch.ops.acme.linear.default, lower)
    model, x = linear(16, 16), torch.randn(3, 16)
    first = compiled(model, policy=ACME)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="the plan could not be compiled.*no code for this.*TorchInductor runs the graph as it was"):
            torch.testing.assert_close(first(x), model(x))
        assert RECORDS[-1].winner == INDUCTOR
        torch._dynamo.reset()
        second = compiled(model, policy=ACME)
        torch.testing.assert_close(second(x), model(x))  # without planning: a second warning would be an error
        assert RECORDS[-1].winner == INDUCTOR
        assert "no code for this" in str(lz.explain(second))


def test_a_plan_may_be_compiled_where_inductor_alone_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(*args: object, **kwargs: object) -> None:
        raise NotImplementedError("no code for this")

    for op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
        monkeypatch.setitem(torch._inductor.lowering.lowerings, op, lower)
    model, x = linear(16, 16), torch.randn(3, 16)
    fast = compiled(model, policy=ACME, race=True)
    with torch.no_grad(), torch._inductor.utils.fresh_cache():  # Inductor's code for the graph must not be there already
        for _ in range(3):
            torch.testing.assert_close(fast(x), model(x))
    assert kernels() == ["acme.linear"]
    assert any(note.startswith("not raced against TorchInductor, which cannot compile the graph: ") for note in RECORDS[-1].notes)


def test_a_region_may_call_an_operator_twice() -> None:
    """A profile gives each region as many calls as it makes (those of a gated layer are two products)."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for _ in range(4):
        x = graph.call_function(torch.ops.aten.mm.default, (x, x))
        x.meta["layerzero"] = "acme.gated"
    choice = SimpleNamespace(candidate=SimpleNamespace(kernel="acme.gated"))
    counts = {"torch.ops.aten.mm": 2, "extern_kernels.mm": 2}
    assert circuit.called_as(graph, [choice, choice]) == {"acme.gated": counts}  # type: ignore[list-item]


def test_a_new_version_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = linear(16, 16), torch.randn(3, 16)
    acme.licence["valid"] = False
    with torch.no_grad(), pytest.warns(UserWarning, match="licence"):
        compiled(model, policy=ACME)(x)
    acme.licence["valid"] = True
    monkeypatch.setattr(acme.Acme, "version", lambda self: "1.1")
    for cached in (backends.all_backends, backends.owners, backends.kernel):  # as in another process
        cached.cache_clear()
    with torch.no_grad():
        compiled(model, policy=ACME)(x)
    assert kernels() == ["acme.linear"]


def test_a_verdict_does_not_bring_it_back() -> None:
    """A graph whose plan was stored before another graph found the kernel broken."""
    model, x = linear(16, 16), torch.randn(3, 16)
    with torch.no_grad():
        compiled(model, policy=ACME, deterministic=True)(x)
        assert kernels() == ["acme.linear"]
        compiled(model, policy=ACME, deterministic=True)(x)
        assert kernels() == ["acme.linear"]
        acme.licence["valid"] = False
        with pytest.warns(UserWarning, match="licence"):
            compiled(linear(8, 8), policy=ACME)(torch.randn(2, 8))
        compiled(model, policy=ACME, deterministic=True)(x)
    assert "acme.linear" not in kernels()
    assert any("planned anew" in note for note in RECORDS[-1].notes)


def test_a_stored_plan_with_a_broken_kernel_is_refused() -> None:
    model, x = linear(16, 16), torch.randn(3, 16)
    plan = lz.solve(model, (x,), **{**FIXED, "policy": ACME})
    acme.licence["valid"] = False
    with pytest.warns(UserWarning, match="licence"):
        torch.testing.assert_close(lz.compile(model, plan=plan)(x), model(x))
    with pytest.raises(PlanError, match=r"uses what failed here: acme\.linear raised at run time.*Solve again"):
        lz.compile(model, plan=plan)(x)


def test_training_falls_back_in_the_forward() -> None:
    model, x = linear(16, 16), torch.randn(3, 16)
    fast = compiled(model, policy=ACME)
    acme.licence["valid"] = False
    with pytest.warns(UserWarning, match="licence"):
        y = fast(x)
    y.sum().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(found, [p.grad for p in model.parameters()])


def test_a_kernel_that_raises_in_the_backward_is_not_planned_again() -> None:
    """The step cannot be repeated, and says so; the next one runs without the kernel."""
    model, x = linear(16, 16), torch.randn(3, 16, requires_grad=True)
    fast = compiled(model, policy=PRODUCTS)
    y = fast(x)
    acme.licence["products"] = False
    with pytest.raises(KernelError, match=r"acme\.product raised .*no licence.* cannot be repeated: the backward pass.*not planned again"):
        y.sum().backward()
    assert [value["kernel"] for value in quarantined().values()] == ["acme.product"]
    compiled(model, policy=PRODUCTS)(x).sum().backward()
    assert "acme.product" not in kernels()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, model[0].weight.sum(0).expand(3, 16))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = linear(16, 16)[0]
        self.register_buffer("calls", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.linear(x) + self.calls


def test_a_graph_that_writes_its_inputs_is_not_run_twice() -> None:
    model, x = Counting().eval(), torch.randn(3, 16)
    fast = compiled(model, policy=ACME)
    acme.licence["valid"] = False
    with torch.no_grad(), pytest.raises(KernelError, match=r"acme\.linear raised.*cannot be repeated: the graph writes into its inputs"):
        fast(x)
    assert len(quarantined()) == 1
    model.calls.zero_()
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, policy=ACME)(x), model.linear(x) + 1)
    assert "acme.linear" not in kernels()


def test_a_policy_that_forbids_eager_forbids_it_as_a_fallback() -> None:
    model, x = linear(16, 16), torch.randn(3, 16)
    fast = compiled(model, policy={"lock": [{"op": "linear", "kernel": "acme.linear"}]})
    acme.licence["valid"] = False
    with torch.no_grad(), pytest.raises(KernelError, match="the policy forbids the reference"):
        fast(x)


def test_what_eager_raises_too_is_the_inputs_fault() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.linear = nn.Embedding(8, 16), linear(16, 16)

        def forward(self, ids: Tensor) -> Tensor:
            return self.linear(self.table(ids))

    model = Lookup().eval()
    fast = compiled(model, policy=ACME)
    with torch.no_grad():
        fast(torch.tensor([1, 2]))
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            fast(torch.tensor([1, 99]))
        assert not quarantined()
        torch.testing.assert_close(fast(torch.tensor([3, 4])), model(torch.tensor([3, 4])))
    assert kernels() == ["acme.linear"]


def test_running_out_of_memory_is_no_ones_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = compiled(linear(16, 16), policy=ACME)
    monkeypatch.setattr(acme, "_lib", None)
    acme.licence["valid"] = False
    monkeypatch.setattr(acme, "RuntimeError", torch.OutOfMemoryError, raising=False)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        fast(torch.randn(3, 16))
    assert not quarantined()


@pytest.mark.slow
def test_where_nobody_can_be_named_the_graph_is_given_up() -> None:
    """Inductor's C++ wrapper leaves no line of Python that names the call: the next process runs the graph by TorchInductor alone."""
    model, x = linear(16, 16), torch.randn(3, 16)
    acme.licence["valid"] = False
    with torch.no_grad(), inductor.patch(cpp_wrapper=True), pytest.warns(UserWarning, match="its compiled code raised RuntimeError"):
        torch.testing.assert_close(compiled(model, policy=ACME)(x), model(x))
    assert not quarantined()
    calls = acme.licence["calls"]
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, policy=ACME)(x), model(x))
    assert RECORDS[-1].winner == INDUCTOR
    assert "an earlier process: graph" in str(lz.explain())
    assert acme.licence["calls"] == calls


def test_later_calls_are_watched_too() -> None:
    """Far beyond the first calls, once, whatever a library raises; the reference's own errors are the caller's."""
    calls: list[Exception] = []

    def run(x: int) -> int:
        if x > 50:
            raise KeyError("no such key")
        return x

    def rescue(error: Exception, args: tuple[Any, ...]) -> int:
        calls.append(error)
        return -1

    def reference(x: int) -> int:
        return 100 // (x - 70)

    watched = circuit.guarded(run, rescue, reference)
    assert [watched(i) for i in range(53)] == [*range(51), -1, 100 // (52 - 70)]
    with pytest.raises(ZeroDivisionError):
        watched(70)
    assert [type(error) for error in calls] == [KeyError]


@pytest.mark.parametrize("race", [False, True])
def test_a_kernel_that_raises_in_a_late_call(race: bool) -> None:
    model, x = linear(16, 16), torch.randn(3, 16)
    fast = compiled(model, policy=ACME, race=race)
    with torch.no_grad():
        for _ in range(60):
            fast(x)
        assert "acme.linear" in kernels() or RECORDS[-1].winner != PLANNED
        record, calls = RECORDS[-1], acme.licence["calls"]
        acme.licence["valid"] = False
        if record.winner == PLANNED:
            with pytest.warns(UserWarning, match="licence has expired"):
                torch.testing.assert_close(fast(x), model(x))
            assert [value["kernel"] for value in quarantined().values()] == ["acme.linear"]
            assert acme.licence["calls"] == calls + 1
        torch.testing.assert_close(fast(x), model(x))


def test_a_late_backward_is_watched() -> None:
    model, x = linear(16, 16), torch.randn(3, 16, requires_grad=True)
    fast = compiled(model, policy=PRODUCTS)
    for _ in range(20):
        fast(x).sum().backward()
    acme.licence["products"] = False
    y = fast(x)
    with pytest.raises(KernelError, match=r"acme\.product raised .*cannot be repeated: the backward pass"):
        y.sum().backward()
    assert [value["kernel"] for value in quarantined().values()] == ["acme.product"]


def test_a_cached_backward_of_a_forward_compiled_anew_is_watched(tmp_path: Path) -> None:
    """Inductor's cache may have lost one of two graphs."""

    def step() -> Tensor:
        torch._dynamo.reset()
        return compiled(linear(16, 16), policy=PRODUCTS, deterministic=True)(torch.randn(3, 16, requires_grad=True)).sum()

    with torch._inductor.utils.fresh_cache(dir=str(tmp_path)), torch._functorch.config.patch(enable_autograd_cache=False):
        for _ in range(2):  # plans, and fills the cache
            step().backward()
        forward, _ = sorted(tmp_path.glob("*/fxgraph/*/*"), key=lambda entry: entry.stat().st_mtime_ns)
        shutil.rmtree(forward)
        y = step()
        assert [plan.kind for plan in RECORDS[-1].plans] == ["forward", "backward"]
        acme.licence["products"] = False
        hits = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"]
        with pytest.raises(KernelError, match=r"acme\.product is not planned again"):
            y.backward()
        assert torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"] == hits + 1
    assert [value["kernel"] for value in quarantined().values()] == ["acme.product"]


CACHED_STEP = """
import sys, acme, torch
from torch._dynamo.utils import counters
from lz_compiler.errors import KernelError
from lz_compiler.options import Options
from lz_compiler.timings import open_store
from lz_compiler.trust import failures
policy = {"prefer": [{"kernel": "acme.product", "factor": 0.001}]}
options = {"race": False, "cost_model": "roofline", "policy": policy, "deterministic": True}
model, x = torch.nn.Linear(16, 16), torch.randn(3, 16, requires_grad=True)
y = torch.compile(model, backend="layerzero", options=options)(x)
hits, planned = counters["aot_autograd"]["autograd_cache_hit"], counters["layerzero"]["plans"]
if len(sys.argv) > 1:
    acme.licence["products"] = False
try:
    y.sum().backward()
    print(hits, planned, "ran")
except KernelError as error:
    refused = open_store(Options.resolve().cache_dir).get_records(failures.KIND)
    print(hits, planned, error, [value["kernel"] for value in refused.values()])
"""


@pytest.mark.slow
def test_a_backward_from_autograds_cache_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes: one plans, one fills torch's caches, and in one, for which nothing is compiled, the kernel raises."""
    # Keys of torch's caches that no other run has, rather than a folder: in a new one torch first tries which instructions work.
    env = {**os.environ, "TORCH_COMPILE_CACHE_KEY_TAG": str(tmp_path), "LAYERZERO_CACHE_DIR": str(tmp_path / "facts")}
    env["PYTHONPATH"] = os.pathsep.join([*filter(None, sys.path), str(Path(__file__).parent)])
    shutil.copytree(os.environ["LAYERZERO_CACHE_DIR"], env["LAYERZERO_CACHE_DIR"])

    def step(*args: str) -> str:
        ran = subprocess.run([sys.executable, "-c", CACHED_STEP, *args], env=env, capture_output=True, text=True, timeout=300, check=False)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    assert [step() for _ in range(2)] == ["0 1 ran", "0 0 ran"]
    said = step("raise")
    assert said.startswith("1 0 graph 0/0: acme.product raised RuntimeError: acme: no licence for products. The call cannot be repeated")
    assert said.endswith("['acme.product']")
