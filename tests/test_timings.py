"""Real files, real processes. What happens to a store's file must cost measurements at most, never a run."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lz_compiler import facts as facts_module
from lz_compiler import timings as module
from lz_compiler.timings import FILE_NAME, SCHEMA_VERSION, Entry, StoreError, Timing, TimingStore

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX processes")


def row(key: str, ns: int | None = 100) -> Timing:
    return Timing(key, "aten.addmm", ns, 3, 9, None if ns else "RuntimeError: no", 0.5, "linear")


def rows(count: int, prefix: str = "k") -> list[Timing]:
    return [row(f"{prefix}{i}", i + 1) for i in range(count)]


def reopened(store: TimingStore) -> TimingStore:
    assert store.path is not None
    store.close()
    return TimingStore.open(store.path.parent)


def sql(path: Path, *statements: str) -> list[Any]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return [connection.execute(statement).fetchall() for statement in statements]


@pytest.fixture(autouse=True)
def no_unexpected_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def in_child(work: Callable[[], None]) -> None:
    """Runs in a fork, where it must end well within a minute."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads: what is tested here
        child = multiprocessing.get_context("fork").Process(target=work)  # type: ignore[attr-defined,unused-ignore]
        child.start()
    child.join(60)
    assert child.exitcode == 0


texts = st.text(st.characters(exclude_categories=["Cs"]))
int64 = st.integers(-(2**63), 2**63 - 1)
floats = st.floats().map(lambda value: value + 0.0)  # SQLite does not keep the sign of -0.0
timings = st.builds(Timing, texts, texts, st.none() | int64, int64, int64, st.none() | texts, floats, texts)


@settings(max_examples=40, deadline=None)
@given(st.lists(timings, unique_by=lambda t: t.key))
def test_timings_round_trip(tmp_path_factory: pytest.TempPathFactory, facts: list[Timing]) -> None:
    store = TimingStore.open(tmp_path_factory.mktemp("store"))
    store.put_many(facts)
    store = reopened(store)
    found = store.get_many([t.key for t in facts] + ["not there"])
    assert repr(sorted(found.items())) == repr(sorted((t.key, t) for t in facts))  # repr: NaN equals nothing
    store.close()


def test_facts_are_kept(tmp_path: Path) -> None:
    store = TimingStore.open(tmp_path / "new" / "deep")
    assert store.path == tmp_path / "new" / "deep" / FILE_NAME
    store.put(row("a", 1))
    store.put(row("a", 2))
    store.put(row("failed", None))
    store.put_record("plan", "p", {"b": [1, 2.5, None, "\u00e9"], "a": {"x": True}})
    store = reopened(store)
    assert store.get("a") == row("a", 2)
    assert store.get("failed") == row("failed", None)
    assert store.get("none") is None
    assert store.get_record("plan", "p") == {"b": [1, 2.5, None, "\u00e9"], "a": {"x": True}}
    assert store.get_record("verdict", "p") is None
    assert store.path is not None
    assert sql(store.path, "PRAGMA journal_mode", "PRAGMA user_version") == [[("wal",)], [(SCHEMA_VERSION,)]]


def test_many_are_read_at_once_and_only_once(tmp_path: Path) -> None:
    store = TimingStore.open(tmp_path)
    store.put_many(rows(1300))
    store = reopened(store)
    keys = [t.key for t in rows(1300)]
    assert list(store.get_many(keys)) == keys
    assert store.path is not None
    sql(store.path, "UPDATE timings SET ns = ns + 1")
    assert store.get_many(keys) == {t.key: t for t in rows(1300)}
    assert store.get("k1300") is None
    with closing(TimingStore.open(tmp_path)) as other:
        other.put(row("k1300"))
    assert store.get("k1300") == row("k1300")  # what is not there may come


def test_records_are_read_anew(tmp_path: Path) -> None:
    store, other = TimingStore.open(tmp_path), TimingStore.open(tmp_path)
    store.put_record("verdict", "g", {"best": 1})
    other.put_record("verdict", "g", {"best": 2})
    assert store.get_record("verdict", "g") == {"best": 2}
    other.clear("verdict")
    assert store.get_record("verdict", "g") is None


