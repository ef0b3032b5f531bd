"""Cost models, baselines and the ablation, on the committed corpora: nothing is measured but by the one test that compiles."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import lz_compiler as lz
from lz_compiler import cli, planner, torch_private
from lz_compiler.backend import RECORDS
from lz_compiler.backends.base import SelectionContext
from lz_compiler.cost_models import Priced, cost_model, gaussian, learned
from lz_compiler.cost_models.constant import Constant
from lz_compiler.cost_models.hybrid import Hybrid
from lz_compiler.cost_models.inductor import Inductor
from lz_compiler.cost_models.learned import Forest, Learned
from lz_compiler.cost_models.roofline import Roofline
from lz_compiler.errors import ModelError, OptionError, PlanError
from lz_compiler.options import Options
from lz_compiler.research import ablate, ablate_report, corpus
from lz_compiler.research.corpus import Case
from lz_compiler.target import stored_target
from lz_compiler.timings import TimingStore
from lz_compiler.types import Candidate, Cost, Format, Rejection, Status, Target

CORPORA = Path(__file__).parents[1] / "benchmarks" / "corpora"
TIMES = ("price_s", "solve_s", "estimated_measure_s")


def case(name: str) -> Case:
    (path,) = CORPORA.rglob(f"{name}{corpus.SUFFIX}")
    return corpus.load(path)


@pytest.fixture(scope="module")
def small() -> list[Case]:
    return [case(n) for n in ("mlp_256x2", "bert_8x64_plain", "distilbert_2x96", "opt_1x64", "h200_bert_32x512")]


@pytest.fixture(scope="module")
def forest(small: list[Case]) -> Forest:
    pytest.importorskip("sklearn")
    return learned.fit(ablate.training_rows(small[:3]), members=3, trees=20)


def test_the_corpora_are_of_twenty_models_and_two_devices() -> None:
    names = [p.name for p in CORPORA.rglob(f"*{corpus.SUFFIX}")]
    assert len({n.split("_")[0] for n in names if not n.startswith("h200")}) >= 20
    assert sum(n.startswith("h200") for n in names) == 25
    assert sum(p.stat().st_size for p in CORPORA.rglob("*")) < 3 << 20


def test_a_case_survives_its_file(small: list[Case], tmp_path: Path) -> None:
    path = corpus.save(small[0], tmp_path)
    again = corpus.load(path)
    assert again == small[0]
    assert corpus.save(again, tmp_path).read_bytes() == path.read_bytes()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PlanError, match="Collect it again"):
        corpus.load(path)


@pytest.mark.parametrize("name", ["mlp_256x2", "bert_1x32", "resnet18_4x96", "h200_llama_decode_32x4096", "swin_1x224"])
def test_the_integer_program_is_never_worse_than_a_baseline(name: str) -> None:
    problem = case(name).problem
    best = planner.solve(problem, "cp_sat", 30.0)
    assert best.status is Status.OPTIMAL
    for solver in ("highs", "greedy", "lp_rounding", "one_layout", "priority", "local_search"):
        other = planner.solve(problem, solver, 30.0)
        assert other.chosen
        assert not planner.check(problem, other)
        assert other.objective >= best.objective >= other.bound


def test_json_trees_predict_what_scikit_learn_does(small: list[Case]) -> None:
    ensemble = pytest.importorskip("sklearn.ensemble")
    rows = ablate.training_rows(small)
    names = sorted({name for row in rows for name in row.features})
    x = [[row.features.get(name, 0.0) for name in names] for row in rows]
    model = ensemble.GradientBoostingRegressor(n_estimators=15, max_depth=4, learning_rate=learned.RATE, random_state=0)
    model.fit(x, [row.log_ratio for row in rows])
    trees = tuple(learned._tree(e.tree_) for e in model.estimators_[:, 0])
    forest = Forest(tuple(names), ((0.0, 64.0),) * len(names), ((float(model.init_.predict(x[:1])[0]), trees),), (1.0, 0.0, 1.0), "")
    for row, expected in zip(rows, model.predict(x), strict=True):
        assert forest.predict(dict(row.features))[0] == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_a_model_survives_its_file_and_no_damage_is_taken_for_one(forest: Forest, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    forest.save(path)
    assert learned.load(path).members == forest.members
    data = json.loads(path.read_text())
    data["members"][0][1][0][2][0] = 0  # a tree that would be walked for ever
    path.write_text(json.dumps(data))
    with pytest.raises(ModelError, match="a tree is not one"):
        learned.load(path)


def test_learned_prices_order_unseen_kernels_better_than_the_roofline(small: list[Case], forest: Forest) -> None:
    unseen, taus = small[3], []
    for model in (Learned(unseen.target, forest), Roofline(unseen.target)):
        _, listed = ablate.priced(unseen, model)
        taus.append(ablate.tau_of(unseen, listed, ablate.Recorded(unseen))[0])
    assert taus[0] > max(taus[1], 0.5)


def test_a_kernel_of_an_unknown_kind_is_not_priced(small: list[Case], forest: Forest) -> None:
    seen, other = small[1], small[4]  # never trained on a GPU
    model = Learned(other.target, forest)
    prices, _ = ablate.priced(other, model)
    candidates = other.candidates()
    as_is = {key for key in prices if dict(candidates[key].params).get("as_is")}
    assert {key for key, cost in prices.items() if cost} == as_is
    assert {prices[key].source for key in as_is} == {"roofline"}  # type: ignore[union-attr]
    ctx, keys = next((ctx, keys) for ctx, keys in other.regions if not as_is.issuperset(keys))
    answer = next(a for a in model.price(ctx, [candidates[k] for k in keys]) if isinstance(a, Rejection))
    assert (answer.code, "device=cuda" in answer.detail) == ("uncertain", True)
    known, _ = ablate.priced(seen, Learned(seen.target, forest))
    assert any(cost and cost.source == "learned" for cost in known.values())
    unsure, _ = ablate.priced(seen, Learned(seen.target, forest, threshold=0.0))
    assert not any(cost and cost.source == "learned" for cost in unsure.values())


def test_without_scikit_learn_training_says_what_to_install(small: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(ModelError, match=r"pip install 'lz-compiler\[research\]'"):
        learned.fit(ablate.training_rows(small[:2]))


@pytest.mark.parametrize("tolerance", [0.02, 0.005])
def test_hybrid_measures_some_and_plans_nearly_as_well(small: list[Case], forest: Forest, tolerance: float) -> None:
    for one in small[1:5]:  # the last of a device that the forest does not know
        exact = ablate.Recorded(one)
        model = Hybrid(Learned(one.target, forest), ablate.Nothing(), exact, lambda ctx, c: c.key, tolerance)
        prices, _ = ablate.priced(one, model)
        problem, solution = model.refine(corpus.with_prices(one.problem, prices), lambda p: planner.solve(p, "cp_sat", 20.0))
        assert 0 < model.measured + model.checked == exact.asked < len(one.timings)
        best = planner.solve(one.problem, "cp_sat", 20.0)
        assert ablate.judged(one.problem, solution) <= 1.1 * best.objective
        measured = {c.key for c, cost in zip(problem.candidates, problem.costs, strict=True) if cost.source == "measured"}
        assert len(measured) == exact.asked
        used = [k for k in solution.chosen if problem.candidates[k].key in one.timings]
        assert all(problem.costs[k].source == "measured" or dict(problem.candidates[k].params).get("as_is") for k in used)
        assert model.refine(problem, lambda p: planner.solve(p, "cp_sat", 20.0))[0] is problem  # nothing is left to change


def test_hybrid_measures_nothing_that_is_known(small: list[Case], forest: Forest) -> None:
    one = small[2]
    model = Hybrid(Learned(one.target, forest), ablate.Recorded(one), ablate.Nothing(), lambda ctx, c: c.key)
    prices, _ = ablate.priced(one, model)
    _, solution = model.refine(corpus.with_prices(one.problem, prices), lambda p: planner.solve(p, "cp_sat", 20.0))
    recorded, _ = ablate.priced(one, ablate.Recorded(one))
    assert solution.objective == planner.solve(corpus.with_prices(one.problem, recorded), "cp_sat", 20.0).objective
    assert model.measured == model.checked == 0


class Planted(ablate.Recorded):
    """Every kernel takes its roofline's time, but for some: eight times as long, which no model told."""

    def __init__(self, one: Case, prices: dict[str, Cost | None], slow: set[str]) -> None:
        super().__init__(one)
        self.planted, self.slow = prices, slow

    def cost(self, candidate: Candidate) -> Cost:
        guess = self.planted[candidate.key]
        assert guess is not None
        return Cost(8 * guess.ns if candidate.kernel in self.slow else guess.ns, "measured")


