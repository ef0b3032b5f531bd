"""The page of a report: structure, escaping and size without a browser, and what it does in a real one."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_cli import fails, run
from torch import nn

import lz_compiler as lz
from lz_compiler import backend, zoo
from lz_compiler.capture import GraphView
from lz_compiler.errors import OptionError, PlanError
from lz_compiler.plan_io import load_problem, plan_from_dict, plan_to_dict, save_problem
from lz_compiler.planner import check, solve
from lz_compiler.planning import make_plan
from lz_compiler.reports.compare import Decision, both_sides, changes, compare_files, what_if, what_if_plan
from lz_compiler.reports.drawing import drawing, identity
from lz_compiler.reports.report import runner_up_text
from lz_compiler.types import Candidate, Choice, Conversion, Cost, Format, Plan, Problem, Region, Rejection, Status

EVIL = "</script><img src=x onerror=alert(1)><!--"
ROWS, FUSED, BF16 = Format("strided", "float32"), Format("fused", "float32"), Format("strided", "bfloat16")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def layered(layers: int, kernel: str = "onednn.linear") -> Plan:
    """Layers of norm (a loop), two equal products, attention in bfloat16 behind a conversion; a norm, a head."""
    choices: list[Choice] = []
    conversions: list[tuple[Conversion, Cost]] = []

    def add(op: str, name: str, kernel: str, ns: int, after: tuple[int, ...], read: Format = ROWS, **more: Any) -> int:
        region = Region(op, (f"{name}_in", name), (f"of_{name}",), (name,))
        params = (("mask", more.pop("mask", None)),)
        own, other = Candidate(kernel, region, (read,), (ROWS,), params=params, key=op), Candidate("aten.mm", region, (read,), (ROWS,))
        rejected = () if kernel == "inductor.loop" else (Rejection("mkl.linear_packed", "weight_not_frozen", f"needs freeze=True {EVIL}"),)
        choices.append(Choice(own, Cost(ns, "measured", 7), ((other, Cost(ns + 500, "measured")),), rejected, after=after, **more))
        return len(choices) - 1

    last = add("embedding", "embed", "inductor.loop", 100, ())
    for i in range(layers):
        norm = add("mul", f"norm_{i}", "inductor.loop", 40, (last,))
        conversions.append((Conversion(f"norm_{i}", ROWS, FUSED), Cost(60 if i else 90, "roofline")))
        q, k = (add("linear", f"{name}_{i}", kernel, 9000, (norm,), flops=10**6, nbytes=4000) for name in "qk")
        conversions.append((Conversion(f"of_attend_{i}", ROWS, BF16), Cost(300, "roofline")))
        last = add("attention", f"attend_{i}", "aten.sdpa", 5000, (q, k), BF16, mask="causal", flops=10**5, nbytes=8000)
    last = add("mul", "norm_out", "inductor.loop", 40, (last,))
    add("linear", "head", "onednn.linear", 20000, (last,), flops=10**6, nbytes=10**5)
    total = sum(c.cost.ns for c in choices) + sum(c.ns for _, c in conversions)
    return Plan(
        fingerprint="f", kind="inference", environment={"device": "cpu"}, choices=tuple(choices), conversions=tuple(conversions),
        objective=total, bound=total, status=Status.OPTIMAL, solver="cp_sat", epsilon=0.0, plan_s=0.1,
        peaks={"bandwidth": 1e10, "float32": 2e11, "bfloat16": 4e11},
    )  # fmt: skip


def embedded(page: str) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


# --- what is drawn --------------------------------------------------------------------------------------------------------


def test_repeated_layers_are_one_block() -> None:
    rows = lz.explain(layered(32)).data["rows"]
    assert [r.get("repeat", r.get("kind")) for r in rows] == ["loop", 32, "region"]
    block = rows[1]
    products = block["rows"][0]
    assert products["repeat"] == 2  # q and k
    assert products["rows"][0]["names"][:4] == ["q_0", "k_0", "q_1", "k_1"]
    assert products["rows"][0]["total_ns"] == 64 * 9000
    kinds = [r.get("kind") for r in block["rows"]]
    assert sorted(k for k in kinds if k) == ["conversion", "loop", "region"]
    conversion, attention = kinds.index("conversion"), kinds.index("region")
    assert conversion + 1 == attention  # where it happens
    assert block["rows"][conversion]["src"] == "strided:float32"
    assert block["rows"][conversion]["dst"] == "strided:bfloat16"


def test_rows_account_for_the_whole_plan() -> None:
    for layers in (1, 2, 5):
        plan = layered(layers)

        def total(rows: list[dict[str, Any]]) -> int:
            return sum(total(r["rows"]) if "repeat" in r else r["total_ns"] for r in rows)

        assert total(lz.explain(plan).data["rows"]) == plan.predicted


def test_lines_between_rows() -> None:
    """Every row reads what its choices read; the first row of a block also what the repetition before it wrote."""
    plan = layered(3)
    rows: dict[str, dict[str, Any]] = {}

    def walk(items: list[dict[str, Any]]) -> None:
        for r in items:
            if "repeat" in r:
                walk(r["rows"])
            else:
                rows[r["names"][0]] = r

    walk(drawing(plan, {identity(c): i for i, c in enumerate(plan.choices)}))
    products, attention, head = rows["q_0"]["id"], rows["attend_0"], rows["head"]
    assert attention["from"] == [products]
    norm = rows["norm_1_in … norm_1" if "norm_1_in … norm_1" in rows else "norm_1_in"]
    assert norm["from"] == [attention["id"]]
    assert head["from"] == [norm["id"]]
    assert norm["id"] in rows["q_0"]["from"]  # of the layer before
    assert norm["id"] > products


def test_a_layer_that_differs_is_not_folded() -> None:
    plan = layered(4)
    at = next(i for i, c in enumerate(plan.choices) if c.candidate.region.outputs == ("attend_2",))
    odd = replace(plan.choices[at], candidate=replace(plan.choices[at].candidate, kernel="aten.sdpa_math"))
    rows = lz.explain(replace(plan, choices=(*plan.choices[:at], odd, *plan.choices[at + 1 :]))).data["rows"]
    assert max(r.get("repeat", 1) for r in rows) == 2
    assert "aten.sdpa_math" in str(lz.explain(replace(plan, choices=(odd,))))


def test_floor_and_candidates() -> None:
    regions = {r["op"]: r for r in lz.explain(layered(1)).data["regions"] if r["nodes"] != ["head_in", "head"]}
    assert regions["linear"]["floor_ns"] == 5000  # 1e6 flop at 2e11 flop/s; 4000 bytes take 400 ns
    assert regions["attention"]["floor_ns"] == 800  # 8000 bytes at 1e10 bytes/s
    (other,) = regions["linear"]["candidates"]
    assert (other["kernel"], other["cost_ns"], other["same_region"]) == ("aten.mm", 9500, True)
    old = plan_to_dict(layered(1))
    old = json.loads(json.dumps(old))
    for choice in old["choices"]:
        del choice["flops"], choice["nbytes"], choice["after"]
    del old["peaks"]
    older = lz.explain(plan_from_dict(old))
    assert {r["floor_ns"] for r in older.data["regions"]} == {None}
    assert "<main" in older.html()


def test_plan_with_work_survives_json() -> None:
    plan = layered(2)
    assert plan_from_dict(json.loads(json.dumps(plan_to_dict(plan)))) == plan


# --- the page -------------------------------------------------------------------------------------------------------------


def test_page_is_one_file_and_small(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    for layers in (32, 128):
        lz.explain(layered(layers)).to_html(path)
        page = path.read_text(encoding="utf-8")
        assert len(page.encode()) < 200_000
        assert embedded(page)["data"]["rows"] == json.loads(lz.explain(layered(layers)).to_json())["rows"]
        assert not re.search(r'(src|href)="(?!data:)', page)
        outside = set(re.findall(r"https?://[^\s\"'`]+", page))
        assert outside == {"http://www.w3.org/2000/svg"}  # a name, not an address
        assert "innerHTML" not in page
        assert "document.write" not in page
    with pytest.raises(PlanError, match="cannot write the page"):
        lz.explain(layered(1)).to_html(tmp_path / "nowhere" / "page.html")


def test_names_are_no_markup() -> None:
    page = lz.explain(replace(layered(2), notes=(EVIL,), solver=EVIL)).html()
    assert page.count("</script>") == 2
    assert "<img" not in page
    assert page.count("<!--") == 0
    assert embedded(page)["data"]["notes"] == [EVIL]


def test_displays_itself_in_a_notebook() -> None:
    frame = lz.explain(layered(1))._repr_html_()
    assert frame.startswith("<iframe sandbox=")
    assert "<script" not in frame  # escaped, in srcdoc
    assert frame.count('"') == 6


def in_browser(folder: Path, page: str, look: str) -> dict[str, Any]:
    """What the script `look` wrote into `seen`, in a page that was drawn without an error."""
    probe = f"""<script>
