"""What was measured once, kept in SQLite: timings, verdicts, plans and device peaks.

Planning goes on whatever happens to the file. A damaged file, or one of another schema version, is moved aside and built anew,
with what can still be read of a damaged one; if the directory cannot be written to, or the disk is full, the facts stay in
memory. A warning says so.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sqlite3
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from . import cache_folder, facts
from .facts import MAX_VALUE, TIMING, Facts, Merged
from .facts import StoreError as StoreError
from .facts import Timing as Timing
from .options import Options
from .plan_io import write_whole

SCHEMA_VERSION = 2
FILE_NAME = "timings.sqlite"
BUSY_S = 30.0
TEXT_SUFFIX = ".jsonl"  # of an exported file; any other is read as a store
CHECKED = 1 << 24  # bytes of a store up to which opening it looks at all of its structure: some milliseconds
_MOST = 1 << 20  # rows of a damaged table: its pages may lead in circles
_CHUNK = 500  # variables in one statement: SQLite's limit was 999 for a long time

# `created` and `machine`: when and where a fact was found. `crc` is over all other columns.
_TABLES = (
    """CREATE TABLE IF NOT EXISTS timings (
        key TEXT PRIMARY KEY NOT NULL, kernel TEXT NOT NULL, ns INTEGER, spread INTEGER NOT NULL, samples INTEGER NOT NULL,
        error TEXT, epsilon REAL, detail TEXT NOT NULL, created REAL NOT NULL, machine TEXT NOT NULL, crc INTEGER NOT NULL
    ) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS records (
        kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, created REAL NOT NULL, machine TEXT NOT NULL, crc INTEGER NOT NULL,
        PRIMARY KEY (kind, key)
    ) WITHOUT ROWID""",
)
_SCHEMA = {" ".join(table.replace(" IF NOT EXISTS", "").split()) for table in _TABLES}
_TIMING_COLUMNS = "key, kernel, ns, spread, samples, error, epsilon, detail, created, machine, crc"
_ALL_TIMINGS = f"SELECT {_TIMING_COLUMNS} FROM timings WHERE length(kernel) + length(detail) + coalesce(length(error), 0) < {MAX_VALUE}"
_PUT_TIMING = f"INSERT OR REPLACE INTO timings ({_TIMING_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
# As a blob: the JSON parser then finds what is not UTF-8.
_ALL_RECORDS = f"SELECT kind, key, CAST(value AS BLOB), created, machine, crc FROM records WHERE length(value) < {MAX_VALUE}"
_PUT_RECORD = "INSERT OR REPLACE INTO records (kind, key, value, created, machine, crc) VALUES (?, ?, ?, ?, ?, ?)"

# SQLITE_ERROR is "no such table" and the like: a file that has our version and not our tables.
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_ERROR)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """One fact in a listing. `bytes` is the size of its text, `created` Unix time (None for facts in memory)."""

    kind: str
    key: str
    bytes: int
    created: float | None


@dataclass(frozen=True, slots=True)
class Listing:
    """What a store holds. `path` is None in memory, `bytes` the size of the file, `machines` how many facts come from each."""

    path: Path | None
    bytes: int
    counts: Mapping[str, int]
    entries: tuple[Entry, ...]
    machines: Mapping[str, int]


class TimingStore:
    """Facts by key. One connection, opened when needed; safe for threads, processes and forks.

    `path` is the file, or None once the store has gone on in memory; `folder` is where it was to be.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.folder = None if path is None else path.parent
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._facts = Facts()  # what was read or put; everything there is, once in memory
        self._told = False  # that some rows are damaged
        _stores.add(self)

    @staticmethod
    def open(cache_dir: str | Path | None = None) -> TimingStore:
        """The store in a directory (by default the user's cache directory), created if it is not there. Never fails."""
        if cache_dir is None:
            import platformdirs

            cache_dir = platformdirs.user_cache_dir("layerzero")
        store = TimingStore(Path(os.path.expanduser(cache_dir)).absolute() / FILE_NAME)
        with store._lock:
            store._connected()
        return store

    def get(self, key: str) -> Timing | None:
        return self.get_many([key]).get(key)

    def get_many(self, keys: Iterable[str]) -> dict[str, Timing]:
        """The timings that are known. A fact does not change, so what was read once is not read again."""
        wanted = list(dict.fromkeys(keys))
        with self._lock:
            known = self._facts.timings
            missing = [key for key in wanted if key not in known]
            if missing:
                self._facts.add(self._read(lambda connection: facts.read_rows(_select(connection, missing))) or Facts())
            return {key: known[key] for key in wanted if key in known}

    def put(self, timing: Timing) -> None:
        self.put_many([timing])

    def put_many(self, timings: Iterable[Timing]) -> None:
        known = {timing.key: timing for timing in timings}
        if known:
            self._put(Facts(timings=known))

    def get_record(self, kind: str, key: str) -> dict[str, Any] | None:
        """A JSON object, read anew each time (another process may have put a better one). Damaged JSON is no record."""
        with self._lock:
            where = f"{_ALL_RECORDS} AND kind = ? AND key = ?"
            found = self._read(lambda connection: facts.read_rows(records=connection.execute(where, (kind, key))))
            if found is not None:  # not in memory
                self._facts.drop((kind, key))
                self._facts.add(found)
            return facts.parsed(self._facts.records.get((kind, key)))

    def get_records(self, kind: str) -> dict[str, dict[str, Any]]:
        """All records of a kind by key, without what is damaged."""
        with self._lock:
            where = f"{_ALL_RECORDS} AND kind = ?"
            found = self._read(lambda connection: facts.read_rows(records=connection.execute(where, (kind,)))) or self._facts
            values = {key: facts.parsed(text) for (name, key), text in found.records.items() if name == kind}
        return {key: value for key, value in values.items() if value is not None}

    def put_record(self, kind: str, key: str, value: Mapping[str, object]) -> None:
        self._put(Facts(records={(kind, key): json.dumps(dict(value), sort_keys=True).encode()}))

    def _put(self, fresh: Facts) -> None:
        fresh.origins = dict.fromkeys(fresh.names(), (facts.machine(), time.time()))
        with self._lock:
            self._facts.add(fresh)
            self._run(lambda connection: _insert(connection, fresh))

    def _read(self, query: Callable[[sqlite3.Connection], Facts]) -> Facts | None:
        """Facts from the file, without damaged rows, of which a warning tells once. None: the store is in memory."""
        found = self._run(query)
        if found is not None and found.damaged and not self._told:
            self._told = True
            warnings.warn(
                f"{found.damaged} rows in the timings store {self.path} are damaged and left out. What they held is found out anew; "
                "`lz cache clear` removes them, and `lz canary` tries the kernels again.",
                stacklevel=4,
            )
        return found

    def ls(self) -> Listing:
        """Everything in the store, by kind and key."""
        with self._lock:
            rows = self._run(_entries)
            if rows is None:
                known = self._facts
                sizes = {(TIMING, t.key): len(f"{t.key}{t.error or ''}{t.detail}") for t in known.timings.values()}
                sizes |= {name: len(text) for name, text in known.records.items()}
                rows = [(*name, size, None, known.origins[name][0]) for name, size in sizes.items()]
            entries = sorted((Entry(*row[:4]) for row in rows), key=lambda entry: (entry.kind, entry.key))
            counts, machines = dict[str, int](), dict[str, int]()
            for kind, *_, where in sorted(rows, key=lambda row: row[0]):
                counts[kind] = counts.get(kind, 0) + 1
                machines[where] = machines.get(where, 0) + 1
            size = sum(_size(self.path, suffix) for suffix in ("", "-wal")) if self.path else 0
            return Listing(self.path, size, counts, tuple(entries), machines)

    def clear(self, kind: str | None = None) -> int:
        """Forget all facts, or those of one kind. Returns how many there were."""
        with self._lock:
            removed = self._run(lambda connection: _delete(connection, kind))
            names = [name for name in self._facts.names() if kind in (None, name[0])]
            for name in names:
                self._facts.drop(name)
            return len(names) if removed is None else removed

    def export(self, file: str | Path) -> int:
        """Write what may travel (timings, peaks, canary results, quarantine) as JSON lines, sorted, for `merge`; returns how many.

        Plans and verdicts stay: they belong to a machine and its user's graphs. StoreError if the file cannot be written.
        """
        path = Path(os.path.expanduser(file)).absolute()
        if path.suffix != TEXT_SUFFIX:
            raise StoreError(f"cannot export to {path}: `merge` reads JSON lines from a name that ends in {TEXT_SUFFIX}.")
        with self._lock:
            lines = facts.to_lines(self._read(_everything) or self._facts)
        try:
            write_whole(path, "".join(lines).encode())
        except OSError as error:
            why = error.strerror or error  # whose own text names the temporary file
            raise StoreError(f"cannot export to {path}: {why}. Give a file in a folder that is writable.") from error
        return len(lines)

    def merge(self, other: str | Path) -> Merged:
        """Add the facts of another store, or of an exported file, with their origins: all of them, or none if it cannot be read.

        Facts of other environments stand side by side; under one environment see `facts.join`.
        """
        path = Path(os.path.expanduser(other)).absolute()
        theirs = facts.read_lines(path) if path.suffix == TEXT_SUFFIX else _read_other(path)
        with self._lock:
            merged = self._run(lambda connection: _merge(connection, theirs))
            if merged is None:
                fresh, merged = facts.join(self._facts, theirs)
                self._facts.add(fresh)
            else:  # what is replaced in the file must not be answered from memory
                for name in theirs.names():
                    self._facts.drop(name)
            return merged

    def close(self) -> None:
        """Let go of the file. A later use opens it again."""
        with self._lock:
            self._disconnect()

    def _run(self, operation: Callable[[sqlite3.Connection], T]) -> T | None:
        """Do something with the file, repairing it once if it proves to be damaged. None: the store is in memory."""
        for last in (False, True):
            connection = self._connected()
            if connection is None:
                return None
            try:
                return operation(connection)
            except (sqlite3.ProgrammingError, sqlite3.IntegrityError, sqlite3.DataError):
                raise  # our own bug, not the file's state
            except sqlite3.Error as error:
                self._disconnect()
                if last or not _damaged(error):
                    self._go_on_in_memory(error)
                else:
                    self._repair()
        return None

    def _connected(self) -> sqlite3.Connection | None:
        if self.path is None:
            return None
        if self._connection is not None and _identity(self.path) == self._file:
            return self._connection
        self._disconnect()  # the file was moved or deleted under us: what is written to it now would be lost
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            cache_folder.check(self.path)
            with cache_folder.exclusive(self.path.parent, BUSY_S):
                self._connection = _open(self.path)
                self._file = _identity(self.path)
        except (OSError, sqlite3.Error) as error:
            self._go_on_in_memory(error)
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):  # closing writes back the log, which fails on a damaged file or a full disk
                self._connection.close()
        self._connection = None

    def _repair(self) -> None:
        """After a read or write found damage: build the file anew from what can be read of it and what this process knows.

        Another process may have done so already, hence the check.
        """
        assert self.path is not None
        known = Facts()
        try:
            with cache_folder.exclusive(self.path.parent, BUSY_S):
                if not _sound(self.path):
                    known = _rescued(self.path)
        except OSError as error:
            self._go_on_in_memory(error)
            return
        connection = self._connected()
        if connection is not None:
            try:
                known.add(self._facts)
                _merge(connection, known)
            except sqlite3.Error as error:
                self._disconnect()
                self._go_on_in_memory(error)

    def _go_on_in_memory(self, error: Exception) -> None:
        path, self.path = self.path, None
        assert path is not None
        if not isinstance(error, cache_folder.UnsafeFolderError):
            with suppress(StoreError):  # a store that can be read and not written is still worth reading
                known = _read_other(path, wait_s=1.0)
                known.add(self._facts)
                self._facts = known
        warnings.warn(
            f"the timings store {path} cannot be used ({error}). New timings are kept in memory and lost at exit. "
            "Set cache_dir (LAYERZERO_CACHE_DIR) to a directory that can be written to.",
            stacklevel=2,
        )


