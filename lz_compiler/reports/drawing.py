"""A plan as rows to draw, in the graph's order: regions, fused loops and conversions, with repeated layers folded into one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..problem import LOOP
from ..types import Choice, Conversion, Cost, Plan


@dataclass(slots=True)
class Row:
    """One region, one group of fused loops or one conversion. `identity` is equal for rows that may be folded."""

    identity: Hashable
    name: str
    ns: int
    data: dict[str, Any]
    choices: list[int] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    traffic: int = 0  # ns of entering and leaving memory; not in the identity: the first of several readers pays


def identity(choice: Choice) -> Hashable:
    """What the members of repeated layers have in common."""
    c = choice.candidate
    params = tuple((k, repr(v)) for k, v in c.params if k in ("mask", "act", "binary", "variant"))
    work = (choice.flops, choice.nbytes) if choice.nbytes else ()
    return c.kernel, c.region.op, c.key or work or c.region.nodes, c.in_formats, c.out_formats, params, choice.cost


def drawing(plan: Plan, index: dict[Hashable, int]) -> list[dict[str, Any]]:
    """Rows of `plan`; `index` gives a region's number in the report by its identity.

    A repeat is {"repeat": count, "rows": [...]}. Every other row has an `id`, the ids of the rows `from` which it reads (one that
    is not smaller than its own: of the repetition before), the ns of all instances, and the name of each instance.
    """
    rows = list(_rows(plan, index))
    folded = _folded(rows, list(range(len(rows))))
    ids: dict[int, int] = {}  # of a row -> of what is drawn for it
    _number(folded, ids, [0])
    owner = {choice: i for i, row in enumerate(rows) for choice in row.choices}
    entries: dict[int, dict[str, Any]] = {}
    for i, row in enumerate(rows):
        entry = entries.setdefault(ids[i], {**row.data, "id": ids[i], "names": [], "from": set(), "total_ns": 0, "traffic_ns": 0})
        entry["names"].append(row.name)
        if row.data["kind"] == "region":
            nodes = plan.choices[row.choices[0]].candidate.region.nodes
            entry.setdefault("nodes", []).append(list(nodes))
            entry.setdefault("modules", []).append(module_of(plan, nodes))
        entry["total_ns"] += row.ns + row.traffic
        entry["traffic_ns"] += row.traffic
        sources = {owner[c] for c in row.reads if c in owner} - {i}
        entry["from"] |= {ids[s] for s in sources}
    for entry in entries.values():
        entry["from"] = sorted(entry["from"])
    return [_drawn(item, ids, entries) for item in folded]


def module_of(plan: Plan, nodes: Sequence[str]) -> str:
    """The modules that made a region's nodes, `blocks.3.attention.q|k|v`: the innermost ones. "" where the plan does not know."""
    found = list(dict.fromkeys(plan.modules[n] for n in nodes if n in plan.modules))
    found = [m for m in found if not any(other.startswith(f"{m}.") for other in found)]
    parents = {m.rpartition(".")[0] for m in found}
    if len(found) < 2 or len(parents) > 1:
        return ", ".join(found)
    return ".".join(filter(None, (parents.pop(), "|".join(m.rpartition(".")[2] for m in found))))