const event = key => new KeyboardEvent("keydown", {{ key, bubbles: true, cancelable: true }});
const press = (key, at) => (at || document.activeElement).dispatchEvent(event(key));
const find = text => {{ $("search").value = text; search(); return count(".row:not(.head):not(.hidden)"); }};
const count = what => document.querySelectorAll(what).length, picked = () => document.querySelector("[aria-selected=true]").innerText;
const seen = {{ ready: performance.now() }};
{look}
document.body.replaceChildren(document.createTextNode("SEEN" + JSON.stringify(seen) + "NEES"));
</script>"""
    (folder / "page.html").write_text(page.replace("</body>", probe + "</body>"), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    command = [str(CHROMIUM), *flags.split(), "--disable-sync", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", (folder / "page.html").as_uri()], capture_output=True, text=True, check=False, timeout=120
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    text = done.stdout.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    found = re.search("SEEN(.*)NEES", text, re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    seen: dict[str, Any] = json.loads(found[1])
    return seen


@pytest.mark.skipif(shutil.which("node") is None and CHROMIUM is None, reason="neither node nor Chromium: the page's script is not run")
def test_script_runs(tmp_path: Path) -> None:
    plan = layered(32)
    page = lz.explain(replace(plan, notes=(EVIL,), peaks={**plan.peaks, "float8_e4m3fn": 8e11})).html()
    if shutil.which("node"):
        (tmp_path / "page.js").write_text(page.split("<script>")[1].split("</script>")[0])
        done = subprocess.run(["node", "--check", str(tmp_path / "page.js")], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    if CHROMIUM is None:
        return
    seen = in_browser(tmp_path, page, """
