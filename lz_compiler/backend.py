"""The whole way of a graph, in one place:

    capture -> recognise -> enumerate -> price -> solve -> apply -> lower        (and the race between finalists)

`layerzero` is what `torch.compile(model, backend="layerzero")` calls for each graph that Dynamo captured. AOTAutograd,
partitioning, fusion and code generation are TorchInductor's; LayerZero plans inside it, on the functional ATen graph, before
Inductor's own post-grad passes.
"""

from __future__ import annotations

import functools
import logging
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, fx

from . import __version__, collectives, ops, race, ranks, semantics, torch_private
from .backends import allowed_backends, check_names, set_up
from .capture import GraphView, fingerprint, plan_key, tensors_in
from .cost_models.roofline import Roofline
from .errors import PlanError, first_line, told
from .options import Options
from .passes.apply import apply_plan
from .passes.drop_masks import drop_masks_pass
from .passes.keep_attention import keep_attention_pass
from .passes.output_strides import Output, output_strides, restore_output_strides_pass
from .passes.save_before_write import save_before_write_pass
from .passes.verify import interface, verify
from .patterns import Recogniser
from .plan_io import digest, plan_to_dict, verdict_or_none, verdict_to_dict
from .planning import DILUTION, Posed, make_plan, pose
from .problem import edited, narrower
from .reports.profiling import Profile
from .target import detect, environment
from .timings import TimingStore, open_store
from .trust.circuit import Breaker, Quarantine, called_as, guarded
from .trust.verdicts import Trust
from .types import EAGER, INDUCTOR, LOSSLESS, PLANNED, Plan, Target, Verdict

log = logging.getLogger(__name__)

TIGHTEN, MARGIN = 3, 1.25  # how often a plan over its budget is made anew, and by how much more than was measured errors count then


@dataclass(slots=True, eq=False)
class GraphRecord:
    """What happened to one captured graph: what `lz.explain` shows."""

    key: str
    compile_id: str
    options: Options
    lines: tuple[tuple[str, int], ...]
    parameters: tuple[weakref.ref[Tensor], ...]
    plans: list[Plan] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)  # seconds a call, measured end to end
    winner: str = PLANNED
    decided: bool = False
    error: float | None = None  # measured relative error of a plan with an error budget
    notes: list[str] = field(default_factory=list)
    ranks: str = ""  # what the ranks of a job agreed on
    calls: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # kernel -> how often Inductor's code calls what for it
    profile: Profile | None = None


RECORDS: list[GraphRecord] = []  # of the compiled graphs that are still there


@functools.cache
def setup() -> None:
    torch_private.check_version()
    ops.register_lowerings()


