"""Files that somebody else wrote: one clear error each, or set aside; nothing in them is run, nothing is read without a limit."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import pickle
import random
import sqlite3
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine import PEAKS

import lz_compiler as lz
from lz_compiler import cache_folder, facts, plan_io
from lz_compiler.backends import all_backends
from lz_compiler.deploy import warming
from lz_compiler.deploy.model_fingerprint import Fingerprint, fingerprint
from lz_compiler.deploy.offline import ModelPlan, load_plan
from lz_compiler.deploy.warming import check_manifest
from lz_compiler.errors import CapabilityError, FingerprintError, LayerZeroError, OptionError, PlanError, PolicyError
from lz_compiler.plan_io import verdict_or_none, verdict_to_dict
from lz_compiler.target import stored_target
from lz_compiler.timings import FILE_NAME, StoreError, Timing, TimingStore
from lz_compiler.trust import failures
from lz_compiler.trust.descriptors import Descriptor, read
from lz_compiler.trust.policy import Policy, load_policy
from lz_compiler.trust.verdicts import FAILED, Trust, hardware, last_run, remember

posix = pytest.mark.skipif(sys.platform == "win32", reason="owners, links and pipes of POSIX")
HERE = Path(__file__).parent
FOLDER = Path(lz.__file__).parent
ENV = {"device": "cpu", "name": "box", "threads": "2", "torch": "2"}
SECONDS = 5.0  # no answer may take longer

# --- damage -----------------------------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["../../etc/passwd", "__import__('os').system('touch pwned')", "nan", "os.system", 10**30, -1, 1e308, "\0"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=5
)


@st.composite
def damaged(draw: st.DrawFn, text: str) -> bytes:
    """JSON in which a value or a key was exchanged, or taken away, or some bytes are others, or the end is missing."""
    if draw(st.booleans()):
        data = bytearray(text.encode())
        for _ in range(draw(st.integers(1, 4))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)
    top = {"": json.loads(text)}
    for _ in range(draw(st.integers(1, 3))):
        place: Any = top
        while isinstance(place, (dict, list)) and place:
            key = draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
            if not isinstance(place[key], (dict, list)) or draw(st.integers(0, 5)) == 0:
                if draw(st.booleans()):
                    place[key] = draw(VALUES)
                else:
                    place.pop(key)
                break
            place = place[key]
    return json.dumps(top.get("")).encode()


BOMBS = {
    "deep": b"[" * 200_000, "deep object": b'{"a":' * 100_000, "deep and whole": b"[" * 900 + b"]" * 900, "digits": b"9" * 100_000,
    "not UTF-8": b'{"a": "\xff\xfe"}', "empty": b"", "NUL": b"\0" * 100,
    "pickle": pickle.dumps(os.system), "twice": b"{}{}", "inf": b"1e999",
}  # fmt: skip
fuzzed = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def one_error(error: type[LayerZeroError], read_it: Callable[[], object]) -> object:
    """What reading gives, or None where it raised the one class of error, in words of bounded length; anything else fails."""
    start = time.process_time()
    try:
        found = read_it()
    except error as raised:
        found, told = None, str(raised)
    else:
        told = "read without an error"
    assert 10 < len(told) < 4000
    assert time.process_time() - start < SECONDS
    return found


@pytest.fixture(autouse=True)
def nothing_is_executed() -> Iterator[None]:
    """No text of a file becomes code: nothing but Python's own import machinery compiles, nothing is started or unpickled."""
    found: list[str] = []
    watching = True

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if watching and event in ("os.system", "subprocess.Popen", "pickle.find_class", "os.exec", "os.posix_spawn"):
            found.append(event)

    sys.addaudithook(hook)
    yield
    watching = False
    assert not found


# --- plans ------------------------------------------------------------------------------------------------------------------