def test_hybrid_finds_a_rival_that_only_measuring_shows(small: list[Case], forest: Forest) -> None:
    one = small[3]
    prices, _ = ablate.priced(one, Roofline(one.target))
    blind = planner.solve(corpus.with_prices(one.problem, prices), "cp_sat", 20.0)
    exact = Planted(one, prices, {one.problem.candidates[k].kernel for k in blind.chosen if one.problem.candidates[k].key in prices})
    blank = replace(forest, ranges=((100.0, 100.0),) * len(forest.names))  # abstains on everything
    model = Hybrid(Learned(one.target, blank), ablate.Nothing(), exact, lambda ctx, c: c.key)
    guessed, _ = ablate.priced(one, model)
    _, solution = model.refine(corpus.with_prices(one.problem, guessed), lambda p: planner.solve(p, "cp_sat", 20.0))
    truth = corpus.with_prices(one.problem, {key: exact.cost(c) for key, c in one.candidates().items()})
    best = planner.solve(truth, "cp_sat", 20.0)
    assert ablate.judged(truth, solution) <= 1.05 * best.objective < 1.1 * best.objective < ablate.judged(truth, blind)
    assert exact.asked < len(one.timings)


def test_the_gaussian_process_is_the_dense_formula() -> None:
    """Observations one at a time are those of equations 2.23 and 2.24 all at once."""
    draw = np.random.default_rng(0)
    for _ in range(20):
        n = int(draw.integers(2, 12))
        found = [{f"kernel={draw.integers(3)}": 1.0, "out": float(draw.uniform(0, 20)), f"in0={draw.integers(2)}": 1.0} for _ in range(n)]
        belief = gaussian.prior(found, draw.uniform(0.1, 1.0, n))  # type: ignore[arg-type]
        k, seen = belief.covariance, draw.permutation(n)[: int(draw.integers(1, n))]
        y = draw.normal(size=len(seen))
        for i, value in zip(seen, y, strict=True):
            belief.observe(int(i), float(value))
        gain = k[:, seen] @ np.linalg.inv(k[np.ix_(seen, seen)] + gaussian.NOISE * np.eye(len(seen)))
        np.testing.assert_allclose(belief.mean, gain @ y, atol=1e-9)
        np.testing.assert_allclose(belief.covariance, k - gain @ k[seen], atol=1e-9)