Object.assign(seen, { rows: count(".row:not(.head)"), images: document.images.length, edges: count("#edges path"), dots: count(".dot") });
seen.roofs = [...document.querySelectorAll("svg text")].map(e => e.textContent).filter(t => t.includes("not used"));
seen.notes = [...document.querySelectorAll(".note")].map(e => e.textContent).filter(t => t.includes("would lower"));
press("/", document.body); seen.search = document.activeElement.id;
seen.layer = find("layer 7 sdpa"); seen.hits = find("attend_7 sdpa");
press("Enter"); seen.hit = picked(); seen.details = $("details").innerText;
press("Escape", $("search")); press("Home"); seen.home = picked(); press("ArrowDown"); seen.down = picked();
seen.focus = document.activeElement.id; press("Enter"); seen.entered = document.activeElement.id;
press("Escape"); seen.back = document.activeElement.id;""")  # fmt: skip
    assert seen["rows"] <= 8  # 32 layers are folded
    assert seen["ready"] < 2000  # ms from the start of loading until everything is drawn
    assert seen["search"] == "search"
    assert seen["layer"] == seen["hits"] == 1
    assert "aten.sdpa" in seen["hit"]
    for words in ("causal", "Runner-up aten.mm", "weight_not_frozen", "needs freeze=True", "8: attend_7", "layer 7"):
        assert words in seen["details"]
    assert seen["home"] != seen["down"]
    assert (seen["focus"], seen["entered"]) == (seen["back"], "details")
    assert seen["images"] == 0
    assert seen["edges"] > 4
    assert seen["dots"] == 3
    assert seen["roofs"] == ["float8_e4m3fn 800 GF/s, not used"]
    # 64 products of 1e6 flop: 5000 ns at 2e11, 2500 at 4e11 flop/s; the head's 1e5 bytes take 10000 ns, half of that in bfloat16.
    # Attention is in bfloat16 already; its 8000 bytes would be 4000.
    assert seen["notes"] == [
        f"{dtype} would lower the floor of {kernels} kernels from {now} µs to {then} µs. "
        f"With kernels as far from it as now: {less} µs less, {part} % of the plan."
        for dtype, kernels, now, then, less, part in (
            ("bfloat16", 65, "330.0", "165.0", "298.0", 39), ("float8_e4m3fn", 97, "355.6", "95.30", "527.0", 69),
        )
    ]  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="the page is not drawn without Chromium")
def test_the_page_of_a_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 layers of a Llama: small, quick, and each layer is found by its number and by its modules."""
    model, args, _ = zoo.llama32()
    found: list[Plan] = []

    class Planned(BaseException):  # what Dynamo would wrap is an Exception
        """Raised instead of compiling, which takes minutes."""

    def plan(graph: Any, options: Any, target: Any, store: Any, frozen: Any, *_: Any) -> None:
        found.append(make_plan(GraphView(graph, frozen), options, target, store, fingerprint="llama", kind="inference"))
        raise Planned

    monkeypatch.setattr(backend, "plan_and_apply", plan)
    compiled = lz.compile(model, cost_model="roofline", race=False, freeze=True, solve_budget_s=60.0)
    with torch.no_grad(), pytest.raises(Planned):
        compiled(*args)
    page = lz.explain(found[0]).html()
    assert len(page.encode()) < 2_000_000
    seen = in_browser(tmp_path, page, """
seen.rows = count(".row:not(.head)"); seen.layer = find("layer 3 attention");
seen.q = find("blocks.3.attention.q"); seen.none = find("layer 32");
seen.down = find("layer 31 mlp.down"); press("Enter", $("search")); seen.hit = picked();
seen.details = $("details").innerText;""")  # fmt: skip
    assert seen["ready"] < 2000
    assert seen["rows"] < 60
    assert (seen["q"], seen["down"], seen["none"]) == (1, 1, 0)
    assert seen["layer"] >= 3  # q, k and v; attention; o
    assert "blocks.*.mlp.down" in seen["hit"]
    assert "blocks.31.mlp.down" in seen["details"]


