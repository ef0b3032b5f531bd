import dataclasses
from .types import *
from .plan_io import _candidate, _format
def problem_to_dict(p):
    d = {f.name: getattr(p, f.name) for f in dataclasses.fields(p)}
    conv = lambda x: [[dataclasses.asdict(a) for a in v] for v in ()]
    return {
        "candidates": [dataclasses.asdict(c) for c in p.candidates], "costs": [dataclasses.asdict(c) for c in p.costs],
        "conversions": [dataclasses.asdict(c) for c in p.conversions], "conversion_costs": [dataclasses.asdict(c) for c in p.conversion_costs],
        "sources": sorted([[t, dataclasses.asdict(f)] for t, f in p.sources], key=str), "sinks": [[t, dataclasses.asdict(f)] for t, f in p.sinks],
        "error_budget": p.error_budget, "memory_limit": p.memory_limit, "candidate_class": p.candidate_class, "tensor_class": dict(p.tensor_class)}
def problem_from_dict(d):
    return Problem(tuple(map(_candidate, d["candidates"])), tuple(Cost(**c) for c in d["costs"]),
        tuple(Conversion(c["tensor"], _format(c["src"]), _format(c["dst"])) for c in d["conversions"]), tuple(Cost(**c) for c in d["conversion_costs"]),
        frozenset((t, _format(f)) for t, f in d["sources"]), tuple((t, _format(f)) for t, f in d["sinks"]), d["error_budget"], d["memory_limit"],
        tuple(d["candidate_class"]), dict(d["tensor_class"]))