@functools.cache
def plan_text() -> str:
    """A real model plan: of a stored form that the reader accepts, without compiling anything."""
    fmt = {"layout": "strided", "dtype": "float32"}
    region = {"op": "linear", "nodes": ["mm"], "inputs": ["x"], "outputs": ["mm"]}
    candidate = {
        "kernel": "aten.mm", "region": region, "in_formats": [fmt], "out_formats": [fmt], "epsilon": 0.0, "workspace": 0,
        "params": [["as_is", True], ["values", [1, 2]]], "key": "k",
    }  # fmt: skip
    cost = {"ns": 5, "source": "measured", "spread": 1, "factor": 1.0}
    choice = {
        "candidate": candidate, "cost": cost, "alternatives": [[candidate, cost]],
        "rejections": [{"kernel": "aten.mm", "code": "dtype", "detail": "no"}],
    }  # fmt: skip
    plan = {
        "schema_version": 1, "fingerprint": "f", "kind": "inference", "environment": ENV, "choices": [choice],
        "conversions": [[{"tensor": "x", "src": fmt, "dst": fmt}, cost]], "objective": 5, "bound": 5, "status": "optimal",
        "solver": "cp_sat", "epsilon": 0.0, "plan_s": 0.1, "notes": ["n"], "barred": [],
    }  # fmt: skip
    cells = [{"ranges": {"seq": r}, "fingerprint": "f", "winner": "layerzero", "times": {"eager": 1.0}, "error": None, "plans": [plan]}
             for r in ([1, 1], [2, 8], [9, 32])]  # fmt: skip
    return json.dumps({
        "layerzero_model_plan": 2, "layerzero": "0.1.0", "model": "M", "environment": ENV,
        "options": {"mode": "default", "layout_mode": "adapt", "error_budget": 0.0, "cudagraphs": False},
        "dynamic": {"x": {"1": "seq"}}, "buckets": {"seq": [8, 32]}, "arguments": ["x"], "cells": cells, "constants": {"n": "3"},
        "leaves": ["x", "n"], "written": ["x"], "autocast": "",
        "tensors": [{"dtype": "float32", "device": "cpu", "shape": [2, -1], "order": [0, 1]}],
    })  # fmt: skip


def load(folder: Path, data: bytes) -> object:
    (folder / "p.json").write_bytes(data)
    return one_error(PlanError, lambda: load_plan(folder / "p.json"))


def test_plans(tmp_path: Path) -> None:
    assert isinstance(load(tmp_path, plan_text().encode()), ModelPlan)

    @fuzzed
    @given(damaged(plan_text()))
    def fuzz(data: bytes) -> None:
        found = load(tmp_path, data)
        if found is not None:  # what was accepted can be written, and read again as it is
            assert isinstance(found, ModelPlan)
            found.save(tmp_path / "again.json")
            assert repr(load_plan(tmp_path / "again.json")) == repr(found)

    fuzz()
    for name, bomb in BOMBS.items():
        assert load(tmp_path, bomb) is None, name
        inside = plan_text().replace('"3"', bomb.decode("latin-1")).encode("latin-1")
        load(tmp_path, inside)


def test_plans_of_many_cells_names_of_many_letters_and_large_files(tmp_path: Path) -> None:
    data = json.loads(plan_text())
    buckets = {f"s{i}": list(range(1, 40)) for i in range(30)}  # 39**30 cells
    cells = json.loads(json.dumps(data["cells"]))
    cells[0]["plans"][0]["choices"][0]["candidate"]["kernel"] = "k" * 1_000_000
    for change in (
        {"buckets": buckets},
        {"cells": cells},
        {"tensors": [{"dtype": "_inductor", "device": "cpu", "shape": [], "order": []}]},
    ):
        assert load(tmp_path, json.dumps({**data, **change}).encode()) is None
    with (tmp_path / "p.json").open("wb") as file:
        file.truncate(plan_io.MAX_BYTES + 1)
    with pytest.raises(PlanError, match="more than 67108864 bytes"):
        load_plan(tmp_path / "p.json")
    with pytest.raises(PlanError, match="it is a folder"):
        load_plan(tmp_path)