def in_terminal(report: Any, width: int = 100) -> str:
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as shown:
        console.print(report)
    return shown.get()


def test_tables_of_a_terminal() -> None:
    shown = in_terminal(lz.explain(replace(layered(3), notes=("[red]no markup[/red]",))))
    assert max(map(len, shown.splitlines())) <= 100
    (products,) = [line.split() for line in shown.splitlines() if " linear " in line and "6x" in line]
    assert products == ["6x", "linear", "onednn.linear", "0.009", "56%", "measured", "aten.mm", "+0.001", "1"]
    assert "mask of 3x attention: causal" in shown
    assert "3x conversion strided:float32 -> strided:bfloat16" in shown
    assert "[red]no markup[/red]" in shown
    changed = what_if(chain(), ["deny=cublas"])
    assert max(map(len, in_terminal(changed).splitlines())) <= 100
    assert "cublas.merged block=64" in " ".join(in_terminal(changed, 200).split())


# --- two plans, and what if -----------------------------------------------------------------------------------------------


def test_changes_are_grouped_by_what_they_are() -> None:
    old = [Decision((f"mm_{i}",), "linear", "aten.mm", "", 10, "measured") for i in range(4)]
    new = [Decision(("mm_0", "gelu_0"), "linear + gelu", "onednn.linear", "", 7, "measured"), *old[1:3], replace_kernel(old[3])]
    found = changes(old, new)
    assert [(c["count"], c["nodes"], [d["kernel"] for d in c["after"]], c["ns"]) for c in found] == [
        (1, "mm_0", ["onednn.linear"], [10, 7]), (1, "mm_3", ["mkl.linear"], [10, 10]),
    ]  # fmt: skip
    assert changes(old, [d._replace(ns=20) for d in old]) == []
    assert changes(old, [])[0]["count"] == 4
    (grown,) = changes([new[0]], [new[0]._replace(nodes=("mm_0", "gelu_0", "mul_0"))])
    assert both_sides(grown) == [[("onednn.linear (2 nodes)", 7)], [("onednn.linear (3 nodes)", 7)]]
    parts = [Decision((f"mm_{i}",), "linear", "aten.mm", "", 10, "measured") for i in range(3)]
    merged = Decision(("mm_0", "mm_1", "mm_2"), "merged_linear", "mkl.merged", "", 20, "measured")
    assert both_sides(changes(parts, [merged])[0]) == [[("3x aten.mm", 30)], [("mkl.merged", 20)]]