def test_damaged_rows_count_as_absent(tmp_path: Path) -> None:
    store = TimingStore.open(tmp_path)
    store.put_many(rows(2))
    for key in ("cut", "list", "bytes", "deep", "good"):
        store.put_record("plan", key, {"a": 1})
    path = store.path
    assert path is not None
    sql(
        path,
        "UPDATE records SET value = '{\"a\": ' WHERE key = 'cut'",
        "UPDATE records SET value = '[1]' WHERE key = 'list'",
        "UPDATE records SET value = CAST(x'7b22ff223a317d' AS TEXT) WHERE key = 'bytes'",
        f"UPDATE records SET value = '{'[' * 100_000}' WHERE key = 'deep'",
        "UPDATE timings SET ns = 'fast', error = CAST(x'ff' AS TEXT) WHERE key = 'k0'",
    )
    store = reopened(store)
    with pytest.warns(UserWarning, match="1 rows in the timings store .* are damaged and left out") as caught:
        kept = {key: store.get_record("plan", key) for key in ("cut", "list", "bytes", "deep", "good")}
    assert len(caught) == 1
    assert kept == {"cut": None, "list": None, "bytes": None, "deep": None, "good": {"a": 1}}
    assert list(store.get_many(["k0", "k1"])) == ["k1"]  # told once
    store.put(row("k0"))
    assert reopened(store).get("k0") == row("k0")


def noise(path: Path) -> None:
    path.write_bytes(b"not a database at all " * 500)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)


def other_tables(path: Path) -> None:
    sql(path, "DROP TABLE timings", "CREATE TABLE timings (a)")