@functools.cache
def open_store(cache_dir: str | None) -> TimingStore:
    """One store per process and folder."""
    return TimingStore.open(cache_dir)


def user_store(cache_dir: str | os.PathLike[str] | None = None) -> TimingStore:
    """The store in a folder, by default in that of the option `cache_dir`."""
    return open_store(os.fspath(cache_dir) if cache_dir else Options.resolve().cache_dir)


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")  # takes the write lock at once, so that waiting for it cannot deadlock
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # SQLite may have rolled back by itself; the first error is the one to report
            connection.execute("ROLLBACK")
        raise


def _select(connection: sqlite3.Connection, keys: Sequence[str]) -> list[Any]:
    rows: list[Any] = []
    for start in range(0, len(keys), _CHUNK):
        chunk = keys[start : start + _CHUNK]
        rows += connection.execute(f"{_ALL_TIMINGS} AND key IN ({', '.join('?' * len(chunk))})", chunk)
    return rows


def _insert(connection: sqlite3.Connection, fresh: Facts) -> None:
    with _transaction(connection):
        connection.executemany(_PUT_TIMING, facts.timing_rows(fresh))
        connection.executemany(_PUT_RECORD, facts.record_rows(fresh))


def _merge(connection: sqlite3.Connection, theirs: Facts) -> Merged:
    with _transaction(connection):
        fresh, merged = facts.join(_everything(connection), theirs)
        connection.executemany(_PUT_TIMING, facts.timing_rows(fresh))
        connection.executemany(_PUT_RECORD, facts.record_rows(fresh))
    return merged