def test_another_dtype_is_another_decision(tmp_path: Path) -> None:
    """The same kernel in bfloat16: told in the text, the tables and on the page."""
    plans = [layered(3), layered(3)]
    narrow = [
        replace(c, candidate=replace(c.candidate, in_formats=(BF16,), out_formats=(BF16,)), cost=Cost(4000, "measured"))
        if c.candidate.kernel == "onednn.linear" else c for c in plans[1].choices
    ]  # fmt: skip
    plans[1] = replace(plans[1], choices=tuple(narrow))
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, plan in zip(files, plans, strict=True):
        file.write_text(lz.explain(plan).to_json())
    report = compare_files(*files)
    assert [(c["count"], c["before"][0]["kernel"], c["after"][0]["kernel"]) for c in report.data["diff"]["graphs"][0]["changes"]] == [
        (6, "onednn.linear", "onednn.linear"), (1, "onednn.linear", "onednn.linear"),
    ]  # fmt: skip
    told = "onednn.linear (strided:float32 > strided:float32) -> onednn.linear (strided:bfloat16 > strided:bfloat16)"
    assert told in str(report)
    assert "bfloat16" in in_terminal(report)


def replace_kernel(decision: Decision) -> Decision:
    return decision._replace(kernel="mkl.linear")


def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, kernel in zip(files, ("onednn.linear", "aten.mm"), strict=True):
        file.write_text(lz.explain(layered(3, kernel)).to_json())
    shown = run("diff", *map(str, files), "--html", str(tmp_path / "d.html"))
    assert shown.exit_code == 0, shown.output
    assert "6x linear (q_0): onednn.linear -> aten.mm" in shown.stdout
    data = json.loads(run("diff", *map(str, files), "--json").stdout)["diff"]["graphs"][0]
    assert [c["count"] for c in data["changes"]] == [6]
    assert embedded((tmp_path / "d.html").read_text())["data"]["diff"]["graphs"][0] == data
    assert (data["conversions"], data["conversions_ns"]) == ([], [900, 900])  # the same three in both
    assert "prices_ns" in data
    same = run("diff", str(files[0]), str(files[0]))
    assert "0 decisions differ" in same.stdout
    (tmp_path / "c.json").write_text('{"rows": 3}')
    assert "neither a plan" in fails(capsys, monkeypatch, "diff", str(files[0]), str(tmp_path / "c.json"))
    assert "cannot read" in fails(capsys, monkeypatch, "diff", str(files[0]), str(tmp_path / "none.json"))


def test_a_diff_says_what_else_differs(tmp_path: Path) -> None:
    """Other options, another device: said before the decisions are compared."""
    model, x = nn.Linear(8, 8).eval(), torch.ones(4, 8)
    plans = [lz.solve(model, (x,), cost_model="roofline", race=False, freeze=freeze) for freeze in (False, True)]
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    plans[1] = replace(plans[1], cells=tuple(
        replace(c, plans=tuple(replace(p, environment={**p.environment, "name": "another CPU"}) for p in c.plans)) for c in plans[1].cells
    ))  # fmt: skip
    for file, plan in zip(files, plans, strict=True):
        plan.save(file)
    report = compare_files(*files)
    settings = report.data["diff"]["graphs"][0]["settings"]
    assert [row[0] for row in settings] == ["name", "freeze"]
    assert settings[1] == ["freeze", "false", "true"]
    assert "freeze: false -> true" in str(report)
    assert "another CPU" in in_terminal(report, 200)
    assert compare_files(files[0], files[0]).data["diff"]["graphs"][0]["settings"] == []


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    model, x = nn.Linear(8, 8).eval(), torch.ones(4, 8)
    asked = {"race": False, "freeze": True, "cache_dir": str(tmp_path)}
    bare = lz.solve(model, (x,), measure_budget_s=0.0, **asked)
    assert run("cache", "clear", "verdict", "--cache-dir", str(tmp_path)).stdout == "1 removed\n"
    full = lz.solve(model, (x,), measure_budget_s=60.0, **asked)
    (note,) = bare.cells[0].plans[0].notes
    count = re.fullmatch(
        r"(\d+) of (\d+) kernels are not measured: raise measure_budget_s, and plan again after `lz cache clear verdict`", note
    )
    assert count
    assert count[1] == count[2] > "1"
    assert ", 0% of it measured" in str(lz.explain(bare))
    assert not full.cells[0].plans[0].notes
    assert ", 0% of it measured" not in str(lz.explain(full))


