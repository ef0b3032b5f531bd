"""What each kernel library declares, and what `lz canary` tried and found, as the tables of docs/backends.md. Runs no kernel.

    python benchmarks/claims.py

Reads the reports that `lz canary --json` wrote (benchmarks/results/canary_<device>.json) and today's descriptors. A report of a
descriptor that has changed since is marked: its numbers are of the old one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lz_compiler.backends import OWN
from lz_compiler.trust.capabilities import descriptor
from lz_compiler.trust.verdicts import BAD

RESULTS = Path(__file__).parent / "results"
HEAD = "| backend | declared | tried | passed | seconds | |\n| --- | --- | --- | --- | --- | --- |"


def counts(run: Mapping[str, Any]) -> tuple[int, int, int]:
    """Capabilities declared, tried, passed."""
    found = Counter(verdict["status"] for verdict in run["capabilities"].values())
    return found.total(), found.total() - found["not_offered"], found["passed"]


def _without_numbers(detail: str) -> str:
    return re.sub(r"\d[\d.e-]*", "N", detail)


def remark(run: Mapping[str, Any], today: Mapping[str, str]) -> str:
    """What the numbers do not say: not complete, nothing offered and why, of another descriptor than today's."""
    declared, tried, passed = counts(run)
    details = [verdict["detail"] for verdict in run["capabilities"].values() if verdict["status"] in BAD]
    reasons = Counter(_without_numbers(detail) for detail in details)
    told = [f"not complete: {run['incomplete']}"] if run["incomplete"] else []
    if tried > passed:
        most = reasons.most_common(1)[0][0]
        told.append(f"**{tried - passed} did not pass**: {next(d for d in details if _without_numbers(d) == most)}")
    if declared and not tried:
        why = Counter(verdict["detail"] for verdict in run["capabilities"].values()).most_common(1)[0][0]
        told.append(f"nothing offered: {why or 'the report does not say why'}")
    if not run["digest"]:
        told.append("descriptor not named")
    elif run["digest"] != today.get(run["backend"]):
        told.append("**the descriptor has changed since**")
    return "; ".join(told)


def table(report: Mapping[str, Any], today: Mapping[str, str]) -> str:
    runs = [run for run in report["runs"] if not run["skipped"]]
    env, date = runs[0]["environment"], "; ".join(sorted({run["date"] for run in runs}))
    versions = ", ".join(f"{name} {env[name]}" for name in ("torch", "cuda", "cudnn", "threads") if name in env)
    lines = [f"{env['name']} ({versions}), {date}:", "", HEAD]
    for run in runs:
        version = "" if run["version"] in ("torch", "lz") else f" ({run['version']})"
        cells = (f"`{run['backend']}`{version}", *counts(run), f"{run['seconds']:.0f}", remark(run, today))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def tables() -> str:
    """The tables, and what no report tried: the text between the markers of docs/backends.md."""
    known = {backend.name: (backend, descriptor(backend)) for backend in (make() for make in OWN)}
    today = {name: found.digest for name, (_, found) in known.items() if found is not None}
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("canary_*.json"))]
    tried = {(run["backend"], run["device"]) for report in reports for run in report["runs"] if counts(run)[1]}
    never = [f"`{name}` ({device.upper()})" for name, (backend, _) in known.items() for device in backend.devices
             if name in today and (name, device) not in tried]  # fmt: skip
    texts = [table(report, today) for report in reports]
    return "\n\n".join([*texts, f"Nothing tried in any of these reports: {', '.join(never)}."])


if __name__ == "__main__":
    print(tables())
