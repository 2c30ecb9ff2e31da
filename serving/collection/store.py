"""The files of an index, with the same interface for a folder and for an object store.

    FileStore("index")                a folder: when `write` returns, the file survives a crash of the machine
    FileStore("s3://bucket/prefix")   an object store, configured by the AWS_* variables (AWS_ENDPOINT_URL and so on)

Paths are relative, with slashes. Methods raise IndexProblem, which names the folder or bucket and says what to do.
"""

import errno
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from export.paths import local_path
from serving.collection.lease import Lease, lease_in_folder, lease_in_objects
from serving.collection.problems import IndexProblem
from serving.limits import SettingProblem, consistency_s

if TYPE_CHECKING:
    import lancedb

INDEX_CACHE_BYTES = 2**29  # of vector indices and others in this process's memory
METADATA_CACHE_BYTES = 2**26
THREADS = 16  # for writing and deleting: a disk combines flushes, and an object store answers several requests at once
RETRIES = 5  # of a request to an object store
STALE_S = 3600  # an unfinished file this old was left by a killed writer
FAILURES = (RuntimeError, ValueError, OSError)  # what the file system and LanceDB raise
NOT_PERMITTED = ("Permission denied", "Read-only file system", "Operation not permitted")
REFUSED = "the keys are refused"
OBJECT_STORE_ERRORS = {  # text in an object store's error: its meaning
    "NoSuchBucket": "there is no such bucket",
    "403 Forbidden": REFUSED,
    "SignatureDoesNotMatch": REFUSED,
    "InvalidAccessKeyId": REFUSED,
    "error sending request": "it does not answer",
    "NotEnoughCredentials": "no keys are set",
}

T = TypeVar("T")