def test_verdicts(tmp_path: Path) -> None:
    """A record that was damaged after its checksum was made, or written by another version, is no verdict."""
    plan = json.loads(plan_text())["cells"][0]["plans"][0]
    good = {"winner": "layerzero", "times": {"eager": 1.0}, "plans": [plan], "error": None, "written": [1], "calls": {"k": {"f": 2}}}
    read = verdict_or_none(good)
    assert read is not None
    assert (read.winner, read.times, read.written, read.calls) == ("layerzero", {"eager": 1.0}, (1,), {"k": {"f": 2}})
    text = json.dumps(verdict_to_dict(read))
    again = verdict_or_none(json.loads(text))
    assert again is not None
    assert json.dumps(verdict_to_dict(again)) == text
    assert verdict_or_none(None) is None

    @fuzzed
    @given(damaged(json.dumps(good)))
    def fuzz(data: bytes) -> None:
        value = facts.parsed(data)
        verdict_or_none(value)

    fuzz()
    for name in ("winner", "times", "plans"):
        assert verdict_or_none({k: v for k, v in good.items() if k != name}) is None
    assert verdict_or_none({**good, "lossless": [plan]})
    for wrong in (
        {"lossless": 5},
        {"lossless": [5]},
        {"written": ["a"]},
        {"times": {"eager": "x"}},
        {"winner": "nobody"},
        {"dilution": 0},
        {"over": 1},
    ):
        assert verdict_or_none({**good, **wrong}) is None, wrong


# --- policies, descriptors, fingerprints ---------------------------------------------------------------------------------------

POLICY = {
    "lock": [{"name": "a", "op": "linear", "kernel": "aten.*", "rows": ">= 128, < 4096"}],
    "avoid": [{"dtype": ["float32"], "factor": 3}],
}


def policy(folder: Path, data: bytes, name: str = "p.yaml") -> object:
    (folder / name).write_bytes(data)
    return one_error(PolicyError, lambda: load_policy(str(folder / name), "policy"))


def test_policies(tmp_path: Path) -> None:
    assert isinstance(policy(tmp_path, json.dumps(POLICY).encode()), Policy)

    @fuzzed
    @given(damaged(json.dumps(POLICY)), st.sampled_from(["p.json", "p.yaml"]))
    def fuzz(data: bytes, name: str) -> None:
        policy(tmp_path, data, name)

    fuzz()
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    merged = "a0: &a0 {x0: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30))
    yaml_bombs = {
        "laughs": laughs, "merged": merged, "object": "!!python/object/apply:os.system [touch pwned]", "cycle": "lock: &a [*a]",
        "hexadecimal": f"deny: [{{op: linear, rows: 0x{'f' * 9000}}}]", "factor": f"avoid: [{{op: linear, factor: 0x{'f' * 9000}}}]",
        "large": "#" * (1 << 18), "laughing rules": laughs + "deny: *a29\n", "key": "? [a]\n: 1",
    }  # fmt: skip
    for name, text in yaml_bombs.items():
        assert policy(tmp_path, text.encode()) is None, name
    for name, bomb in BOMBS.items():
        for file in ("p.json", "p.yaml"):
            assert policy(tmp_path, bomb, file) is None, name


def test_descriptors(tmp_path: Path) -> None:
    text = (FOLDER / "backends" / "onednn.json").read_text()
    path = tmp_path / "onednn.json"

    @fuzzed
    @given(damaged(text))
    def fuzz(data: bytes) -> None:
        path.write_bytes(data)
        one_error(CapabilityError, lambda: read(path, "onednn"))

    fuzz()
    for bomb in (*BOMBS.values(), b" " * (1 << 21), b'{"schema": 1, "backend": "onednn", "kernels": ' + b"[" * 950 + b"]" * 950 + b"}"):
        path.write_bytes(bomb)
        assert one_error(CapabilityError, lambda: read(path, "onednn")) is None
    path.write_text(text)
    assert isinstance(read(path, "onednn"), Descriptor)