def _delete(connection: sqlite3.Connection, kind: str | None) -> int:
    removed = 0
    with _transaction(connection):
        if kind in (None, TIMING):
            removed += connection.execute("DELETE FROM timings").rowcount
        removed += connection.execute("DELETE FROM records WHERE kind = coalesce(?, kind)", (kind,)).rowcount
    return removed


def _entries(connection: sqlite3.Connection) -> list[tuple[str, str, int, float | None, str]]:
    timings = "SELECT ?, key, length(key || coalesce(error, '') || detail), created, machine FROM timings"
    return connection.execute(f"{timings} UNION ALL SELECT kind, key, length(value), created, machine FROM records", (TIMING,)).fetchall()


def _read_other(path: Path, wait_s: float = BUSY_S) -> Facts:
    """All facts of a file that is only read. StoreError if it is not a store of this version."""
    if not path.is_file():
        raise StoreError(f"no timings store at {path}. Give the path of a {FILE_NAME} file.")
    # A store that was closed in a directory that cannot be written to opens only as `immutable`.
    for last, how in ((False, "mode=ro"), (True, "mode=ro&immutable=1")):
        connection: sqlite3.Connection | None = None
        try:
            connection = _connect(f"{path.as_uri()}?{how}", wait_s, uri=True)
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 1:
                return _first_version(connection)
            if version != SCHEMA_VERSION:
                raise StoreError(f"{path} has schema version {version}, this LayerZero reads version {SCHEMA_VERSION}.")
            _check_tables(connection)
            return _everything(connection)
        except sqlite3.Error as error:
            if last or _damaged(error) or _code(error) == sqlite3.SQLITE_BUSY:
                raise StoreError(f"{path} cannot be read as a timings store: {error}.") from error
        finally:
            if connection is not None:
                connection.close()
    raise AssertionError("the last way either returned or raised")