class FileStore:
    """Files below `uri`. `local` is the folder, None for an object store. Thread-safe. Only writing creates folders."""

    def __init__(self, uri: str | Path):
        scheme, mark, rest = str(uri).partition("://")
        self.local = local_path(rest if mark else uri) if not mark or scheme == "file" else None
        self.uri = str(self.local or uri).rstrip("/") or "/"
        self._flushed: set[Path] = set()

    def read(self, path: str) -> bytes | None:
        """Returns the file's bytes, None if it does not exist."""
        with self.explained("read"):
            if self.local is not None:
                try:
                    return (self.local / path).read_bytes()
                except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                    return None
            try:
                return bytes(self._objects.get(path).bytes())
            except FileNotFoundError:
                return None

    def write(self, path: str, data: bytes) -> None:
        """Write or replace a file. After a crash it is either the old one or the new one, never a part."""
        self.write_many({path: data})

    def write_many(self, files: Mapping[str, bytes]) -> None:
        """Write each file like `write`. After an error some of them may be written."""
        if not files:
            return
        with self.explained("written"):
            _each(self._put, files.items())
            if self.local is not None:
                folders = {folder for path in files for folder in (self.local / path).parents}
                _each(fsync, sorted(folder for folder in folders if folder.is_relative_to(self.local)))

    def delete(self, paths: Iterable[str]) -> None:
        """Delete those of the files that exist."""
        with self.explained("written"):
            if self.local is not None:
                for path in paths:
                    (self.local / path).unlink(missing_ok=True)
            elif paths := list(paths):
                _each(self._remove, paths)

    def move(self, paths: Mapping[str, str]) -> None:
        """Move files from each key to its value, replacing what is there. Files that do not exist are skipped."""
        with self.explained("written"):
            _each(self._move, paths.items())
            if self.local is not None:
                _each(fsync, {(self.local / path).parent for path in [*paths, *paths.values()]})

    def list(self, prefix: str) -> Iterator[str]:
        """Yields the paths of all files below the folder `prefix`."""
        return (path for path, _, _ in self.entries(prefix))

    def size(self, prefix: str) -> int:
        """Returns the size in bytes of all files below the folder `prefix`."""
        return sum(size for _, size, _ in self.entries(prefix))

    def entries(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        """Yields (path, bytes, time of the last change in s) of all files below the folder `prefix`."""
        with self.explained("read"):
            if self.local is None:
                for page in self._objects.list(prefix.rstrip("/") or None):
                    yield from ((entry["path"], entry["size"], entry["last_modified"].timestamp()) for entry in page)
                return
            for folder, _, names in os.walk(self.local / prefix):
                for name in names:
                    path = Path(folder, name)
                    try:
                        facts = path.stat()
                    except FileNotFoundError:  # another process has just deleted it
                        continue
                    yield path.relative_to(self.local).as_posix(), facts.st_size, facts.st_mtime

    def sweep(self, prefix: str, older_s: float) -> None:
        """Delete files of the folder `prefix` older than `older_s`, and unfinished files of killed writers."""
        now = time.time()
        self.delete([path for path, _, at in self.entries(prefix) if at < now - older_s])
        self.delete([path for path, _, at in self.entries(".writing") if at < now - STALE_S])

    def connect(self) -> "lancedb.DBConnection":
        """Returns the LanceDB connection, the same at every call. Reads through it see the newest commit; in an object
        store that of a moment ago, as `consistency_s` says, since to look for a newer one takes several requests."""
        with self.explained("read"):
            return self._connection

    @property
    def consistency_s(self) -> float:
        """Seconds after which the writes of others are seen; 0 in a folder. Raises IndexProblem."""
        try:
            return 0.0 if self.local is not None else consistency_s()
        except SettingProblem as problem:
            raise IndexProblem(f"{problem}.") from problem

    def exists(self) -> bool:
        """Whether the folder exists; connecting would create it. An object store counts as existing."""
        return self.local is None or self.local.is_dir()

    def flush(self, prefix: str) -> None:
        """Make durable what other code (LanceDB) has written to the folder `prefix`: new files, then the folders."""
        if self.local is None:
            return
        root = self.local / prefix
        with self.explained("written"):
            present = {Path(folder, name) for folder, _, names in os.walk(root) for name in names}
            new = present - self._flushed
            _each(fsync, new)
            for folder in {path.parent for path in new} | {root, self.local}:
                fsync(folder)
            self._flushed = {path for path in self._flushed if not path.is_relative_to(root)} | present

    @contextmanager
    def lease(self, name: str) -> Iterator[Lease]:
        """Yields a Lease that is true for one holder at a time across all processes, and immediately false for others.
        It becomes false if it is lost."""
        with ExitStack() as stack:
            with self.explained("written"):
                local = self.local
                lease = lease_in_objects(self._objects, name) if local is None else lease_in_folder(local, name)
                held = stack.enter_context(lease)
            yield held

    @contextmanager
    def explained(self, done: str) -> Iterator[None]:
        """Turn errors of the system, LanceDB and the object store into IndexProblem. `done`: "read" or "written"."""
        try:
            yield
        except IndexProblem:
            raise
        except Exception as error:
            if not (isinstance(error, FAILURES) or _is_store_error(error)):
                raise
            raise IndexProblem(self._sentence(error, done)) from error

    def _sentence(self, error: Exception, done: str) -> str:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            return f"The disk of {self.uri} is full. Nothing was changed; free some space and try again."
        if self.local is not None:
            hint = "`twinview index verify` finds damaged files."
            if any(mark in str(error) for mark in NOT_PERMITTED):
                hint = "Give this program permission there, or choose another index."
            return f"{self.uri} cannot be {done} ({first_line(error)}). {hint}"
        reason = next((words for mark, words in OBJECT_STORE_ERRORS.items() if mark in str(error)), first_line(error))
        if reason == REFUSED and not os.environ.get("AWS_ACCESS_KEY_ID"):
            reason = "it refuses requests without keys, and AWS_ACCESS_KEY_ID is not set"
        return (
            f"{self.uri} cannot be {done} ({reason}). Check the bucket's name and AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, "
            f"AWS_SECRET_ACCESS_KEY and AWS_REGION."
        )

    def _put(self, entry: tuple[str, bytes]) -> None:
        path, data = entry
        if self.local is None:
            self._objects.put(path, data)
            return
        target, writing = self.local / path, self.local / ".writing"
        target.parent.mkdir(parents=True, exist_ok=True)
        writing.mkdir(exist_ok=True)
        part = writing / f"{os.getpid()}-{secrets.token_hex(8)}"
        try:
            part.write_bytes(data)
            fsync(part)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._objects.delete(path)

    def _move(self, entry: tuple[str, str]) -> None:
        old, new = entry
        with suppress(FileNotFoundError):
            if self.local is None:
                self._objects.copy(old, new)
                self._objects.delete(old)
                return
            (self.local / new).parent.mkdir(parents=True, exist_ok=True)
            (self.local / old).replace(self.local / new)
            os.utime(self.local / new)  # the time of the move, as in an object store

    @cached_property
    def _connection(self) -> "lancedb.DBConnection":
        lancedb, session = _lancedb()
        options = {} if self.local is not None else {"allow_http": _allow_http(), "client_retry_timeout": "30"}
        return lancedb.connect(
            self.uri,
            read_consistency_interval=timedelta(seconds=self.consistency_s),
            storage_options=options or None,
            session=session,
        )

    @cached_property
    def _objects(self) -> Any:
        from obstore.store import from_url

        return from_url(
            self.uri,
            client_options={"allow_http": _allow_http() == "true", "timeout": "60s"},
            retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=30)},
        )

    def __getstate__(self) -> dict:
        return {"uri": self.uri, "local": self.local, "_flushed": set()}  # connections do not cross processes


@cache
def _lancedb() -> tuple[Any, Any]:
    """Returns LanceDB and this process's caches, which all connections share: so the number of collections does not
    matter. Imports it late: that takes seconds, and the supervisor of `bentoml serve` imports this module too."""
    os.environ.setdefault("LANCEDB_LOG", "error")  # maintenance prints warnings of partitions that it has joined
    import lancedb

    return lancedb, lancedb.Session(INDEX_CACHE_BYTES, METADATA_CACHE_BYTES)


def first_line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.partition(", /")[0].partition("\n")[0].rstrip(" .")[:300]  # without the position in Lance's sources


def fsync(path: Path) -> None:
    """Flush a file or folder to disk; nothing if another process has just deleted it."""
    if os.name == "nt":  # Windows can flush neither folders nor files opened for reading
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _allow_http() -> str:
    return "true" if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://") else "false"


def _is_store_error(error: Exception) -> bool:
    return type(error).__module__.startswith("obstore")


def _each(function: Callable[[T], object], entries: Iterable[T]) -> None:
    """Call function(entry) for each entry, in threads if there are several."""
    entries = list(entries)
    if len(entries) < 2:
        for entry in entries:
            function(entry)
        return
    with ThreadPoolExecutor(min(THREADS, len(entries))) as pool:
        for _ in pool.map(function, entries):
            pass
