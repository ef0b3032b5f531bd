"""What was measured once, kept in SQLite: timings, verdicts, plans and device peaks.

Planning goes on whatever happens to the file. A damaged file, or one of another schema version, is moved aside and
built anew; if the directory cannot be written to, or the disk is full, the facts stay in memory. A warning says so.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sqlite3
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from .errors import LayerZeroError

SCHEMA_VERSION = 1
FILE_NAME = "timings.sqlite"
BUSY_S = 30.0
TIMING = "timing"  # the kind under which `ls` and `clear` know the timings
TEXT_SUFFIX = ".jsonl"  # of an exported file; any other is read as a store
_CHUNK = 500  # variables in one statement: SQLite's limit was 999 for a long time

# `epsilon` may be NULL because that is what SQLite makes of a NaN.
_TABLES = (
    """CREATE TABLE IF NOT EXISTS timings (
        key TEXT PRIMARY KEY NOT NULL, kernel TEXT NOT NULL, ns INTEGER, spread INTEGER NOT NULL, samples INTEGER NOT NULL,
        error TEXT, epsilon REAL, detail TEXT NOT NULL, created REAL NOT NULL
    ) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS records (
        kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, created REAL NOT NULL, PRIMARY KEY (kind, key)
    ) WITHOUT ROWID""",
)
_TIMING_COLUMNS = "key, kernel, ns, spread, samples, error, epsilon, detail"
_TYPES = (str, str, int | None, int, int, str | None, float | None, str)
_ALL_TIMINGS = f"SELECT {_TIMING_COLUMNS} FROM timings"
_PUT_TIMING = f"INTO timings ({_TIMING_COLUMNS}, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
# As a blob: the JSON parser then finds what is not UTF-8.
_ALL_RECORDS = "SELECT kind, key, CAST(value AS BLOB) FROM records"
_PUT_RECORD = "INTO records (kind, key, value, created) VALUES (?, ?, ?, ?)"

# SQLITE_ERROR is "no such table" and the like: a file that has our version and not our tables.
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_ERROR)

T = TypeVar("T")
_Records = dict[tuple[str, str], bytes]


class StoreError(LayerZeroError, ValueError):
    """Another store, which the user asked for, cannot be read."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One measurement. `key` says everything it depends on; a failure has no `ns` and an `error`."""

    key: str
    kernel: str
    ns: int | None
    spread: int
    samples: int
    error: str | None
    epsilon: float
    detail: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One fact in a listing. `bytes` is the size of its text, `created` Unix time (None for facts in memory)."""

    kind: str
    key: str
    bytes: int
    created: float | None


@dataclass(frozen=True, slots=True)
class Listing:
    """What a store holds. `path` is None in memory, `bytes` the size of the file."""

    path: Path | None
    bytes: int
    counts: Mapping[str, int]
    entries: tuple[Entry, ...]


class TimingStore:
    """Facts by key. One connection, opened when needed; safe for threads, processes and forks.

    `path` is the file, or None once the store has gone on in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._timings: dict[str, Timing] = {}  # what was read or put; everything there is, once in memory
        self._records: _Records = {}
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
            missing = [key for key in wanted if key not in self._timings]
            if missing:
                rows = self._run(lambda connection: _select(connection, missing)) or []
                self._timings |= _timings(rows)
            return {key: self._timings[key] for key in wanted if key in self._timings}

    def put(self, timing: Timing) -> None:
        self.put_many([timing])

    def put_many(self, timings: Iterable[Timing]) -> None:
        fresh = {timing.key: timing for timing in timings}
        with self._lock:
            self._timings |= fresh
            if fresh:
                self._run(lambda connection: _insert(connection, "REPLACE", fresh.values(), {}))

    def get_record(self, kind: str, key: str) -> dict[str, Any] | None:
        """A JSON object, read anew each time (another process may have put a better one). Damaged JSON is no record."""
        with self._lock:
            where = f"{_ALL_RECORDS} WHERE kind = ? AND key = ?"
            rows = self._run(lambda connection: connection.execute(where, (kind, key)).fetchall())
            if rows is not None:  # not in memory
                self._records.pop((kind, key), None)
                self._records |= _texts(rows)
            text = self._records.get((kind, key))
        try:
            value = None if text is None else json.loads(text)
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None

    def get_records(self, kind: str) -> dict[str, dict[str, Any]]:
        """All records of a kind by key, without what is damaged."""
        with self._lock:
            rows = self._run(lambda connection: connection.execute(f"{_ALL_RECORDS} WHERE kind = ?", (kind,)).fetchall())
            known = self._records if rows is None else _texts(rows)
            texts = {key: text for (name, key), text in known.items() if name == kind}
        found: dict[str, dict[str, Any]] = {}
        for key, text in texts.items():
            with suppress(ValueError, RecursionError):
                value = json.loads(text)
                found |= {key: value} if isinstance(value, dict) else {}
        return found

    def put_record(self, kind: str, key: str, value: Mapping[str, object]) -> None:
        fresh: _Records = {(kind, key): json.dumps(dict(value), sort_keys=True).encode()}
        with self._lock:
            self._records |= fresh
            self._run(lambda connection: _insert(connection, "REPLACE", (), fresh))

    def ls(self) -> Listing:
        """Everything in the store, by kind and key."""
        with self._lock:
            entries = self._run(_entries)
            if entries is None:
                known = self._timings.values()
                entries = [Entry(TIMING, t.key, len(f"{t.key}{t.error or ''}{t.detail}"), None) for t in known]
                entries += [Entry(kind, key, len(value), None) for (kind, key), value in self._records.items()]
            entries.sort(key=lambda entry: (entry.kind, entry.key))
            counts: dict[str, int] = {}
            for entry in entries:
                counts[entry.kind] = counts.get(entry.kind, 0) + 1
            size = sum(_size(self.path, suffix) for suffix in ("", "-wal")) if self.path else 0
            return Listing(self.path, size, counts, tuple(entries))

    def clear(self, kind: str | None = None) -> int:
        """Forget all facts, or those of one kind. Returns how many there were."""
        with self._lock:
            removed = self._run(lambda connection: _delete(connection, kind))
            timings = len(self._timings) if kind in (None, TIMING) else 0
            records = [name for name in self._records if kind in (None, name[0])]
            if timings:
                self._timings.clear()
            for name in records:
                del self._records[name]
            return timings + len(records) if removed is None else removed

    def export(self, file: str | Path) -> int:
        """Write the timings and the devices' peaks as JSON lines, sorted, for `merge` elsewhere. Returns how many.

        Plans and verdicts stay: they belong to a machine and its user's graphs. StoreError if the file cannot be written.
        """
        path = Path(os.path.expanduser(file)).absolute()
        if path.suffix != TEXT_SUFFIX:
            raise StoreError(f"cannot export to {path}: `merge` reads JSON lines from a name that ends in {TEXT_SUFFIX}.")
        with self._lock:
            timings, records = self._run(_facts) or (self._timings, self._records)
        rows = [{"kind": kind, "key": key, "value": json.loads(text)} for (kind, key), text in sorted(records.items()) if kind == "peaks"]
        for _, timing in sorted(timings.items()):
            known = asdict(timing)
            rows.append(known | {"epsilon": None} if math.isnan(timing.epsilon) else known)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise StoreError(f"cannot export to {path}: {error}.") from error
        return len(rows)

    def merge(self, other: str | Path) -> int:
        """Add the facts of another store, or of an exported file, that are not known here. Returns how many were added."""
        path = Path(os.path.expanduser(other)).absolute()
        timings, records = _read_text(path) if path.suffix == TEXT_SUFFIX else _read_other(path)
        with self._lock:
            added = self._run(lambda connection: _insert(connection, "IGNORE", timings.values(), records))
            if added is None:
                before = len(self._timings) + len(self._records)
                self._timings = timings | self._timings
                self._records = records | self._records
                added = len(self._timings) + len(self._records) - before
            return added

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
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _exclusive(self.path.parent):
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
        """After a read or write found damage: build the file anew and put back what this process knows.

        Another process may have done so already, hence the check.
        """
        assert self.path is not None
        try:
            with _exclusive(self.path.parent):
                if not _sound(self.path):
                    _set_aside(self.path, f"corrupt-{time.strftime('%Y%m%d-%H%M%S')}", "is damaged")
        except OSError as error:
            self._go_on_in_memory(error)
            return
        connection = self._connected()
        if connection is not None:
            try:
                _insert(connection, "IGNORE", self._timings.values(), self._records)
            except sqlite3.Error as error:
                self._disconnect()
                self._go_on_in_memory(error)

    def _go_on_in_memory(self, error: Exception) -> None:
        path, self.path = self.path, None
        assert path is not None
        with suppress(StoreError):  # a store that can be read and not written is still worth reading
            timings, records = _read_other(path, wait_s=1.0)
            self._timings = timings | self._timings
            self._records = records | self._records
        warnings.warn(
            f"the timings store {path} cannot be used ({error}). New timings are kept in memory and lost at exit. "
            "Set cache_dir (LAYERZERO_CACHE_DIR) to a directory that can be written to.",
            stacklevel=2,
        )