def test_fingerprints(tmp_path: Path) -> None:
    good = {"schema_version": 2, "tokenizer": {"a": "0" * 32}, "config": {}, "weights": {"w": "f" * 32}}
    assert isinstance(Fingerprint.from_dict(good), Fingerprint)

    @fuzzed
    @given(damaged(json.dumps(good)))
    def fuzz(data: bytes) -> None:
        with suppress(ValueError, RecursionError):
            value = json.loads(data)
            one_error(FingerprintError, lambda: Fingerprint.from_dict(value))

    fuzz()
    folder = tmp_path / "model"
    folder.mkdir()
    for bomb in BOMBS.values():
        (folder / "config.json").write_bytes(bomb)
        assert one_error(FingerprintError, lambda: fingerprint(folder, str(tmp_path / "cache"))) is None


# --- baked folders --------------------------------------------------------------------------------------------------------------


def baked(folder: Path, source: str = "EXAMPLES = {}\n") -> Path:
    """A folder as `lz.bake` leaves it, with a small program."""
    (folder / "kernels").mkdir(parents=True)
    (folder / "_layerzero_plan.py").write_text(source)
    (folder / "kernels" / "loop_0.so").write_bytes(b"ELF")
    files = {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}
    (folder / "manifest.json").write_text(json.dumps({"layerzero_bake": 1, "layerzero": "0", "environment": {}, "files": files}))
    return folder


def rewritten(folder: Path, **names: str) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**data, "files": {**data["files"], **names}}))


def test_manifests(tmp_path: Path) -> None:
    folder = baked(tmp_path / "out")
    text = (folder / "manifest.json").read_text()
    assert warming.load_baked(folder).EXAMPLES == {}

    @fuzzed
    @given(damaged(text))
    def fuzz(data: bytes) -> None:
        (folder / "manifest.json").write_bytes(data)
        one_error(PlanError, lambda: check_manifest(folder))

    fuzz()
    for bomb in (*BOMBS.values(), b" " * (1 << 23)):
        (folder / "manifest.json").write_bytes(bomb)
        assert one_error(PlanError, lambda: check_manifest(folder) or 1) is None


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "kernels/../../x", "a\\b", "./a", "a//b", "..", ".", "", "a\0b"])
def test_a_name_that_leads_out_of_a_baked_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = baked(tmp_path / "deep" / "out")
    (tmp_path / "x").write_text("x")
    rewritten(folder, **{name: hashlib.sha256(b"x").hexdigest()})
    with pytest.raises(PlanError, match=r"names .* which is no file in the folder"):
        lz.load_baked(folder)


def test_a_changed_file_is_named_and_nothing_of_it_runs(tmp_path: Path) -> None:
    evil = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nEXAMPLES = {}\n"
    changes: dict[str, Callable[[Path], object]] = {
        "_layerzero_plan.py": lambda f: (f / "_layerzero_plan.py").write_text(evil + "#"),
        "kernels/loop_0.so": lambda f: (f / "kernels" / "loop_0.so").write_bytes(b"ELf"),
        "kernels/more.so": lambda f: (f / "kernels" / "more.so").write_bytes(b"ELF"),
        "manifest.json": lambda f: (f / "manifest.json").unlink(),
        "a{190}.* is missing": lambda f: rewritten(f, **{"a" * 300: ""}),
        "ud800.* is missing": lambda f: rewritten(f, **{"\ud800": ""}),
        "not one of this version": lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text()[:-1] + ', "bundle": [1]}'),
        "is a link": lambda f: ((f / "kernels").rename(f / "other"), (f / "kernels").symlink_to("other")),
    }
    for i, (named, change) in enumerate(changes.items()):
        folder = baked(tmp_path / str(i), evil)
        change(folder)
        for load_it in (lz.load_baked, lz.warmup):
            with pytest.raises(PlanError, match=named):
                load_it(folder)
        assert not (folder / "ran").exists()