def test_constant_follows_its_order(small: list[Case]) -> None:
    one = small[1]
    candidates = one.candidates()
    for ctx, keys in one.regions:
        priced = Constant(one.target).price(ctx, [candidates[k] for k in keys])
        first = min(priced, key=lambda answer: answer[1].ns)  # type: ignore[index, union-attr]
        if any(candidates[k].kernel.startswith("onednn.") for k in keys):
            assert first[0].kernel.startswith("onednn.")  # type: ignore[index, union-attr]


def test_inductors_estimate_is_its_formula(tmp_path: Path) -> None:
    store = TimingStore.open(tmp_path)
    store.merge(Path(__file__).parent / "data" / "h200_timings.jsonl")
    target = stored_target(store, "NVIDIA H200", graphs=True)
    x, w, y = ([shape, [shape[1], 1], "bfloat16", "cuda"] for shape in ([4096, 1024], [1024, 512], [4096, 512]))
    ctx = corpus.region_from_dict({"op": "linear", "roles": ["x", "w"], "specs": [x, w], "outputs": [y], "params": {}, "frozen": [],
                                   "default": True})  # fmt: skip
    form = Format("strided", "bfloat16")
    kernels = [Candidate(name, ctx.region, (form, form), (form,)) for name in ("aten.mm", "cublas.addmm_activation")]

    def ns(target: Target) -> set[tuple[int, str]]:
        return {(answer[1].ns, answer[1].source) for answer in Inductor(target).price(ctx, kernels)}  # type: ignore[index, union-attr]

    assert ns(target) == {(round(2 * 4096 * 1024 * 512 / 0.53526528e12 * 1e9), "inductor")}
    fast = {**target.inductor, "flops": {"float32": 1e18, "bfloat16": 1e18}}
    nbytes = 2 * (4096 * 1024 + 1024 * 512 + 4096 * 512)
    assert ns(replace(target, inductor=fast)) == {(round(nbytes / 4814.304e9 * 1e9), "inductor")}