def unfolded(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a drawing, without its repeats."""
    for row in rows:
        yield from unfolded(row["rows"]) if "repeat" in row else (row,)


def _rows(plan: Plan, index: dict[Hashable, int]) -> Iterator[Row]:
    makers = {t: i for i, c in enumerate(plan.choices) for t in c.candidate.region.outputs}
    readers: dict[tuple[str, Any], int] = {}
    for i, c in enumerate(plan.choices):
        for pair in zip(c.candidate.region.inputs, c.candidate.in_formats, strict=True):
            readers.setdefault(pair, i)
    moved: dict[int, int] = {}  # ns of memory traffic, of the loop that reads or writes
    before: dict[int, list[tuple[Conversion, Cost]]] = {}
    for conversion, cost in plan.conversions:
        reader = readers.get((conversion.tensor, conversion.dst), len(plan.choices))
        if conversion.src.layout.startswith("fused") or ("fused" in conversion.dst.layout and reader == len(plan.choices)):
            reader = makers.get(conversion.tensor, reader)
        if "fused" in conversion.src.layout or "fused" in conversion.dst.layout:
            moved[reader] = moved.get(reader, 0) + cost.ns
        else:
            before.setdefault(reader, []).append((conversion, cost))
    loops: list[int] = []
    for i in _order(plan):
        choice = plan.choices[i]
        if loops and (choice.candidate.kernel != LOOP or i in before):
            yield _loop_row(plan, loops, moved)
            loops = []
        yield from (_conversion_row(c, cost, makers) for c, cost in before.get(i, ()))
        if choice.candidate.kernel == LOOP:
            loops.append(i)
        else:
            same = identity(choice)
            name = ", ".join(choice.candidate.region.outputs)
            data = {"kind": "region", "region": index[same]}
            yield Row(("region", same), name, choice.cost.ns, data, [i], list(choice.after), moved.get(i, 0))
    if loops:
        yield _loop_row(plan, loops, moved)
    yield from (_conversion_row(c, cost, makers) for c, cost in before.get(len(plan.choices), ()))


def _order(plan: Plan) -> Iterator[int]:
    """The graph's order, but loops wait until a kernel needs them: those between two kernels are then together. What no kernel comes
    before (a rotary table, a mask) is first, since all layers share it."""
    loops = {i for i, c in enumerate(plan.choices) if c.candidate.kernel == LOOP}
    done: set[int] = set()
    for i in sorted(loops):
        if done.issuperset(plan.choices[i].after):
            done.add(i)
    yield from sorted(done)
    for i in range(len(plan.choices)):
        if i not in loops:
            needed, stack = {i}, [i]
            while stack:
                fresh = [a for a in plan.choices[stack.pop()].after if a in loops and a not in done and a not in needed]
                needed.update(fresh)
                stack += fresh
            yield from sorted(needed)
            done |= needed
    yield from sorted(loops - done)


def _loop_row(plan: Plan, loops: Sequence[int], moved: dict[int, int]) -> Row:
    members = [plan.choices[i] for i in loops]
    ops = Counter(c.candidate.region.op for c in members)
    arithmetic, traffic = sum(c.cost.ns for c in members), sum(moved.get(i, 0) for i in loops)
    first, last = members[0].candidate.region.nodes[0], members[-1].candidate.region.nodes[-1]
    name = first if first == last else f"{first} … {last}"
    same = ("loop", tuple(c.candidate.region.op for c in members), arithmetic)
    data = {"kind": "loop", "ops": dict(ops), "nodes": len(loops)}
    return Row(same, name, arithmetic, data, list(loops), sorted({a for c in members for a in c.after}), traffic)


def _conversion_row(conversion: Conversion, cost: Cost, makers: dict[str, int]) -> Row:
    src, dst = str(conversion.src), str(conversion.dst)
    data = {"kind": "conversion", "src": src, "dst": dst, "source": cost.source}
    reads = [makers[conversion.tensor]] if conversion.tensor in makers else []
    return Row(("conversion", src, dst, cost.ns), conversion.tensor, cost.ns, data, [], reads)


# --- folding --------------------------------------------------------------------------------------------------------------


def _folded(rows: Sequence[Row], places: list[int]) -> list[Any]:
    """`places` with every run of repetitions as (count, folded first repetition, all places): largest saving first."""
    numbers: dict[Hashable, int] = {}
    word = [numbers.setdefault(rows[p].identity, len(numbers)) for p in places]
    best = (0, 0, 0, 0)  # rows saved, -period, -start, count
    for period in range(1, len(word) // 2 + 1):
        run = 0
        for i in range(len(word) - period, -1, -1):
            run = run + 1 if i < len(word) - period and word[i] == word[i + period] else 0
            if run >= period:
                count = run // period + 1
                best = max(best, (period * (count - 1), -period, -i, count))
    saved, period, start, count = best[0], -best[1], -best[2], best[3]
    if saved == 0:
        return list(places)
    end = start + period * count
    body = (count, _folded(rows, places[start : start + period]), places[start:end])
    return [*_folded(rows, places[:start]), body, *_folded(rows, places[end:])]


def _number(items: list[Any], ids: dict[int, int], counter: list[int], copies: Sequence[int] = (0,)) -> None:
    """The id of what is drawn for each row: of its counterpart in the first repetition. `copies`: offsets of the repetitions."""
    for item in items:
        if isinstance(item, int):
            for offset in copies:
                ids[item + offset] = counter[0]
            counter[0] += 1
        else:
            count, body, places = item
            period = len(places) // count
            _number(body, ids, counter, [offset + k * period for offset in copies for k in range(count)])


def _drawn(item: Any, ids: dict[int, int], entries: dict[int, dict[str, Any]]) -> dict[str, Any]:
    if isinstance(item, int):
        return entries[ids[item]]
    count, body, _ = item
    return {"repeat": count, "rows": [_drawn(inner, ids, entries) for inner in body]}