@functools.cache
def open_store(cache_dir: str | None) -> TimingStore:
    """One store per process and folder."""
    return TimingStore.open(cache_dir)


def _timings(rows: Iterable[Sequence[Any]]) -> dict[str, Timing]:
    """Rows as timings. SQLite lets any column hold any type, so a damaged row is told by its types, and left out."""
    known = {}
    for row in rows:
        if all(isinstance(value, kind) for value, kind in zip(row, _TYPES, strict=True)):
            key, kernel, ns, spread, samples, error, epsilon, detail = row
            epsilon = float("nan") if epsilon is None else epsilon
            known[key] = Timing(key, kernel, ns, spread, samples, error, epsilon, detail)
    return known


def _texts(rows: Iterable[Sequence[Any]]) -> _Records:
    return {(kind, key): text for kind, key, text in rows if isinstance(text, bytes)}


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
        rows += connection.execute(f"{_ALL_TIMINGS} WHERE key IN ({', '.join('?' * len(chunk))})", chunk)
    return rows


def _insert(connection: sqlite3.Connection, policy: str, timings: Iterable[Timing], records: _Records) -> int:
    before, now = connection.total_changes, time.time()
    with _transaction(connection):
        connection.executemany(f"INSERT OR {policy} {_PUT_TIMING}", [(*astuple(t), now) for t in timings])
        rows = [(kind, key, text.decode("utf-8", "replace"), now) for (kind, key), text in records.items()]
        connection.executemany(f"INSERT OR {policy} {_PUT_RECORD}", rows)
    return connection.total_changes - before