@pytest.mark.parametrize("damage", [noise, cut, other_tables])
def test_damaged_file_is_moved_aside_at_open(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    store = TimingStore.open(tmp_path)
    store.put_many(rows(500))
    store.close()
    path = tmp_path / FILE_NAME
    damage(path)
    before = path.read_bytes()
    with pytest.warns(UserWarning, match=r"is damaged. It was moved to .*corrupt-\d{8}-\d{6}") as caught:
        store = TimingStore.open(tmp_path)
    assert len(caught) == 1
    (aside,) = tmp_path.glob("*.corrupt-*")
    assert aside.read_bytes() == before
    assert store.path == path
    assert (store.get("k1") is None) == (damage is not cut)
    store.put(row("after"))
    assert reopened(store).get("after") == row("after")


def test_a_damaged_page_costs_its_own_rows(tmp_path: Path) -> None:
    store = TimingStore.open(tmp_path)
    store.put_many(rows(2000))
    for i in range(50):
        store.put_record("verdict", f"g{i}", {"best": i})
    store.close()
    path = tmp_path / FILE_NAME
    page = path.read_bytes().index(b"k1999aten.addmm") // 4096  # in the middle
    with path.open("r+b") as file:
        file.seek(page * 4096)
        file.write(b"\xff" * 4096)
    with pytest.warns(UserWarning, match=r"a new one is used, with \d+ facts that could still be read") as caught:
        store = TimingStore.open(tmp_path)
    found, wanted = store.get_many(f"k{i}" for i in range(2000)), {r.key: r for r in rows(2000)}
    assert all(found[key] == wanted[key] for key in found)
    assert 1900 < len(found) < 2000
    assert len(store.get_records("verdict")) == 50
    assert f"with {len(found) + 50} facts" in str(caught[0].message)
    assert reopened(store).get_many(wanted) == found


@pytest.mark.parametrize("write", [True, False])
def test_damage_while_open_is_repaired(tmp_path: Path, write: bool) -> None:
    store = TimingStore.open(tmp_path)
    store.put_many(rows(2000))
    store = reopened(store)
    store.get("k7")
    store.put_record("verdict", "g", {"best": 1})
    path = store.path
    assert path is not None
    sql(path, "PRAGMA wal_checkpoint(TRUNCATE)")
    page = path.read_bytes().index(b"k1999aten.addmm") // 4096
    assert page > 3  # what is looked at on opening stays whole
    with path.open("r+b") as file:
        file.seek(page * 4096)
        file.write(b"\xff" * 4096)
    use: Callable[[], object] = (lambda: store.put(row("k1999", 5))) if write else (lambda: store.get("k1999"))
    with pytest.warns(UserWarning, match="is damaged"):
        assert use() is None
    assert len(list(tmp_path.glob("*.corrupt-*"))) == 1
    store = reopened(store)
    assert store.path == path
    assert store.get("k7") == row("k7", 8)  # known to this process, so not lost
    assert store.get_record("verdict", "g") == {"best": 1}
    assert store.get("k1999") == (row("k1999", 5) if write else None)


def test_a_file_that_was_repaired_meanwhile_stays(tmp_path: Path) -> None:
    """Between the damage that this process saw and its repair, another may have put a good file there."""
    noise(tmp_path / "damaged")
    store = TimingStore.open(tmp_path)
    store._disconnect()
    store._connection = sqlite3.connect(tmp_path / "damaged", isolation_level=None)
    store.put(row("a"))
    assert reopened(store).get("a") == row("a")
    assert not list(tmp_path.glob("*.corrupt-*"))


def test_one_opener_at_a_time_moves_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the lock the slower of the two would move the new file of the faster one aside."""
    noise(tmp_path / FILE_NAME)
    delays, found, original = iter((0.1, 0.5)), [], module._set_aside

    def slow(*args: Any) -> None:
        time.sleep(next(delays))
        original(*args)

    def work(key: str) -> None:
        store = TimingStore.open(tmp_path)
        store.put(row(key))
        found.append(store.path)

    monkeypatch.setattr(module, "_set_aside", slow)
    threads = [threading.Thread(target=work, args=(key,)) for key in "ab"]
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [tmp_path / FILE_NAME] * 2
    assert len(list(tmp_path.glob("*.corrupt-*"))) == 1
    assert set(TimingStore.open(tmp_path).get_many("ab")) == {"a", "b"}


def test_moved_aside_by_another_process(tmp_path: Path) -> None:
    """The file that is at the path counts, not the one that was opened."""
    store = TimingStore.open(tmp_path)
    store.put(row("a"))
    (tmp_path / FILE_NAME).rename(tmp_path / "elsewhere")
    store.put(row("b"))
    assert TimingStore.open(tmp_path).get("b") == row("b")
    shutil.rmtree(tmp_path)
    store.put(row("c"))
    assert TimingStore.open(tmp_path).get("c") == row("c")


def test_a_file_of_another_schema_version_is_set_aside_whole(tmp_path: Path) -> None:
    path, theirs = tmp_path / FILE_NAME, SCHEMA_VERSION + 6
    store = TimingStore.open(tmp_path)
    store.put(row("ours"))
    store.close()
    path.unlink()
    sql(path, f"PRAGMA user_version = {theirs}", "CREATE TABLE other (a)")
    with pytest.warns(UserWarning, match=f"schema version {theirs}, .* moved to .*{FILE_NAME}.v{theirs} ") as caught:
        store = TimingStore.open(tmp_path)
    assert len(caught) == 1
    assert store.get("ours") is None
    assert sql(tmp_path / f"{FILE_NAME}.v{theirs}", "PRAGMA user_version") == [[(theirs,)]]
    store.close()
    path.unlink()
    sql(path, "CREATE TABLE other (a)")
    with pytest.warns(UserWarning, match="has schema version 0"):
        assert TimingStore.open(tmp_path).get("ours") is None


def goes_on(store: TimingStore) -> None:
    """In memory everything works, without another warning."""
    store.put_many(rows(3))
    store.put_record("plan", "p", {"a": 1})
    assert store.path is None
    assert store.get_many(["k0", "k2", "k9"]) == {"k0": row("k0", 1), "k2": row("k2", 3)}
    assert store.get_record("plan", "p") == {"a": 1}
    listing = store.ls()
    counts = listing.counts
    assert counts["timing"] >= 3
    assert Entry("plan", "p", len('{"a": 1}'), None) in listing.entries
    assert store.clear("plan") == counts["plan"] == 1
    assert store.get_record("plan", "p") is None
    assert store.clear() == sum(counts.values()) - 1
    assert store.get("k0") is None


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"cannot be used .* Set cache_dir \(LAYERZERO_CACHE_DIR\)") as caught:
        store = TimingStore.open(tmp_path / "file" / "x")
    assert len(caught) == 1
    goes_on(store)


@posix
def test_directory_that_cannot_be_written() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own directories are closed to other users
        directory = Path(name)
        store = TimingStore.open(directory)
        store.put(row("old"))
        store.put_record("peaks", "d", {"a": 1})
        store.close()
        directory.chmod(0o555)
        (directory / FILE_NAME).chmod(0o444)

        def work() -> None:
            if os.geteuid() == 0:
                os.setuid(65534)  # permissions do not bind root
            with pytest.warns(UserWarning, match="cannot be used") as caught:
                store = TimingStore.open(directory)
            assert len(caught) == 1
            store.put(row("new"))
            assert store.get_many(["old", "new"]) == {"old": row("old"), "new": row("new")}
            assert store.get_record("peaks", "d") == {"a": 1}
            goes_on(store)

        in_child(work)
        directory.chmod(0o755)


@posix
def test_full_disk(tmp_path: Path) -> None:
    def work() -> None:
        import resource

        store = TimingStore.open(tmp_path)
        store.put(row("before"))
        store.close()
        store = TimingStore.open(tmp_path)  # has read nothing yet
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for i in range(40):
                store.put_many(rows(100, f"{i}-"))
        assert len(caught) == 1
        assert "cannot be used" in str(caught[0].message)
        assert store.get("before") == row("before")
        assert len(store.get_many(f"{i}-{j}" for i in range(40) for j in range(100))) == 4000
        goes_on(store)

    in_child(work)
    assert TimingStore.open(tmp_path).get("before") == row("before")


def write_rows(directory: str, prefix: str, ready: Any) -> None:
    ready.wait()
    store = TimingStore.open(directory)
    for timing in rows(200, prefix):
        store.put(timing)
    assert store.path is not None
    store.close()


@pytest.mark.parametrize("start", ["empty", "damaged"])
def test_processes_at_once(tmp_path: Path, start: str) -> None:
    """Also when each finds a damaged file: it is moved aside once, and no healthy one after it."""
    if start == "damaged":
        noise(tmp_path / FILE_NAME)
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(2)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        children = [context.Process(target=write_rows, args=(str(tmp_path), name, ready)) for name in "ab"]
        for child in children:
            child.start()
        for child in children:
            child.join(120)
    assert [child.exitcode for child in children] == [0, 0]
    expected = rows(200, "a") + rows(200, "b")
    assert TimingStore.open(tmp_path).get_many(t.key for t in expected) == {t.key: t for t in expected}
    assert len(list(tmp_path.glob("*.corrupt-*"))) == (start == "damaged")


@posix
def test_fork_while_threads_write(tmp_path: Path) -> None:
    """A fork waits for what is under way, so the child finds neither a lock that is held nor a connection in use."""
    store = TimingStore.open(tmp_path)
    stop = threading.Event()

    def write() -> None:
        count = 0
        while not stop.is_set():
            store.put(row(f"thread{count}"))
            count += 1

    def work(name: str) -> None:
        assert store._connection is None
        store.put_many(rows(20, name))
        assert store.path is not None
        store.close()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for name in "abc":
            in_child(lambda name=name: work(name))  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()
    assert store.path == tmp_path / FILE_NAME
    expected = [t for name in "abc" for t in rows(20, name)]
    assert TimingStore.open(tmp_path).get_many(t.key for t in expected) == {t.key: t for t in expected}


def test_threads_share_a_store(tmp_path: Path) -> None:
    store = TimingStore.open(tmp_path)

    def work(name: str) -> None:
        for timing in rows(50, name):
            store.put(timing)
            assert store.get(timing.key) == timing

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reopened(store).ls().counts == {"timing": 200}


def test_listing_and_clearing(tmp_path: Path) -> None:
    store = TimingStore.open(tmp_path)
    store.put_many(rows(2))
    store.put_record("plan", "p", {"a": 1})
    store.put_record("verdict", "v", {})
    listing = reopened(store).ls()
    assert listing.path == tmp_path / FILE_NAME
    assert listing.bytes >= 4096
    assert listing.counts == {"plan": 1, "timing": 2, "verdict": 1}
    plan = listing.entries[0]
    assert plan == Entry("plan", "p", len('{"a": 1}'), plan.created)
    assert plan.created is not None
    assert math.isclose(plan.created, (tmp_path / FILE_NAME).stat().st_mtime, abs_tol=600)
    assert store.clear("plan") == 1
    assert store.clear("nothing") == 0
    assert store.clear("timing") == 2
    assert store.get("k0") is None
    assert reopened(store).ls().counts == {"verdict": 1}
    assert store.clear() == 1
    assert reopened(store).ls().counts == {}


def test_merge(tmp_path: Path) -> None:
    store, other = TimingStore.open(tmp_path / "a"), TimingStore.open(tmp_path / "b")
    store.put(row("both", 1))
    other.put_many([row("both", 2), row("theirs", 3), row("wrong")])
    other.put_record("plan", "p", {"a": 1})
    assert other.path is not None
    sql(other.path, "UPDATE timings SET ns = 'fast' WHERE key = 'wrong'")
    assert store.merge(other.path).added == 2  # while the other is in use
    assert store.merge(str(other.path)).added == 0
    assert reopened(store).get_many(["both", "theirs", "wrong"]) == {"both": row("both", 1), "theirs": row("theirs", 3)}
    assert store.get_record("plan", "p") == {"a": 1}
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be used"):
        memory = TimingStore.open(tmp_path / "file")
    memory.put(row("both", 1))
    assert memory.merge(other.path).added == 2
    assert memory.get("both") == row("both", 1)


def test_export_and_merge_as_text(tmp_path: Path) -> None:
    store, other = TimingStore.open(tmp_path / "a"), TimingStore.open(tmp_path / "b")
    nan = Timing("z", "aten.mm", 7, 0, 9, None, math.nan, "linear")
    store.put_many([row("fast\nand odd|é"), row("failed", None), nan])
    store.put_record("peaks", "name=a card", {"bandwidth": 1.5})
    store.put_record("verdict", "graph", {"winner": "eager"})
    first, again = tmp_path / "first.jsonl", tmp_path / "again.jsonl"
    assert store.export(first) == 4
    assert other.merge(first).added == 4
    assert other.merge(first).added == 0
    assert reopened(other).get_many(["fast\nand odd|é", "failed"]) == {t.key: t for t in (row("fast\nand odd|é"), row("failed", None))}
    found = other.get("z")
    assert found is not None
    assert math.isnan(found.epsilon)
    assert other.ls().counts == {"peaks": 1, "timing": 3}
    assert other.get_record("peaks", "name=a card") == {"bandwidth": 1.5}
    other.export(again)
    assert again.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"key": "k"}', '{"kind": "peaks", "key": "k"}', "bad ns", "\x00"])
def test_merge_names_the_damaged_line(tmp_path: Path, line: str) -> None:
    store, file = TimingStore.open(tmp_path), tmp_path / "file.jsonl"
    store.put(row("good"))
    store.export(file)
    good = file.read_text()
    file.write_text(good + (good.replace("100", '"fast"') if line == "bad ns" else line + "\n"))
    fresh = TimingStore.open(tmp_path / "fresh")
    with pytest.raises(StoreError, match="line 2"):
        fresh.merge(file)
    assert not fresh.ls().counts


def test_export_names_what_is_wrong(tmp_path: Path) -> None:
    store = TimingStore.open(tmp_path)
    for name in ("other.sqlite", "none/file.jsonl"):
        with pytest.raises(StoreError, match="cannot export"):
            store.export(tmp_path / name)
    with pytest.raises(StoreError, match="cannot be read"):
        store.merge(tmp_path / "none.jsonl")


def test_merge_names_what_is_wrong(tmp_path: Path) -> None:
    store = TimingStore.open(tmp_path / "a")
    store.put(row("a"))
    broken, newer = tmp_path / "broken", tmp_path / "newer"
    noise(broken)
    sql(newer, "PRAGMA user_version = 77", "CREATE TABLE other (a)")
    before = broken.read_bytes()
    for path, message in ((tmp_path / "none", "no timings store"), (broken, "not a database"), (newer, "version 77")):
        with pytest.raises(StoreError, match=message):
            store.merge(path)
    assert broken.read_bytes() == before
    assert store.ls().counts == {"timing": 1}


# --- joining stores of many machines ----------------------------------------------------------------------------------------


def from_machine(folder: Path, name: str, when: float, *facts: Timing, monkeypatch: pytest.MonkeyPatch, **records: dict[str, Any]) -> Path:
    """The exported facts of another machine, found at another time."""
    with monkeypatch.context() as patch:
        patch.setattr(facts_module, "machine", lambda: name)
        patch.setattr(time, "time", lambda: when)
        store = TimingStore.open(folder / name)
        store.put_many(facts)
        for kind, value in records.items():
            store.put_record(kind, "device=cpu|name=box", value)
        store.export(folder / f"{name}.jsonl")
        store.close()
    return folder / f"{name}.jsonl"


def test_origins_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine and date of the finding go through export, merge, and export again; also where a store itself is merged."""
    file = from_machine(tmp_path, "one", 1000.5, row("a"), row("b"), monkeypatch=monkeypatch)
    for i, source in enumerate((file, tmp_path / "one" / FILE_NAME)):
        store = TimingStore.open(tmp_path / str(i))
        store.put(row("mine"))
        merged = store.merge(source)
        assert (merged.added, merged.machines, merged.conflicts) == (2, {"one": 2}, ())
        assert reopened(store).ls().machines == {"one": 2, facts_module.machine(): 1}
        store.export(tmp_path / "again.jsonl")
        rows = {r["key"]: (r["machine"], r["measured"]) for r in map(json.loads, (tmp_path / "again.jsonl").read_text().splitlines())}
        assert rows["a"] == rows["b"] == ("one", 1000.5)
        assert rows["mine"][0] == facts_module.machine()


@pytest.mark.parametrize("order", [("old", "new"), ("new", "old")])
def test_dates_decide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[str, str]) -> None:
    """What was found here stays; of two others under one environment, in either order: wrong numbers before a time, else samples."""
    few, many = Timing("k", "aten.mm", 100, 3, 5, None, 0.0, ""), Timing("k", "aten.mm", 120, 3, 9, None, 0.0, "")
    wrong, fine = replace(few, key="w", ns=None, error="wrong: error 3"), replace(many, key="w")
    raised, timed = replace(few, key="r", ns=None, error="RuntimeError: no"), replace(few, key="r")
    here = replace(few, key="here", samples=1)
    files = {
        "old": from_machine(tmp_path, "old", 1.0, many, wrong, timed, replace(here, samples=9), monkeypatch=monkeypatch),
        "new": from_machine(tmp_path, "new", 4e9, few, fine, raised, replace(here, samples=7), monkeypatch=monkeypatch),
    }
    store = TimingStore.open(tmp_path / "store")
    store.put(here)
    store.get_many(["k", "w", "r"])
    conflicts = [store.merge(files[name]).conflicts for name in order]
    assert [len(told) for told in conflicts] == [1, 4]
    assert any("old" in told and "new" in told for told in conflicts[1])
    told = {line.split(":")[0]: line for lines in conflicts for line in lines}
    assert all(line.endswith(("; the other is taken over", "; this one is kept")) for line in told.values())
    assert told["timing here"].endswith("; this one is kept")
    assert told["timing k"].endswith("; the other is taken over" if order == ("new", "old") else "; this one is kept")
    for found in (store, reopened(store)):
        assert found.get_many(["k", "w", "r", "here"]) == {"k": many, "w": wrong, "r": timed, "here": here}
    other = replace(few, key="k|another environment")
    assert store.merge(from_machine(tmp_path, "third", 5e9, other, monkeypatch=monkeypatch)).conflicts == ()
    assert store.get(other.key) == other  # side by side