def test_inductor_estimates_nothing_without_rates(small: list[Case], tmp_path: Path) -> None:
    store, card = TimingStore.open(tmp_path), small[4].target
    for target, why in ((small[0].target, "GPUs only, not of AMD EPYC"), (replace(card, inductor={}), "`lz cache clear peaks`")):
        with pytest.raises(OptionError, match=why):
            cost_model("inductor", target, store, 0.0)
    assert isinstance(cost_model("inductor", card, store, 0.0), Inductor)


def test_inductors_rates_are_in_units_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    tflops = {torch.float32: 60.0, torch.bfloat16: 990.0, torch.float16: 980.0}
    monkeypatch.setattr("torch._inductor.utils.get_device_tflops", tflops.__getitem__)
    monkeypatch.setattr("torch._inductor.utils.get_gpu_dram_gbps", lambda: 4800)
    found = torch_private.estimated_rates()
    assert found == {"bandwidth": 4.8e12, "flops": {"float32": 6e13, "bfloat16": 9.9e14, "float16": 9.8e14}}
    tflops[torch.float16] = 0.0  # what Inductor answers where it knows no rate
    assert torch_private.estimated_rates() == {}
    del tflops[torch.float16]
    assert torch_private.estimated_rates() == {}


def test_ablate_leaves_inductor_out_on_a_cpu(small: list[Case], tmp_path: Path) -> None:
    """Once, and it plans the H200's case, whose kernels of one region it cannot tell apart."""
    said: list[str] = []
    ablate.run([small[0], small[1], small[4]], tmp_path, ("measured", "inductor"), ("cp_sat",), (0,), said.append)
    assert len([line for line in said if "inductor left out: Inductor estimates kernels of GPUs only" in line]) == 1
    (row,) = (r for r in rows(tmp_path / "plans.csv") if r["cost_model"] == "inductor")
    assert (row["case"], row["status"], float(row["tau"]), row["abstained"]) == (small[4].name, "optimal", 0.0, "0")
    assert int(row["pairs"]) > 0
    assert float(row["regret"]) >= 0
    with pytest.raises(OptionError, match="prices any of these cases"):
        ablate.run(small[:2], tmp_path / "none", ("inductor",), ("cp_sat",), (0,))