class Window(nn.Module):
    """Attention that sees eight keys back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        place = torch.arange(x.shape[-2])
        apart = place[:, None] - place
        mask = torch.where((apart >= 0) & (apart < 8), 0.0, float("-inf"))
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def test_a_kept_mask_tells_what_was_proved_of_it() -> None:
    model, x = Window(), torch.randn(1, 2, 32, 16)
    with torch.no_grad():
        compiled = lz.compile(model, cost_model="roofline", race=False)
        torch.testing.assert_close(compiled(x), model(x))
    (attention,) = [r for r in lz.explain(compiled).data["graphs"][0]["plans"][0]["regions"] if r["op"] == "attention"]
    assert attention["reads_mask"]
    refused = {r["kernel"]: r["detail"] for r in attention["rejections"] if r["code"] == "mask"}
    assert refused["aten.flash_attention_cpu"] == "is_causal cannot say this predicate; proved: causal, window 8; no empty rows"


def chain() -> Problem:
    """Two tied products and a sink; the cheap kernel writes bfloat16, which must be converted back."""
    candidates, costs, conversions = [], [], []
    for i in (1, 2):
        region = Region("linear", (f"mm_{i}",), (f"t{i - 1}",), (f"t{i}",))
        candidates += [
            Candidate("cublas.merged", region, (ROWS,), (BF16,), 1e-3, params=(("variant", (("block", 64),)),)),
            Candidate("aten.mm", region, (ROWS,), (ROWS,)),
        ]
        costs += [Cost(10, "measured", 2), Cost(50, "measured")]
        conversions.append(Conversion(f"t{i}", BF16, ROWS))
    return Problem(
        tuple(candidates), tuple(costs), tuple(conversions), (Cost(5, "roofline"),) * 2, frozenset({("t0", ROWS)}), (("t2", ROWS),),
        error_budget=0.1, memory_limit=100, candidate_class=(0, 1, 0, 1), tensor_class={"t1": 0, "t2": 0},
    )  # fmt: skip


def test_problem_round_trip(tmp_path: Path) -> None:
    path, problem = tmp_path / "p.problem.json", chain()
    save_problem(problem, path)
    assert load_problem(path) == problem
    solution = solve(load_problem(path))
    assert (solution.objective, check(problem, solution)) == (30, [])
    good = json.loads(path.read_text())
    for change in (
        {"layerzero_problem": 9},
        {"costs": []},
        {"candidates": 3},
        {"sinks": [["t"]]},
        {"candidate_class": [1]},
        {"conversions": None},
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(PlanError, match=r"schema 9|damaged"):
            load_problem(path)
    path.write_text(json.dumps(good | {"costs": [{**c, "ns": -1} for c in good["costs"]]}))
    with pytest.raises(PlanError, match="-1 ns"):
        load_problem(path)
    with pytest.raises(PlanError, match="cannot read"):
        load_problem(tmp_path / "none.problem.json")
    with pytest.raises(PlanError, match="cannot write"):
        save_problem(problem, tmp_path / "nowhere" / "p.json")


def test_what_if(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for rule in ("deny=cublas", "deny=cublas.merged", "lock=aten.mm"):
        graph = what_if(chain(), [rule]).data["diff"]["graphs"][0]
        assert graph["objective_ns"] == [30, 100]
        assert (graph["prices_ns"], graph["conversions_ns"]) == ([20, 100], [10, 0])
        assert graph["conversions"] == [{"kind": "strided:bfloat16 -> strided:float32", "count": [2, 0], "ns": [10, 0]}]
        assert [(c["count"], c["before"][0]["kernel"], c["after"][0]["kernel"]) for c in graph["changes"]] == [
            (2, "cublas.merged", "aten.mm")
        ]
    assert what_if(chain(), ["deny=aten.mm"]).data["diff"]["graphs"][0]["changes"] == []
    with pytest.raises(OptionError, match="leaves no plan"):
        what_if(chain(), ["deny=aten", "deny=cublas"])
    file = str(tmp_path / "p.problem.json")
    save_problem(chain(), file)
    shown = run("explain", file, "--what-if", "deny=cublas", "--html", str(tmp_path / "w.html"))
    assert shown.exit_code == 0, shown.output
    assert "2x linear (mm_1): cublas.merged block=64 (float32 > bfloat16) -> aten.mm (float32)" in shown.stdout
    assert "conversions strided:bfloat16 -> strided:float32: 2 -> 0" in shown.stdout
    assert "kernels 0.000 ms -> 0.000 ms; conversions " in shown.stdout
    assert (tmp_path / "w.html").stat().st_size < 100_000
    for rules, told in (
        ([], "needs --what-if"),
        (["--what-if", "avoid=cublas"], "is neither deny"),
        (["--what-if", "deny=cublass"], "'cublas'"),
    ):
        assert told in fails(capsys, monkeypatch, "explain", file, *rules)


def test_solve_writes_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lz_html_models.py").write_text("import torch\ndef m(): return torch.nn.Linear(8, 8).eval(), (torch.ones(4, 8),), {}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["solve", "lz_html_models:m", "plan.json", "--problems", "new/folder", "-o", "cost_model=roofline", "-o", "race=false"]
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    (file,) = (tmp_path / "new" / "folder").glob("*.problem.json")
    problem, plan = load_problem(file), lz.load_plan("plan.json")
    assert solve(problem).objective == plan.cells[0].plans[0].objective
    moved = run("explain", "plan.json", "--problems", "new/folder", "--what-if", "lock=aten", "--json")
    assert moved.exit_code == 0, moved.output
    (graph,) = json.loads(moved.stdout)["diff"]["graphs"]
    assert (graph["label"], graph["objective_ns"][0]) == ("the given shapes", solve(problem).objective)
    assert "problems/" in fails(capsys, monkeypatch, "explain", "plan.json", "--what-if", "deny=aten")
    assert run(*arguments, "-o", "layout_mode=strict", "-o", "error_budget=0.1").exit_code == 0  # another solve, the same folder
    assert load_problem(file) == problem
    (held,) = what_if_plan(plan, "new/folder", ["lock=aten"]).data["diff"]["graphs"]
    assert held["objective_ns"] == graph["objective_ns"]
    (cell,) = plan.cells
    bare = replace(plan, cells=(replace(cell, plans=(replace(cell.plans[0], problem=""),)),))
    with pytest.raises(PlanError, match="solved without its problem"):
        what_if_plan(bare, "new/folder", ["lock=aten"])
    dearer = replace(plan, cells=(replace(cell, plans=(replace(cell.plans[0], objective=10**9),)),))
    assert "the plan itself has 1000.000 ms" in str(what_if_plan(dearer, "new/folder", ["lock=aten"]))
    shown = run("explain", "plan.json", "--html", "page.html")
    assert shown.exit_code == 0, shown.output
    (choice,) = embedded((tmp_path / "page.html").read_text())["data"]["cells"][0]["plans"][0]["regions"]
    assert choice["floor_ns"] <= choice["cost_ns"]
    assert choice["flops"] == 2 * 4 * 8 * 8


def test_a_lock_says_what_it_leaves() -> None:
    """A region around the locked one is another region: the lock does not forbid it, and the note says that it stays."""
    region = Region("merged", ("mm_1", "mm_2"), ("t0",), ("t2",))
    problem = chain()
    wide = Candidate("onednn.merged", region, (ROWS,), (ROWS,))
    wider = replace(
        problem, candidates=(*problem.candidates, wide), costs=(*problem.costs, Cost(15, "measured")), candidate_class=(0, 1, 0, 1, 2)
    )
    (graph,) = what_if(wider, ["lock=aten"]).data["diff"]["graphs"]
    assert "lock=aten holds for the regions that aten has kernels for: 1x onednn.merged stay in others that overlap these" in graph["note"]
    assert "stay" not in what_if(problem, ["lock=aten"]).data["diff"]["graphs"][0]["note"]


def test_runner_up_does_the_same_work() -> None:
    """Another kernel for the same nodes, or several that cover them between them: their prices as a sum."""

    def one(kernel: str, nodes: tuple[str, ...], ns: int, read: Format = ROWS) -> tuple[Candidate, Cost]:
        return Candidate(kernel, Region("linear", nodes, ("x",), (nodes[-1],)), (read,), (ROWS,)), Cost(ns, "measured")

    def told(*others: tuple[Candidate, Cost], nodes: tuple[str, ...] = ("q", "k")) -> tuple[str, int]:
        report = lz.explain(replace(layered(0), choices=(Choice(*one("mkl.merged", nodes, 100), tuple(others)),))).data
        up = report["regions"][0]["runner_up"]
        return (runner_up_text(up), up["cost_ns"]) if up else ("", 0)

    q, k = one("onednn.linear", ("q",), 60), one("onednn.linear", ("k",), 70)
    assert told(q, k, one("aten.mm", ("q",), 90), one("mkl.wider", ("q", "k", "v"), 10)) == ("2x onednn.linear", 130)
    assert told(one("aten.merged", ("q", "k"), 120), q, k) == ("aten.merged", 120)
    assert told(one("aten.merged", ("q", "k"), 140), q, k) == ("2x onednn.linear", 130)
    assert told(one("mkl.merged", ("q", "k"), 140, BF16)) == ("mkl.merged in bfloat16", 140)
    assert told(one("onednn.linear", ("q",), 60), nodes=("q", "gelu")) == ("onednn.linear, without 1 fused node", 60)
    assert told(one("mkl.wider", ("q", "k", "v"), 10)) == ("", 0)


# --- profiled -------------------------------------------------------------------------------------------------------------


def test_a_profile_gives_each_region_its_own_time() -> None:
    """One operator for all products, which differ by size only: their order tells them apart."""
    torch.manual_seed(0)
    sizes = (64, 64, 1024, 1024, 64)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b)) for a, b in itertools.pairwise(sizes))).eval()
    x = torch.randn(256, 64)
    with torch.no_grad():
        compiled = lz.compile(
            model, freeze=True, race=False, cost_model="roofline", policy={"lock": [{"kernel": "mkl.linear_packed", "op": "linear"}]}
        )
        compiled(x)
        with pytest.raises(OptionError, match="nothing to profile"):
            lz.explain(nn.Linear(2, 2), profile=lambda: None)
        # Of several profiles, since each may be held up anywhere by what else the machine does.
        reports = [lz.explain(compiled, profile=lambda: compiled(x)) for _ in range(5)]
    report = reports[-1]
    (graph,) = report.data["graphs"]
    (plan,) = graph["plans"]
    timed = {r["nodes"][-1]: r["profiled_ns"] for r in plan["regions"]}
    assert {r["kernel"] for r in plan["regions"]} == {"mkl.linear_packed"}
    regions = zip(*(r.data["graphs"][0]["plans"][0]["regions"] for r in reports), strict=True)
    first, wide, largest, last = (min(r["profiled_ns"] for r in some) for some in regions)
    assert largest > max(wide, last)
    assert min(wide, last) > first > 0  # 1, 16, 256 and 16 units of work
    profiled = graph["profiled"]
    assert sum(timed.values()) == profiled["kernels_ns"] < profiled["call_ns"] + profiled["overhead_ns"]
    assert str(report).count("in a profiled call") == 4
    assert "in a call" in in_terminal(report)
    drawn = [r["profiled_ns"] for r in plan["rows"] if r["kind"] == "region"]
    assert drawn == list(timed.values())
    assert lz.explain(compiled).data["graphs"][0]["profiled"] == graph["profiled"]  # kept