def _delete(connection: sqlite3.Connection, kind: str | None) -> int:
    removed = 0
    with _transaction(connection):
        if kind in (None, TIMING):
            removed += connection.execute("DELETE FROM timings").rowcount
        removed += connection.execute("DELETE FROM records WHERE kind = coalesce(?, kind)", (kind,)).rowcount
    return removed


def _entries(connection: sqlite3.Connection) -> list[Entry]:
    timings = "SELECT ?, key, length(key || coalesce(error, '') || detail), created FROM timings"
    rows = connection.execute(f"{timings} UNION ALL SELECT kind, key, length(value), created FROM records", (TIMING,))
    return [Entry(*row) for row in rows]


def _read_other(path: Path, wait_s: float = BUSY_S) -> tuple[dict[str, Timing], _Records]:
    """All facts of a file that is only read. StoreError if it is not a store of this version."""
    if not path.is_file():
        raise StoreError(f"no timings store at {path}. Give the path of a {FILE_NAME} file.")
    # A store that was closed in a directory that cannot be written to opens only as `immutable`.
    for last, how in ((False, "mode=ro"), (True, "mode=ro&immutable=1")):
        connection: sqlite3.Connection | None = None
        try:
            connection = _connect(f"{path.as_uri()}?{how}", wait_s, uri=True)
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version != SCHEMA_VERSION:
                raise StoreError(f"{path} has schema version {version}, this LayerZero reads version {SCHEMA_VERSION}.")
            return _facts(connection)
        except sqlite3.Error as error:
            if last or _damaged(error) or _code(error) == sqlite3.SQLITE_BUSY:
                raise StoreError(f"{path} cannot be read as a timings store: {error}.") from error
        finally:
            if connection is not None:
                connection.close()
    raise AssertionError("the last way either returned or raised")