def test_hybrid_with_another_tolerance_measures_less(small: list[Case], tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    size = {"members": 5, "trees": 20}
    ablate.run(small[:4], tmp_path, ("hybrid", "hybrid:0.9"), ("cp_sat",), (0,), size=size)
    measured = {
        name: sum(int(r["measured"]) for r in rows(tmp_path / "plans.csv") if r["cost_model"] == name) for name in ("hybrid", "hybrid:0.9")
    }
    assert 0 < measured["hybrid:0.9"] < measured["hybrid"]
    with pytest.raises(OptionError, match="unknown cost model 'hybrid:much'"):
        ablate.run(small[:2], tmp_path / "none", ("hybrid:much",), ("cp_sat",), (0,))


def rows(path: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in ablate_report.read(path)]


def test_a_stopped_run_goes_on(small: list[Case], tmp_path: Path) -> None:
    asked = {"models": ("measured", "roofline"), "solvers": ("cp_sat", "greedy"), "seeds": (0,)}
    ablate.run(small[:2], tmp_path / "whole", **asked)  # type: ignore[arg-type]
    ablate.run(small[:1], tmp_path / "parts", **asked)  # type: ignore[arg-type]
    with (tmp_path / "parts" / "plans.csv").open("a") as file:
        file.write("bert_8x64_plain,bert,AMD")  # killed in the middle of a line
    said: list[str] = []
    ablate.run(small[:2], tmp_path / "parts", **asked, say=said.append)  # type: ignore[arg-type]
    assert len(said) == 2
    assert rows(tmp_path / "parts" / "plans.csv") == rows(tmp_path / "whole" / "plans.csv")
    assert rows(tmp_path / "parts" / "prices.csv") == rows(tmp_path / "whole" / "prices.csv")


def test_a_kill_between_the_two_tables_repeats_no_price(small: list[Case], tmp_path: Path) -> None:
    asked = {"models": ("measured",), "solvers": ("cp_sat",), "seeds": (0,)}
    ablate.run(small[:1], tmp_path, **asked)  # type: ignore[arg-type]
    before = rows(tmp_path / "prices.csv")
    (tmp_path / "plans.csv").unlink()  # as if killed after the prices were written
    ablate.run(small[:1], tmp_path, **asked)  # type: ignore[arg-type]
    assert rows(tmp_path / "prices.csv") == before


def test_the_command_prints_its_tables(small: list[Case], tmp_path: Path) -> None:
    from pyarrow import parquet

    pytest.importorskip("matplotlib")
    for one in small[:2]:
        corpus.save(one, tmp_path / "cases")
    asked = ["--model", "measured", "--model", "roofline", "--solver", "cp_sat", "--solver", "greedy"]  # models need no training
    place = ["--corpus", str(tmp_path / "cases"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, ["ablate", "--offline", *place, *asked])
    assert result.exit_code == 0, result.output
    for text in ("| cost model | regret, median |", "| solver | cases solved |", "greedy is dearer by", "| roofline |"):
        assert text in result.output
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"plans.csv", "prices.csv", "report.md", "predicted.png", "regret.png"}
    table = ablate_report.read(tmp_path / "out" / "plans.csv")
    assert {r["cost_model"] for r in table} == {"measured", "roofline"}
    assert all(float(r["regret"]) >= -1e-9 for r in table)
    stored = parquet.read_table(tmp_path / "out" / "plans.parquet").to_pylist()
    assert [(r["case"], r["solver"], r["judged_ns"]) for r in stored] == [(r["case"], r["solver"], int(r["judged_ns"])) for r in table]


def test_solvers_may_be_asked_for_later(small: list[Case], tmp_path: Path) -> None:
    """A run with more solvers plans what is missing, and prices nothing twice; another exact solver may stand in for CP-SAT."""
    for one in small[:1]:
        corpus.save(one, tmp_path / "cases")
    place = ["ablate", "--corpus", str(tmp_path / "cases"), "--out", str(tmp_path / "out"), "--model", "measured", "--no-figures"]
    first = CliRunner().invoke(cli.app, [*place, "--solver", "highs"])
    assert first.exit_code == 0, first.output
    assert "| highs | 1/1 |" in first.output
    priced = ablate_report.read(tmp_path / "out" / "prices.csv")
    later = CliRunner().invoke(cli.app, [*place, "--solver", "highs", "--solver", "greedy", "--solver", "cp_sat"])
    assert later.exit_code == 0, later.output
    assert "| greedy | 1/1 |" in later.output
    assert [r["solver"] for r in ablate_report.read(tmp_path / "out" / "plans.csv")] == ["highs", "greedy", "cp_sat"]
    assert ablate_report.read(tmp_path / "out" / "prices.csv") == priced
    alone = CliRunner().invoke(cli.app, [*place[:-3], "--out", str(tmp_path / "alone"), "--model", "roofline", "--no-figures"])
    assert alone.exit_code == 0, alone.output  # nothing to compare with


def test_a_case_without_training_data_is_left_out(small: list[Case], tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    said: list[str] = []
    ablate.run(small[:1], tmp_path, ("learned", "roofline"), ("cp_sat",), (0,), said.append)
    assert any("left out: training needs measurements of two models" in line for line in said)
    assert {r["cost_model"] for r in rows(tmp_path / "plans.csv")} == {"roofline"}
    with pytest.raises(PlanError, match=r"in a clone of the repository, .* or give --corpus DIR"):
        corpus.load_all([tmp_path / "none"])


def test_kernels_of_one_name_are_told_apart() -> None:
    """Greedy's convolutions and the best plan's have one name: what moved is their layout, or what they absorb."""
    problem = case("resnet50_1x224").problem
    told = ablate.moved(problem, planner.solve(problem, "greedy", 20.0), planner.solve(problem, "cp_sat", 20.0))
    left, _, right = told.partition(" > ")
    assert left != right
    for side in (left, right):
        assert "onednn.conv_packed (add, channels_last:" in side
        assert "onednn.conv_packed (channels_last:" in side


def test_statistics() -> None:
    assert ablate.kendall([(1, 1), (2, 2), (3, 3)]) == (3, 3)
    assert ablate.kendall([(3, 1), (2, 2), (1, 3), (1, 4)]) == (-5, 6)  # a tie in the prediction counts nothing
    low, high = ablate_report.interval([float(i) for i in range(101)])
    assert 42 < low < 50 < high < 58
    assert ablate_report.paired_p([1.0] * 12) < 0.01
    assert ablate_report.paired_p([1.0, -1.0] * 6) > 0.5


class Own:
    """A cost model of a third party, as an object."""

    name = "own"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def price(self, ctx: SelectionContext, candidates: Sequence[Candidate]) -> list[Priced]:
        self.asked += [c.kernel for c in candidates]
        return self.roofline.price(ctx, candidates)

    @property
    def roofline(self) -> Roofline:
        from lz_compiler import backend, target

        return Roofline(target.detect("cpu", backend.open_store(Options.resolve().cache_dir)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).eval()


def test_a_cost_model_may_be_an_object() -> None:
    own = Own()
    model, x = mlp(), torch.randn(8, 64)
    with torch.no_grad():
        compiled = torch.compile(model, backend="layerzero", options={"cost_model": own, "race": False})
        torch.testing.assert_close(compiled(x), model(x))
    assert "aten.mm" in own.asked
    assert Options(cost_model=own).key() == Options(cost_model=Own()).key() != Options().key()
    with pytest.raises(OptionError, match="an object with a `name` and a method `price`"):
        Options.resolve({"cost_model": object()})


def plugged(target: Target, store: object, seconds: float) -> Roofline:
    """A cost model of a third party, as a function."""
    return Roofline(target)


def test_a_cost_model_is_found_through_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "plugged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lz_compiler.cost_models]\nplugged = {__name__}:plugged\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    asked: list[str] = []
    monkeypatch.setattr(sys.modules[__name__], "plugged", lambda target, store, seconds: asked.append(target.device) or Roofline(target))
    model, x = mlp(), torch.randn(8, 64)
    with torch.no_grad():
        torch.testing.assert_close(lz.compile(model, cost_model="plugged", race=False)(x), model(x))
    assert asked == ["cpu"]
    with pytest.raises(OptionError, match="'plugged'"):
        Options.resolve({"cost_model": "pluged"})


def test_a_plan_of_a_cost_model_object_is_kept_under_its_name(tmp_path: Path) -> None:
    """A plan that is followed prices nothing, so the object is not needed again; another cost model is still an error."""
    model, x = mlp(), torch.randn(8, 64)
    lz.solve(model, (x,), cost_model=Own(), race=False).save(tmp_path / "plan.json")
    plan = lz.load_plan(tmp_path / "plan.json")
    assert plan.options["cost_model"] == f"{__name__}.Own:own"
    own = Own()
    for options in ({}, {"cost_model": own}):
        run = lz.compile(model, plan=plan, **options)
        torch.testing.assert_close(run(x), model(x))
    assert not own.asked
    with pytest.raises(PlanError, match=r"'cost_model' is 'roofline', but the plan was solved with '.*Own:own'"):
        lz.compile(model, plan=plan, cost_model="roofline")
    lz.bake(plan, tmp_path / "baked", model, (x,))
    torch.testing.assert_close(lz.warmup(tmp_path / "baked").forward(x), model(x))


def test_hybrid_in_a_compilation_uses_measured_kernels_only() -> None:
    model, x = mlp(), torch.randn(8, 64)
    with torch.no_grad():
        compiled = torch.compile(model, backend="layerzero", options={"cost_model": "hybrid", "freeze": True, "race": False})
        torch.testing.assert_close(compiled(x), model(x))
    used = [c for plan in RECORDS[-1].plans for c in plan.choices if c.candidate.region.op == "linear"]
    assert used
    assert all(c.cost.source == "measured" or dict(c.candidate.params).get("as_is") for c in used)
    assert all(math.isfinite(c.candidate.epsilon) for c in used)