def verdicts(**status: str) -> dict[str, Any]:
    return {"capabilities": {name: {"status": s, "shape": "", "detail": ""} for name, s in status.items()}, "run": 1}


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
def test_canary_runs_are_joined_by_capability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[str, str]) -> None:
    """Here tried counts; what was not tried here is taken over, the worse of two others; and the index of failures knows of it."""
    files = {
        "one": from_machine(
            tmp_path, "one", 9e9, canary=verdicts(a="failed", b="passed", c="passed"), canary_failed={"backends": ["x"]},
            peaks={"bandwidth": 2.0}, verdict={"winner": "eager"}, monkeypatch=monkeypatch,
        ),
        "two": from_machine(
            tmp_path, "two", 1.0, canary=verdicts(a="passed", b="crashed", d="passed"), canary_failed={"backends": ["y"]},
            peaks={"bandwidth": 3.0}, monkeypatch=monkeypatch,
        ),
    }  # fmt: skip
    joined, mine = TimingStore.open(tmp_path / "store"), TimingStore.open(tmp_path / "mine")
    mine.put_record("canary", "device=cpu|name=box", verdicts(a="passed", d="failed"))
    mine.put_record("peaks", "device=cpu|name=box", {"bandwidth": 1.0})
    told = [store.merge(files[name]).conflicts for name in order for store in (joined, mine)]
    assert any("one" in line and "two" in line for line in told[2])
    key = "device=cpu|name=box"

    def found(store: TimingStore) -> dict[str, tuple[str, str | None]]:
        record = reopened(store).get_record("canary", key)
        assert record is not None
        return {name: (v["status"], v.get("machine")) for name, v in record["capabilities"].items()}

    assert {name: status for name, (status, _) in found(joined).items()} == {"a": "failed", "b": "crashed", "c": "passed", "d": "passed"}
    assert found(mine) == {"a": ("passed", None), "b": ("crashed", "two"), "c": ("passed", "one"), "d": ("failed", None)}
    for store in (joined, mine):
        assert store.get_record("canary_failed", key) == {"backends": ["x", "y"]}
        assert store.get_record("verdict", key) is None  # not exported
    assert joined.get_record("peaks", key) == {"bandwidth": 3.0}
    assert mine.get_record("peaks", key) == {"bandwidth": 1.0}