def _everything(connection: sqlite3.Connection) -> Facts:
    return facts.read_rows(connection.execute(_ALL_TIMINGS), connection.execute(_ALL_RECORDS))


def _first_version(connection: sqlite3.Connection) -> Facts:
    """What a store of version 1 holds: without machine and checksum."""
    found, tables = Facts(), connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND sql NOT LIKE '%VIRTUAL%'")
    if sorted(tables) != [("records",), ("timings",)]:
        raise sqlite3.DatabaseError("not the tables of version 1")
    for key, kernel, ns, spread, samples, error, epsilon, detail, when in connection.execute(_ALL_TIMINGS.replace(", machine, crc", "")):
        with suppress(TypeError, ValueError):
            found.timings[key] = Timing(
                key, kernel, ns, spread, samples, error, float("nan") if epsilon is None else float(epsilon), detail
            )
            found.origins[TIMING, key] = facts.UNKNOWN, float(when)
    for kind, key, text, when in connection.execute(_ALL_RECORDS.replace(", machine, crc", "")):
        if isinstance(text, bytes) and isinstance(when, float):
            found.records[kind, key], found.origins[kind, key] = text, (facts.UNKNOWN, when)
    # Written and read again, so that types are checked as everywhere.
    blobs = ((kind, key, value.encode(), *rest) for kind, key, value, *rest in facts.record_rows(found))
    return facts.read_rows(facts.timing_rows(found), blobs)


def _connect(database: str, wait_s: float = BUSY_S, *, uri: bool = False) -> sqlite3.Connection:
    connection = sqlite3.connect(database, timeout=wait_s, isolation_level=None, check_same_thread=False, uri=uri)
    connection.text_factory = lambda text: text.decode("utf-8", "replace")  # a flipped bit is not an exception
    return connection


def _open(path: Path) -> sqlite3.Connection:
    """A connection to a file with our tables, whatever is at `path` now. Called with the directory locked."""
    rescued = Facts()
    for _ in range(3):  # at most: one of another version, a damaged one kept from before, a new one
        connection = _connect(str(path))
        try:
            version = _prepare(connection)
        except sqlite3.Error as error:
            connection.close()
            if not _damaged(error):
                raise
            rescued = _rescued(path)
            continue
        if version == SCHEMA_VERSION:
            if rescued.names():
                _insert(connection, rescued)
            return connection
        connection.close()
        if version == 1:
            _upgrade(path)
            continue
        _set_aside(path, f"v{version}", f"has schema version {version}, this LayerZero uses {SCHEMA_VERSION}")
    raise OSError(f"{path} cannot be built anew")