def _facts(connection: sqlite3.Connection) -> tuple[dict[str, Timing], _Records]:
    return _timings(connection.execute(_ALL_TIMINGS)), _texts(connection.execute(_ALL_RECORDS))


def _read_text(path: Path) -> tuple[dict[str, Timing], _Records]:
    """All facts of an exported file. StoreError with the line if one is damaged."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as exported timings: {error}.") from error
    names = [field.name for field in fields(Timing)]
    timings: dict[str, Timing] = {}
    records: _Records = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if "kind" in row:
                records[str(row["kind"]), str(row["key"])] = json.dumps(row["value"], sort_keys=True).encode()
                continue
            known = _timings([[row[name] for name in names]])
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise StoreError(f"{path}, line {number}: not an exported fact ({error!r}). Export the store again.") from error
        if not known:
            raise StoreError(f"{path}, line {number}: a field of this timing has the wrong type. Export the store again.")
        timings |= known
    return timings, records


def _connect(database: str, wait_s: float = BUSY_S, *, uri: bool = False) -> sqlite3.Connection:
    connection = sqlite3.connect(database, timeout=wait_s, isolation_level=None, check_same_thread=False, uri=uri)
    connection.text_factory = lambda text: text.decode("utf-8", "replace")  # a flipped bit is not an exception
    return connection


def _open(path: Path) -> sqlite3.Connection:
    """A connection to a file with our tables, whatever is at `path` now. Called with the directory locked."""
    for _ in range(3):  # at most: one of another version, a damaged one kept from before, a new one
        connection = _connect(str(path))
        try:
            version = _prepare(connection)
        except sqlite3.Error as error:
            connection.close()
            if not _damaged(error):
                raise
            _set_aside(path, f"corrupt-{time.strftime('%Y%m%d-%H%M%S')}", "is damaged")
            continue
        if version == SCHEMA_VERSION:
            return connection
        connection.close()
        _set_aside(path, f"v{version}", f"has schema version {version}, this LayerZero uses {SCHEMA_VERSION}")
    raise OSError(f"{path} cannot be built anew")


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
        for query in (_ALL_TIMINGS, _ALL_RECORDS):
            connection.execute(f"{query} LIMIT 1").fetchall()
    return version


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


def _set_aside(path: Path, suffix: str, why: str) -> None:
    aside, number = path.with_name(f"{path.name}.{suffix}"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.{suffix}-{number}")
    _rename(path, aside)
    warnings.warn(f"the timings store {path} {why}. It was moved to {aside} and a new one is used.", stacklevel=2)


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


@contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """One process at a time opens or replaces the file: of many that start at once, each would else move it aside.

    A lock on the directory leaves no lock file behind. Where there is none (Windows, some network disks), SQLite's own
    locks still guard the rows.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(directory, os.O_RDONLY)
    try:
        end = time.monotonic() + BUSY_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:  # its holder hangs
                    break
                time.sleep(0.005)
            except OSError:
                break
        yield
    finally:
        os.close(handle)


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