def layerzero(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:  # fmt: skip
    """Plan and compile one graph. `mode` and `options` as in torch.compile; see Options for the options.

    The log says how long it took, as a warning where the same code of the same module was compiled before: for other sizes, say, and
    in a call that had to wait for it.
    """
    start = time.perf_counter()
    setup()
    chosen = Options.resolve(options, mode)
    check_names(chosen)
    device = _device(example_inputs, gm)
    store = open_store(chosen.cache_dir)
    if chosen.freeze:
        torch_private.guard_owned(gm)
    team = ranks.team(chosen) if ranks.several() else None
    session = Session(gm, list(example_inputs), chosen, store, device, torch_private.placeholder_tensors(gm), team)
    free = chosen.policy is None and chosen.backends is None and session.static and not torch_private.clamps(gm)
    session.rival_freezes = device == "cpu" and chosen.freeze and free and not torch.is_grad_enabled()
    compiled = session.compile()
    name, seconds = session.record.compile_id, time.perf_counter() - start
    if name.endswith(("/0", "?")) or not any(_same_code(session.record, other) for other in RECORDS):
        log.info("graph %s compiled in %.1f s", name, seconds)
    else:
        log.warning("graph %s is compiled again, for other sizes or conditions: the call waited %.1f s", name, seconds)
    return compiled


def _same_code(record: GraphRecord, other: GraphRecord) -> bool:
    """Whether these are two compilations of one module's code: Dynamo's numbers count those by other backends, and of other modules."""
    frames = {r.compile_id.rpartition("/")[0] for r in (record, other)}
    mine, theirs = ({id(t) for ref in r.parameters if (t := ref()) is not None} for r in (record, other))
    return record is not other and len(frames) == 1 and (mine == theirs or bool(mine & theirs))


def _device(example_inputs: Sequence[Any], gm: fx.GraphModule) -> str:
    found = {t.device.type for t in (*tensors_in(example_inputs), *gm.parameters(), *gm.buffers())}
    return "cuda" if "cuda" in found else "cpu"


class _Posed(BaseException):
    """Ends a compilation that has come to the planning. No Exception: Inductor would wrap it."""


class Session:
    """The compilation of one graph. `real`: for each placeholder the tensor behind it, and whether it is a weight of the model.
    `plans`: what was decided for it already, for each error budget; nothing else is planned then, but raced and stored as theirs."""

    def __init__(
        self, gm: fx.GraphModule, inputs: list[Any], options: Options, store: TimingStore, device: str,
        real: Sequence[tuple[Tensor | None, bool]], team: ranks.Team | None = None, plans: Sequence[Plan] = (), dilution: float = DILUTION,
    ) -> None:  # fmt: skip
        self.team = team
        if torch.are_deterministic_algorithms_enabled():
            options = replace(options, deterministic=True)
        self.static = not any(isinstance(i, torch.SymInt) for i in inputs)
        self.may_race = options.race and not options.deterministic and self.static and not torch.is_grad_enabled()  # with other ranks
        if team is not None:
            options = replace(options, race=False)  # clocks differ, so ranks would run different finalists
        self.gm, self.inputs, self.options, self.store, self.device, self.real = gm, inputs, options, store, device, real
        env = [f"{k}={v}" for k, v in sorted(environment(device).items())]
        env += Trust(store, environment(device)).marks()
        env += ["ranks"] if team is not None else []
        grad = f"grad={torch.is_grad_enabled()}"
        env += [f"plan {digest([repr(c.candidate) for c in plan.choices])}" for plan in plans]
        self.key = fingerprint(gm, (options.key(), __version__, grad, *env))
        owned = [t for t, is_owned in self.real if is_owned and t is not None] or list(gm.parameters())
        self.record = GraphRecord(
            self.key, torch_private.compile_id(), options, torch_private.node_source_lines(gm), tuple(map(weakref.ref, owned))
        )
        self.finalists: tuple[str, ...] = (PLANNED,)
        self.lossless: list[Plan] = []  # instead of the record's, should its error be over the budget
        self.written: tuple[int, ...] | None = None
        self.given = list(plans)
        self.known: list[Plan] = self.given  # or of an earlier verdict: applied where they fit, so that nothing is planned again
        self.follows = False  # a stored plan: nothing may be planned
        self.dropped = 0  # masks
        self.collective = False  # whether a planned graph contains collectives
        self.random = False  # whether one draws random numbers other than eager's
        self.dilution, self.tightened = dilution, 0  # of the estimated error; how often it was mended by a measured one
        self.rival_freezes = False  # TorchInductor alone too, on a CPU; no policy or list of backends would see what it calls then
        self.over = False  # whether this plan's error was over the budget, so that the next process tightens it
        self.links: collectives.Curves = {}  # what all-reduces take between the ranks
        self.breaker = Breaker(store, device, gm.forward, self.record.compile_id)
        self.record.calls = self.breaker.calls
        torch_private.counters()["graphs"] += 1

    def compile(self, verdict: Verdict | None = None) -> Callable[..., Any]:
        """Finalists in a race, or the one that is known to win; with frozen weights, Dynamo guards that they are the same.

        `verdict`: of a stored plan. It is followed as it is, and PlanError where its plans are not for this graph.
        """
        self.follows = verdict is not None
        if self.team is not None:
            with self.team, torch_private.backward_at_once():
                compiled = self._watched(self._with_ranks(self.team))
        else:
            try:
                compiled = self._watched(self._compile(verdict or self._stored_verdict()))
            except torch_private.lowering_errors() as error:
                compiled = self._watched(self._without_plan(error))
        self.inputs, self.real = [], ()  # the first batch, and the weights, may be freed before the compiled graph is
        RECORDS.append(self.record)
        weakref.finalize(compiled, RECORDS.remove, self.record)
        return compiled

    def _without_plan(self, error: Exception) -> Callable[..., Any]:
        """TorchInductor alone, where it compiles the graph and not the plan; the next process does the same at once."""
        if self.follows or INDUCTOR in self._barred():
            raise error
        compiled = self._inductor()
        why = f"the plan could not be compiled ({first_line(str(error))}): TorchInductor runs the graph as it was"
        warnings.warn(f"LayerZero, graph {self.record.compile_id}: {why}.", stacklevel=2)
        torch_private.counters()["not lowered"] += 1
        self.breaker.tripped, self.record.winner, self.record.decided = why, INDUCTOR, True
        self.record.notes.append(why)
        self._store(INDUCTOR, {})
        return compiled

    def _with_ranks(self, team: ranks.Team) -> Callable[..., Any]:
        """Decide for the ranks of this one's group, or follow the rank that does."""
        store, env, options = self.store, environment(self.device), self.options
        known = {f"option {f.name}": str(getattr(options, f.name)) for f in fields(options) if f.metadata["plans"]}
        known |= ranks.libraries(allowed_backends(options.backends), self.device)
        known |= {"lz_compiler": __version__, "gradients": str(torch.is_grad_enabled())}
        refused = (*Trust(store, env).marks(), *Quarantine(store, self.device).names())
        curves = collectives.stored(store, team.size, options.graphs) if collectives.wanted(self.gm, self.inputs) else {}
        wish = "" if curves == {} or not options.measure_budget_s else "known" if curves else "unknown"
        team.meet(ranks.facts(env, known, refused, fingerprint(self.gm), wish))
        self.links = team.links(curves, lambda: collectives.measure(torch_private.world(), options.graphs))
        if wish == "unknown":
            collectives.keep(store, team.size, options.graphs, self.links)
        if team.leads:
            run = self._compile(self._stored_verdict())
            together = self._in_step() and not self.record.decided
            verdict = replace(self._verdict(self.record.winner, self.record.times), lossless=tuple(self.lossless), race=together)
            team.say("verdict", verdict_to_dict(verdict))
        else:
            told = team.verdict()
            run, together = self._compile(told), told is not None and told.race
        if together:
            run = self._race_in_step(run, team)
        plans, candidates = self.record.plans, self.finalists if together else (self.record.winner,)
        self.record.ranks = team.confirm(" or ".join(candidates), [plan_to_dict(p) for p in plans], collectives.kernels(plans))
        return run

    def _race_in_step(self, planned: Callable[..., Any], team: ranks.Team) -> Callable[..., Any]:
        """The race of all ranks, against TorchInductor alone."""
        rival = self._rival()
        if not rival:
            self._finish({}, PLANNED)
            return planned
        self.record.decided = False
        return self._race({PLANNED: planned, **rival}, None, agree=team.slowest)

    def _in_step(self) -> bool:
        """Whether the ranks race together: all plan together, and collectives in the graph keep their calls in step."""
        together = self.team is not None and len(self.team.members) == self.team.size
        return together and self.may_race and self.collective and INDUCTOR not in self._barred()

    def _stored_verdict(self) -> Verdict | None:
        """The verdict of an earlier process, unless what it would run has failed since, or its plan was over the budget."""
        verdict = None if self.options.problems else verdict_or_none(self.store.get_record("verdict", self.key))
        if verdict is None:
            return None
        self.dilution, self.tightened = verdict.dilution or DILUTION, verdict.tightened
        if verdict.over:
            self.record.notes.append(f"planned anew: measured errors were {self.dilution / DILUTION:.1f} times the estimate")
            return None
        failed = None
        if verdict.winner in (PLANNED, LOSSLESS):
            failed = Quarantine(self.store, self.device).of_plans(verdict.plans) or collectives.missing(verdict.plans, self.links)
        if failed is None:
            return verdict
        self.record.notes.append(f"planned anew: {failed}")
        return None

    def _watched(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """What Dynamo calls; a race watches by itself, and eager needs no watching."""
        if isinstance(run, race.Race) or run == self.gm.forward or self.record.winner == INDUCTOR:
            return functools.partial(run)
        return guarded(run, lambda error, args: self._rescue(PLANNED, error, args), self._reference())

    def _watched_backward(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """What autograd calls. Its inputs may be written over (donated buffers), so that no other plan could repeat the call."""
        stop = "the backward pass uses up what the forward pass kept"
        return guarded(run, lambda error, args: self._rescue(PLANNED, error, args, stop), None)

    def _barred(self) -> set[str]:
        """The finalists that the policy forbids for this graph."""
        return {name for plan in (*self.record.plans, *self.lossless) for name in plan.barred}

    def _reference(self) -> Callable[..., Any] | None:
        return None if self._stop() else self.gm.forward

    def _stop(self) -> str | None:
        """Why a call may not be repeated by eager, or None."""
        if self.collective:
            return "the graph contains collectives, and the other ranks would not repeat them"
        return "the policy forbids the reference plan" if EAGER in self._barred() else None

    def _rescue(self, name: str, error: Exception, args: tuple[Any, ...], stop: str | None = None) -> Any:
        """The call by eager, after a finalist raised (circuit.Breaker); raises where that cannot be, or for the reason `stop`."""
        if name in (INDUCTOR, EAGER):
            raise error
        record, plans = self.record, [*self.record.plans, *self.lossless]
        try:
            out = self.breaker.rescue(error, args, plans, self.written, stop or self._stop())
        finally:
            if self.breaker.tripped is not None and self.breaker.tripped not in record.notes:
                torch_private.counters()["broken"] += 1
                record.notes.append(self.breaker.tripped)
                if not self.breaker.kernels:  # nothing else that the next process could do without
                    self._store(EAGER if INDUCTOR in self._barred() else INDUCTOR, {})
        if record.decided or len(self.finalists) < 2:
            record.winner = EAGER
        return out

    def _compile(self, verdict: Verdict | None) -> Callable[..., Any]:
        if verdict is not None:
            return self._from_verdict(verdict)
        planned = self._planned(self.options, self.record.plans)
        barred = self._barred()
        if INDUCTOR not in barred and not self.dropped and not any(_changes(plan) for plan in self.record.plans):
            self.record.notes.append("no kernel beats what TorchInductor does with this graph: compiled by it alone")
            self._finish({}, INDUCTOR)
            return self._inductor() if self.rival_freezes else planned
        lossy = any(plan.epsilon > 0 for plan in self.record.plans)
        if self.collective and self.options.race:
            self.record.notes.append("the graph contains collectives: not raced, since each rank would have its own verdict")
        racing = self.options.race and not self.options.deterministic and not self.collective
        if not racing and not lossy:
            # What one process could not measure in time, the next one must not measure instead.
            if (self.options.deterministic or self.team is not None or self.collective) and not self._in_step():
                self._finish({}, PLANNED)
            return planned
        finalists: dict[str, race.Finalist] = {PLANNED: planned}
        check = None
        if lossy:
            finalists[LOSSLESS], check = self._within_budget(planned)
        if not racing:
            return self._race(finalists, check, rounds=0)
        barred |= self._barred()
        if barred:
            self.record.notes.append(f"the policy forbids what {' and '.join(sorted(barred))} would use: not raced against")
        if INDUCTOR not in barred:
            finalists |= self._rival()
        if self.random or not self.static:
            why = "draws other random numbers" if self.random else "may be the fastest for the first sizes and no others"
            self.record.notes.append(f"not raced against eager, which {why}")
        elif EAGER not in barred:
            finalists[EAGER] = self.gm.forward
        if len(finalists) == 1:
            self._finish({}, PLANNED)
            return planned
        return self._race(finalists, check)

    def _race(
        self, finalists: Mapping[str, race.Finalist], check: Callable[[tuple[Any, ...]], list[str]] | None, rounds: int = race.ROUNDS,
        finish: Callable[[dict[str, float], str, bool], None] | None = None,
        agree: Callable[[dict[str, float]], dict[str, float]] | None = None,
    ) -> race.Race:  # fmt: skip
        self.finalists = tuple(finalists)
        return race.Race(
            finalists, finish or self._finish, PLANNED, check, rounds, rescue=self._rescue, reference=self._reference(), agree=agree,
            repeated=self.written == (),
        )  # fmt: skip

    def _from_verdict(self, verdict: Verdict) -> Callable[..., Any]:
        """The race was run before: compile its winner only."""
        winner, record = verdict.winner, self.record
        record.times, record.winner, record.decided = dict(verdict.times), winner, True
        record.error, record.plans = verdict.error, list(verdict.plans)
        record.notes += [f"an earlier process: {verdict.why}"] if verdict.why else []
        record.calls = self.breaker.calls = {kernel: dict(names) for kernel, names in verdict.calls.items()}
        self.known = [*verdict.plans, *verdict.lossless, *self.given]
        self.collective, self.random, self.written = verdict.collective, verdict.random, verdict.written
        failed = Quarantine(self.store, self.device).of_plans(verdict.plans) if self.follows and winner in (PLANNED, LOSSLESS) else None
        if failed is not None:
            raise PlanError(f"the stored plan uses what failed here: {failed}. Solve again.")
        set_up({c.candidate.kernel for plan in verdict.plans for c in plan.choices})
        if winner == EAGER:
            return self.gm.forward
        if winner == INDUCTOR:
            return self._inductor()
        fresh: list[Plan] = []
        options = self.options
        if winner == LOSSLESS:
            options = replace(options, error_budget=0.0)
        kernels = [[(c.candidate.kernel, c.candidate.region.nodes) for c in plan.choices] for plan in verdict.plans]
        compiled = self._planned(options, fresh, cached="" if self.follows else digest(kernels))
        fresh += [p for p in verdict.plans if p.kind not in {f.kind for f in fresh}]  # of graphs that Inductor's cache had, or may have
        record.plans = fresh
        if self.follows or winner == LOSSLESS or not any(plan.epsilon > 0 for plan in record.plans):
            return compiled  # a plan that is followed was checked when it was solved
        # The verdict's error was that of the weights and inputs of its time: the budget is kept for these too.
        lossless, check = self._within_budget(compiled)
        finalists = {PLANNED: compiled, LOSSLESS: lossless}
        return self._race(finalists, check, 0, lambda _, name, measured: self._finish(dict(verdict.times), name))

    def _within_budget(self, planned: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[[tuple[Any, ...]], list[str]]]:
        """The lossless plan, compiled, and the check that tells whether it is needed."""
        lossless = self._planned(replace(self.options, error_budget=0.0), self.lossless)
        budget, team = self.options.error_budget, self.team
        references = [lossless] if self.random else [self.gm.forward, lossless]
        check = race.over_budget(references, {PLANNED: planned}, budget, self._report_error, self.written)
        return lossless, check if team is None else lambda args: team.union(check(args))

    def _report_error(self, name: str, error: float) -> None:
        self.record.error = error
        if error > self.options.error_budget:
            predicted = max(plan.epsilon for plan in self.record.plans)
            self.over = self.tightened < TIGHTEN and error < float("inf") and not self.given
            if self.over or (self.given and error < float("inf")):  # given plans are made anew by who gave them
                self.dilution, self.tightened = self.dilution * MARGIN * error / predicted, self.tightened + 1
            self.record.notes.append(
                f"the plan's measured error {error:.2e} is over the budget {self.options.error_budget:g}: lossless plan used"
                + (", and a tighter one from the next process on" if self.over else "")
            )

    def _finish(self, times: dict[str, float], winner: str, measured: bool = True) -> None:
        record = self.record
        record.times, record.winner, record.decided = times, winner, True
        if winner == LOSSLESS or (self.lossless and not (record.error or 0.0) <= self.options.error_budget):
            record.plans = self.lossless
        if not measured:
            record.notes.append("not raced: activation checkpointing repeats calls, which must run the same code")
            return
        log.info("verdict for graph %s: %s (%s)", record.compile_id, winner, {n: f"{t * 1e3:.2f} ms" for n, t in times.items()})
        torch_private.counters()[f"winner:{winner}"] += 1
        if self.breaker.tripped is None:  # else the next process plans anew, without what failed
            self._store(winner, times)

    def _verdict(self, winner: str, times: Mapping[str, float]) -> Verdict:
        record, breaker = self.record, self.breaker
        return Verdict(
            winner, tuple(record.plans), times, record.error, written=self.written, calls=breaker.calls, why=breaker.tripped,
            collective=self.collective, random=self.random, dilution=self.dilution, tightened=self.tightened, over=self.over,
        )  # fmt: skip

    def _store(self, winner: str, times: Mapping[str, float]) -> None:
        self.store.put_record("verdict", self.key, verdict_to_dict(self._verdict(winner, times)))

    def _rival(self) -> dict[str, race.Finalist]:
        """TorchInductor alone, where it compiles the graph."""
        try:
            return {INDUCTOR: self._inductor()}
        except torch_private.lowering_errors() as error:
            self.record.notes.append(f"not raced against TorchInductor, which cannot compile the graph: {first_line(str(error))}")
            return {}

    def _inductor(self) -> Callable[..., Any]:
        patches = self._patches(drop_masks=False)
        if self.rival_freezes:
            try:
                run = torch_private.compile_frozen(self.gm, self.inputs, [t if owned else None for t, owned in self.real], patches)
            except Exception as error:  # whatever it stumbles over: a rival that nobody asked for
                log.info("graph %s: TorchInductor's freezing failed: %s", self.record.compile_id, told(error))
            else:
                self.record.notes.append("TorchInductor alone takes the weights as constants too")
                return run
        return torch_private.compile_with_inductor(torch_private.copy_graph_module(self.gm), self.inputs, patches)

    def _patches(self, drop_masks: bool) -> dict[str, Any]:
        """Inductor's configuration, the same for every finalist, and the passes around its own on the joint graph."""
        before: dict[int, Output] = {}

        def first(graph: fx.Graph) -> None:
            before.clear()
            before.update(output_strides(graph))
            save_before_write_pass(graph)
            if drop_masks:
                self._drop_masks(graph)

        graphs = {"triton.cudagraphs": True} if self.options.cudagraphs else {}
        return torch_private.mode_patches(self.options.mode) | graphs | {
            "joint_custom_pre_pass": torch_private.joint_pass(first, f"{__version__}:saved:{drop_masks=}"),
            "joint_custom_post_pass": torch_private.joint_pass(
                lambda graph: restore_output_strides_pass(graph, before), f"{__version__}:strides"
            ),
        }  # fmt: skip

    def pose(self) -> list[Posed]:
        """The problem of an inference graph, and with an error budget the lossless one too. Nothing is compiled."""
        found: list[Posed] = []

        def stop(graph: fx.Graph, is_inference: bool) -> None:
            frozen, target = self._frozen(graph, is_inference), detect(self.device, self.store, self.options.graphs)
            for budget in dict.fromkeys((self.options.error_budget, 0.0)):
                options = replace(self.options, error_budget=0.0 if collectives.present(graph) else budget)
                key = plan_key(graph, frozen)
                view = GraphView(graph, frozen)
                found.append(pose(view, options, target, self.store, fingerprint=key, kind="inference", dilution=self.dilution))
            raise _Posed

        with suppress(_Posed):
            self._lowered(torch_private.graph_pass(stop, lambda: None))
        return found

    def _planned(self, options: Options, plans: list[Plan], cached: str = "") -> Callable[..., Any]:
        """TorchInductor with LayerZero's passes inside; appends a Plan for each graph (forward, backward, inference)."""
        target = replace(detect(self.device, self.store, options.graphs), links=self.links)
        known = [p for p in self.known if p.epsilon <= options.error_budget]

        def run(graph: fx.Graph, is_inference: bool) -> None:
            frozen = self._frozen(graph, is_inference)
            self.collective |= collectives.present(graph)
            self.random |= torch_private.draws_own_numbers(graph)
            # A program's second trace, as the lossless plan's is, can name nodes otherwise: then it is planned by itself.
            follow = self.follows or (bool(self.given) and options.error_budget == self.options.error_budget)
            plan = plan_and_apply(graph, options, target, self.store, frozen, is_inference, known, follow, self.dilution)
            if not any(plan is other for other in plans):
                plans.append(plan)
            for kernel, names in called_as(graph, plan.choices).items():
                self.breaker.calls.setdefault(kernel, {}).update(names)
            late = self.record.decided and self.record.plans is plans and plan not in known and self.breaker.tripped is None
            if late and self.record.winner in (PLANNED, LOSSLESS):  # a backward graph, lowered when it first ran
                self._store(self.record.winner, self.record.times)

        # Frozen constants are values of this model's weights, and Inductor's key does not know them: never cached.
        uuid = None if options.freeze or not cached else f"{__version__}:{self.key}:{options.error_budget}:{cached}"
        compiled = self._lowered(torch_private.graph_pass(run, lambda: uuid))
        told = torch_private.written_inputs(len(self.inputs))
        self.written = self.written if told is None else told
        return compiled

    def _lowered(self, planning: Any) -> Callable[..., Any]:
        """TorchInductor with the pass that plans."""
        gm = keep_attention_pass(torch_private.copy_graph_module(self.gm))
        patches = self._patches(drop_masks=True)
        patches["post_grad_custom_pre_pass"] = planning
        if not torch.is_grad_enabled():
            patches["layout_optimization"] = False  # layouts are the plan's decision
        with torch_private.cudagraph_skips(lambda why: self.record.notes.append(f"runs without CUDA graphs: {why}")):
            return torch_private.compile_with_inductor(gm, self.inputs, patches, self._watched_backward)

    def _drop_masks(self, graph: fx.Graph) -> None:
        dropped = drop_masks_pass(graph)
        if dropped:
            self.record.notes.append(f"{dropped} attention masks were proved to be causal, or to hide nothing, and dropped")
            self.dropped += dropped

    def _frozen(self, graph: fx.Graph, is_inference: bool) -> dict[fx.Node, Tensor]:
        """Placeholders of an inference graph that are parameters or buffers, with their values.

        AOTAutograd keeps the order of inputs unless it drops or merges some; then nothing is taken as frozen.
        """
        if not self.options.freeze or not is_inference or not torch_private.is_whole(graph):
            return {}
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        if len(placeholders) != len(self.real):
            self.record.notes.append("freeze: AOTAutograd changed the inputs of this graph, no weight is taken as constant")
            return {}
        written = _written(graph)
        found = {}
        for node, (value, owned) in zip(placeholders, self.real, strict=True):
            like = node.meta.get("val")
            if owned and value is not None and isinstance(like, Tensor) and node not in written:
                if torch_private.is_wrapper(value):
                    return {}
                if like.shape != value.shape or like.stride() != value.stride() or like.dtype != value.dtype:
                    return {}
                found[node] = value
        return found


def _written(graph: fx.Graph) -> set[Any]:
    return {n.args[0] for n in graph.nodes if n.op == "call_function" and n.target is torch.ops.aten.copy_.default}


def plan_and_apply(
    graph: fx.Graph, options: Options, target: Target, store: TimingStore, frozen: Mapping[fx.Node, Tensor], is_inference: bool,
    known: Sequence[Plan] = (), follow: bool = False, dilution: float = DILUTION,
) -> Plan:  # fmt: skip
    """Plan a functional ATen graph, unless one of the known plans is for it, and rewrite it in place.

    With `follow`, PlanError where none of them is. A graph with collectives gets a lossless plan: to check a lossy one, a rank
    would run it once more than others do. So does a backward graph, since no check sees gradients.
    """
    names = [n.name for n in graph.nodes if n.op == "placeholder"]
    backward = any(name.startswith("tangents") for name in names)
    kind = "inference" if is_inference else "backward" if backward else "forward"
    if backward or collectives.present(graph):
        options = replace(options, error_budget=0.0)
    view = GraphView(graph, frozen)
    before = interface(graph)
    key = plan_key(graph, frozen)
    plan = next((p for p in known if p.fingerprint == key and p.kind == kind), None)
    if follow and plan is None:
        raise PlanError("the stored plan is not for this graph: the model or torch has changed since. Solve again.")
    torch_private.counters()["known_plans"] += plan is not None
    if follow and plan is not None:
        failed = Trust(store, target.environment).of_plan(plan, lambda: Recogniser(view, options).regions())
        if failed is not None:
            raise PlanError(f"the stored plan uses what failed here: {failed}. Solve again.")
        other = edited(view, options, Roofline(target), plan.choices)
        if other is not None:
            raise PlanError(f"the stored plan was edited, or made with other kernel libraries: {other}. Solve again.")
    plan = plan or make_plan(view, options, target, store, fingerprint=key, kind=kind, dilution=dilution)
    collected = torch_private.collected()
    if collected is not None:
        collected.limits |= narrower(graph, frozen, options, plan.choices)
    applied = apply_plan(view, plan.choices)
    torch_private.counters()["kernels"] += applied
    verify(graph, before)
    torch_private.trace_artifact(f"layerzero_plan_{kind}", lambda: repr(plan))
    return plan


def _changes(plan: Plan) -> bool:
    """Whether a plan does anything that Inductor alone would not."""
    return any(not c.candidate.as_is and c.candidate.region.op in _REGIONS for c in plan.choices)


_REGIONS = {*semantics.REFERENCES, "all_reduce"}