def test_a_store_of_the_first_version_is_taken_over(tmp_path: Path) -> None:
    columns = "key TEXT PRIMARY KEY NOT NULL, kernel TEXT NOT NULL, ns INTEGER, spread INTEGER, samples INTEGER, error TEXT, epsilon REAL"
    old = (
        f"CREATE TABLE timings ({columns}, detail TEXT NOT NULL, created REAL NOT NULL) WITHOUT ROWID",
        "CREATE TABLE records (kind TEXT, key TEXT, value TEXT, created REAL, PRIMARY KEY (kind, key)) WITHOUT ROWID",
        "INSERT INTO timings VALUES ('a', 'aten.addmm', 7, 3, 9, NULL, 0.5, 'linear', 5.0), ('bad', 'x', 'fast', 3, 9, NULL, 1, '', 5.0)",
        """INSERT INTO records VALUES ('peaks', 'p', '{"a": 1}', 6.0)""", "PRAGMA user_version = 1",
    )  # fmt: skip
    for name in ("used", "merged"):
        (tmp_path / name).mkdir()
        sql(tmp_path / name / FILE_NAME, *old)
    merged = TimingStore.open(tmp_path / "new")
    assert merged.merge(tmp_path / "merged" / FILE_NAME).added == 2
    for store in (TimingStore.open(tmp_path / "used"), merged):
        assert reopened(store).get_many(["a", "bad"]) == {"a": row("a", 7)}
        assert store.get_record("peaks", "p") == {"a": 1}
        assert store.ls().machines == {"unknown": 2}
    assert (tmp_path / "used" / f"{FILE_NAME}.v1").exists()