def _upgrade(path: Path) -> None:
    """A store of version 1 becomes one of this version, whole or not at all; the old file is kept."""
    new = path.with_name(f"{path.name}.new")
    for suffix in ("-wal", "-shm", ""):
        Path(f"{new}{suffix}").unlink(missing_ok=True)
    try:
        known = _read_other(path)
    except StoreError:
        _rescued(path)
        return
    connection = _connect(str(new))
    try:
        _prepare(connection)
        _merge(connection, known)
    finally:
        connection.close()
    _rename(path, path.with_name(f"{path.name}.v1"))
    os.replace(new, path)


def _prepare(connection: sqlite3.Connection) -> int:
    """Create our tables in an empty file, and look whether they are there. Returns the file's schema version."""
    connection.execute("PRAGMA synchronous = NORMAL")  # with WAL: a power cut may lose the last rows, never the file
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version == 0 and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
        with suppress(sqlite3.OperationalError):  # without locks on directories two processes may do this at once
            connection.execute("PRAGMA journal_mode = WAL")
        with _transaction(connection):
            for table in _TABLES:
                connection.execute(table)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        version = SCHEMA_VERSION
    if version == SCHEMA_VERSION:
        _check_tables(connection)
        pages, size = (connection.execute(f"PRAGMA {what}").fetchone()[0] for what in ("page_count", "page_size"))
        if pages * size <= CHECKED and connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("the file's structure is broken")
        for query in (_ALL_TIMINGS, _ALL_RECORDS):
            connection.execute(f"{query} LIMIT 1").fetchall()
    return version


def _check_tables(connection: sqlite3.Connection) -> None:
    """Our tables and nothing else: a view, trigger or virtual table of that name would run somebody's query, perhaps without end."""
    found = {" ".join(str(sql).split()) for (sql,) in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
    if found != _SCHEMA:
        raise sqlite3.DatabaseError("other tables than ours")


def _damaged(error: sqlite3.Error) -> bool:
    """The file's content is wrong (or it was replaced under us), as opposed to: it cannot be reached or written."""
    return _code(error) in _DAMAGE or getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY_DBMOVED


def _code(error: sqlite3.Error) -> int:
    """The primary result code, without the details in its upper bits."""
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)) & 0xFF


def _sound(path: Path) -> bool:
    connection: sqlite3.Connection | None = None
    try:
        connection = _connect(str(path))
        _prepare(connection)
        return bool(connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok")
    except sqlite3.Error as error:
        return not _damaged(error)
    finally:
        if connection is not None:
            connection.close()


def _rescued(path: Path) -> Facts:
    """What a damaged file still gives: of each table the rows before the damage and those behind it. The file is moved aside."""
    found = Facts()
    with suppress(sqlite3.Error), closing(_connect(str(path))) as connection:
        connection.execute("PRAGMA writable_schema = ON")  # with which SQLite reads a file that was cut short
        _check_tables(connection)
        orders = "key", "kind, key"
        found = facts.read_rows(*(_both_ways(connection, q, order) for q, order in zip((_ALL_TIMINGS, _ALL_RECORDS), orders, strict=True)))
    kept = f", with {len(found.names())} facts that could still be read" if found.names() else ""
    _set_aside(path, f"corrupt-{time.strftime('%Y%m%d-%H%M%S')}", "is damaged", kept)
    return found


def _both_ways(connection: sqlite3.Connection, query: str, order: str) -> Iterator[Any]:
    for by in (order, ", ".join(f"{column} DESC" for column in order.split(", "))):
        with suppress(sqlite3.Error):
            yield from itertools.islice(connection.execute(f"{query} ORDER BY {by}"), _MOST)


def _set_aside(path: Path, suffix: str, why: str, kept: str = "") -> None:
    aside, number = path.with_name(f"{path.name}.{suffix}"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.{suffix}-{number}")
    _rename(path, aside)
    warnings.warn(f"the timings store {path} {why}. It was moved to {aside} and a new one is used{kept}.", stacklevel=2)


def _rename(source: Path, target: Path) -> None:
    # The log first: a log left beside a new file would be replayed into it.
    for suffix in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            os.replace(f"{source}{suffix}", f"{target}{suffix}")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _size(path: Path, suffix: str) -> int:
    try:
        return os.stat(f"{path}{suffix}").st_size
    except OSError:
        return 0


_stores: weakref.WeakSet[TimingStore] = weakref.WeakSet()
_held: list[TimingStore] = []


def _before_fork() -> None:
    """SQLite's state must not be carried over a fork, not even unused: close first, both sides open it again."""
    for store in list(_stores):
        store._lock.acquire()
        _held.append(store)
        store._disconnect()


def _after_fork() -> None:
    while _held:
        _held.pop()._lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