def test_a_planted_bytecode_file_is_not_run(tmp_path: Path) -> None:
    """Python would load it instead of the source that was compared."""
    folder = baked(tmp_path / "out", "WHO = 'good'\nEXAMPLES = {}\n")
    source = folder / "_layerzero_plan.py"
    found, good = source.stat(), source.read_text()
    source.write_text(good.replace("good", "evil"))
    os.utime(source, ns=(found.st_atime_ns, found.st_mtime_ns))
    import py_compile

    py_compile.compile(str(source))
    source.write_text(good)
    os.utime(source, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert lz.load_baked(folder).WHO == "good"


# --- the store ------------------------------------------------------------------------------------------------------------------


def timing(i: int) -> Timing:
    return Timing(f"key {i} of a region|torch=2", "aten.mm", 1000 + i, i, 9, None if i % 7 else "wrong: error 3", 0.25 * i, "linear")


def filled(folder: Path, count: int = 120) -> dict[str, Timing]:
    store = TimingStore.open(folder)
    known = {t.key: t for t in map(timing, range(count))}
    store.put_many(known.values())
    for i in range(20):
        store.put_record("verdict", f"g{i}", {"winner": "eager", "number": i, "text": "x" * 300})
    store.close()
    return known


@pytest.mark.parametrize("fill", [b"\0", b"\xff", None])
def test_a_damaged_store_gives_right_facts_or_none_and_says_so(tmp_path: Path, fill: bytes | None) -> None:
    """At every 1 KiB of the file: structure and checksums find what SQLite itself would pass on as a number."""
    known = filled(tmp_path / "good")
    whole, noise = (tmp_path / "good" / FILE_NAME).read_bytes(), random.Random(0)
    for offset in range(0, len(whole), 1024):
        folder = tmp_path / str(offset)
        folder.mkdir(mode=0o700)
        block = noise.randbytes(1024) if fill is None else fill * 1024
        (folder / FILE_NAME).write_bytes(whole[:offset] + block + whole[offset + 1024 :])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            store = TimingStore.open(folder)
            found, records = store.get_many(known), store.get_records("verdict")
        assert all(known[key] == value for key, value in found.items())
        assert all(key == f"g{value['number']}" for key, value in records.items())
        if len(found) + len(records) < len(known) + 20:
            assert caught, offset
        store.put(timing(999))
        store.close()
        assert TimingStore.open(folder).get(timing(999).key) == timing(999)


def forged(folder: Path, *statements: str) -> TimingStore:
    filled(folder, 3)
    with closing(sqlite3.connect(folder / FILE_NAME, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)
    return TimingStore.open(folder)


def test_somebody_elses_schema_is_not_queried(tmp_path: Path) -> None:
    """A view without end, a trigger: moved aside before anything asks for their rows."""
    endless = "CREATE VIEW timings AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i AS key FROM n"
    trigger = "CREATE TRIGGER t AFTER INSERT ON timings BEGIN DELETE FROM records; END"
    for i, statements in enumerate((["DROP TABLE timings", endless], [trigger], ["CREATE TABLE more (a)"])):
        with pytest.warns(UserWarning, match="is damaged. It was moved"):
            store = forged(tmp_path / str(i), *statements)
        assert not store.ls().entries
        (aside,) = (tmp_path / str(i)).glob("*.corrupt-*")
        with pytest.raises(StoreError, match="cannot be read as a timings store"):
            store.merge(aside)


@posix
def test_a_folder_into_which_others_may_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "open"
    filled(folder, 3)
    cases: dict[str, tuple[Path, int]] = {"folder": (folder, 0o777), "file": (folder / FILE_NAME, 0o666)}
    for path, mode in cases.values():
        before = path.stat().st_mode
        path.chmod(mode)
        with pytest.warns(UserWarning, match="everyone may write"):
            store = TimingStore.open(folder)
        assert store.path is None
        assert store.get(timing(1).key) is None  # nor is it believed
        path.chmod(before)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(os, "stat", lambda path, stat=os.stat: os.stat_result([*stat(path)[:4], 54321, *stat(path)[5:]]))
    with pytest.raises(cache_folder.UnsafeFolderError, match="belongs to another user"):
        cache_folder.check(folder / FILE_NAME)


# --- reports of baked files -------------------------------------------------------------------------------------------------


REPORT: dict[str, Any] = {
    "layerzero_failure": 1, "cell": "cell_0", "plan": "0123456789abcdef", "error": "RuntimeError: \x1b[2J no\n", "environment": ENV,
    "failed": [{"kernel": "aten.mm", "version": "1", "library": "2.13.0", "op": "linear", "dtype": "float32"}],
}  # fmt: skip


def test_reports_of_baked_files(tmp_path: Path) -> None:
    """One of a few classes of error, told in few words, or a report of which every text is short and harmless."""
    path = tmp_path / "r.json"

    def read(data: bytes) -> failures.FailureReport | None:
        path.write_bytes(data)
        start = time.process_time()
        try:
            found = failures.read(path)
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            return None
        assert time.process_time() - start < SECONDS
        texts = [found.error, found.cell, found.plan, *found.environment, *found.environment.values()]
        texts += [getattr(f, name) for f in found.failed for name in failures.Failed.__slots__]
        assert all(isinstance(t, str) and len(t) <= failures.MAX_TEXT and (not t or t.isprintable()) for t in texts)
        assert len(found.failed) <= failures.MAX_KERNELS
        return found

    good = read(json.dumps(REPORT).encode())
    assert good is not None
    assert good.error == "RuntimeError: [2J no"
    for bomb in BOMBS.values():
        assert read(bomb) is None
    many, long = {**REPORT, "failed": REPORT["failed"] * 65}, {**REPORT, "error": "x" * 1001}
    other, named = {**REPORT, "layerzero_failure": 2}, {**REPORT, "failed": [{**REPORT["failed"][0], "op": "../../etc|x"}]}
    for wrong in (many, long, other, named, {**REPORT, "padding": "x" * failures.MAX_BYTES}):
        assert read(json.dumps(wrong).encode()) is None

    @fuzzed
    @given(damaged(json.dumps(REPORT)))
    def exchanged(data: bytes) -> None:
        read(data)

    exchanged()


@posix
def test_reports_that_are_no_plain_files_are_set_aside(tmp_path: Path) -> None:
    store, folder = TimingStore.open(tmp_path / "cache"), tmp_path / "cache" / failures.FOLDER
    folder.mkdir(mode=0o700)
    (tmp_path / "secret").write_text(json.dumps(REPORT))
    (folder / "a.json").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "b.json")
    (folder / "c.json").mkdir()
    (folder / "d.json").write_text(json.dumps(REPORT))
    (folder / "d.json").chmod(0o666)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        failures.take(store)
    assert len(caught) == 4
    assert all("is no report of a baked file" in str(w.message) for w in caught)
    assert sorted(p.suffix for p in folder.iterdir()) == [failures.DAMAGED] * 4
    for i in range(failures.MAX_FILES + 50):  # of another machine: they stay, and no more than so many are read
        (folder / f"{i}.json").write_text(json.dumps(REPORT))
    start = time.process_time()
    failures.take(store)
    assert time.process_time() - start < SECONDS
    assert not store.get_records(failures.KIND)


@posix
def test_links_and_pipes_in_the_cache_folder_are_refused(tmp_path: Path) -> None:
    filled(tmp_path / "victim", 3)
    before = (tmp_path / "victim" / FILE_NAME).read_bytes()
    for i, make in enumerate((lambda p: p.symlink_to(tmp_path / "victim" / FILE_NAME), os.mkfifo, Path.mkdir)):
        folder = tmp_path / str(i)
        folder.mkdir()
        make(folder / FILE_NAME)
        with pytest.warns(UserWarning, match="not a plain file"):
            store = TimingStore.open(folder)
        store.put(timing(1))
        assert store.path is None
    assert (tmp_path / "victim" / FILE_NAME).read_bytes() == before
    (tmp_path / "linked").symlink_to(tmp_path / "victim")  # the user's own: to another disk
    assert TimingStore.open(tmp_path / "linked").get(timing(1).key) == timing(1)


def test_records_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    """Whole rows with right checksums, and nonsense in them."""
    store = TimingStore.open(tmp_path)
    key = hardware(ENV)
    for value in ({"backends": 3}, {"backends": [3, None, "aten", "no such"]}, {"backends": {"a": 1}}, {}):
        store.put_record(FAILED, key, value)
        assert Trust(store, ENV).failed == {}
    for peaks in (
        {}, {"bandwidth": -1, "flops": [], "launch_ns": None}, {"bandwidth": "1e9", "flops": {"float32": 1}, "launch_ns": 1},
        {**PEAKS, "inductor": 3}, {**PEAKS, "inductor": {"bandwidth": 1e12}}, {**PEAKS, "inductor": {**PEAKS, "bandwidth": -1}},
    ):  # fmt: skip
        store.put_record("peaks", "device=cpu|name=box|torch=2", peaks)
        with pytest.raises(OptionError, match="unknown target 'box'"):
            stored_target(store, "box")
    aten = all_backends()["aten"]
    for run in ("x", [1], None):
        for version in "12":
            store.put_record("canary", f"aten|{version}|d|name=box", {"capabilities": {}, "run": run})
        remember(store, aten, ENV, {"capabilities": {}})
        assert last_run(store, aten, ENV) == {"capabilities": {}, "run": 1}
        store.clear("canary")


# --- exported files ----------------------------------------------------------------------------------------------------------


def test_exported_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, file = TimingStore.open(tmp_path / "a"), tmp_path / "f.jsonl"
    store.put_many(map(timing, range(3)))
    store.put_record("canary", "aten|1|d|device=cpu", {"capabilities": {"k": {"status": "failed", "shape": "", "detail": ""}}})
    store.export(file)
    lines = file.read_text().splitlines()
    target = TimingStore.open(tmp_path / "b")

    @fuzzed
    @given(st.sampled_from(lines).flatmap(damaged))
    def fuzz(line: bytes) -> None:
        file.write_bytes(line + b"\n")
        one_error(StoreError, lambda: target.merge(file))
        target.ls()

    fuzz()
    for name, bomb in BOMBS.items():
        file.write_bytes(bomb + b"\n")
        assert one_error(StoreError, lambda: target.merge(file)) is None, name
    monkeypatch.setattr(facts, "MAX_LINE", 50)
    file.write_text("\n".join(lines))
    with pytest.raises(StoreError, match=r"line 1: .*more than 50 bytes"):
        target.merge(file)


FACT = {"key": "k", "kernel": "x", "ns": 1, "spread": 0, "samples": 1, "error": None, "epsilon": 0.0, "detail": ""}
PASSED = {"capabilities": {"x": {"status": "passed"}}}
ROWS: list[dict[str, Any]] = [
    {**FACT, "machine": "m", "measured": math.nan}, {"kind": "peaks", "key": "a", "value": {}, "measured": math.inf},
    {**FACT, "key": "\ud800"}, {**FACT, "machine": "\ud800"}, {"kind": "peaks", "key": "\ud800", "value": {}},
    *({"kind": kind, "key": "a", "value": {}} for kind in ("timing", "verdict", "fingerprint", "import", "other")),
    *({"kind": "canary", "key": "a", "value": {"capabilities": {"x": {"status": status}}}} for status in ([], {}, 5)),
    {"kind": "canary", "key": "a", "value": {"capabilities": 5}}, {"kind": "canary", "key": "a", "value": {**PASSED, "run": "x"}},
    {"kind": "canary_failed", "key": "a", "value": {"backends": 5}},
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_a_row_that_no_export_writes_is_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    store, file = TimingStore.open(tmp_path / "a"), tmp_path / "f.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(StoreError, match=r"f\.jsonl, line 1: "):
        store.merge(file)
    assert not store.ls().counts


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("canary", PASSED, {"capabilities": {"x": {"status": []}}}),
        ("canary", PASSED, {"capabilities": {"x": 5}}),
        ("canary_failed", {"backends": ["aten"]}, {"backends": 5}),
    ],
)
def test_a_row_of_a_store_that_is_none_gives_way(tmp_path: Path, ours: bool, kind: str, right: Any, wrong: Any) -> None:
    here, there = TimingStore.open(tmp_path / "here"), TimingStore.open(tmp_path / "there")
    here.put_record(kind, "a", wrong if ours else right)
    there.put_record(kind, "a", right if ours else wrong)
    assert there.path is not None
    here.merge(there.path)
    assert here.get_record(kind, "a") == right
