"""Results computed from a whole collection in a separate process, and stored with it: map and duplicates.

    INDEX/derived/<collection>.<encoder id>/<kind>.npz     the newest result
    INDEX/derived/<collection>.<encoder id>/<kind>.json    its settings and table version; progress of the next one

A result is used until the next one is complete, and reports how much of the collection has changed since. Only one
computation runs at a time for each index, across all processes.
"""

import importlib
import io
import json
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from serving.collection.index import Index, IndexProblem
from serving.collection.store import FileStore
from serving.limits import lower_priority

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"duplicates": "serving.derived.duplicates", "map": "serving.derived.map"}
NEEDED = {"duplicates": {"exact", "least", "own"}, "map": set()}  # arrays that results of older versions do not have
HEARTBEAT_S = 2.0
SILENT_S = 60.0  # a computation without a heartbeat for this long is considered dead
READ_TOGETHER = 4096  # rows
RESULTS_KEPT = 4  # in memory
RUNNING: set[tuple[str, str]] = set()  # results that a process of this one computes; on a busy machine it is silent
ENDED: dict[tuple[str, str], float] = {}  # when a process of this one failed to compute a result, Unix seconds
CHANGES_KEPT = 64  # counts of changes, one for each result and version of its table

Report = Callable[[str, float], None]  # called with the stage and the share of it that is done, 0 to 1


class DerivedProblem(IndexProblem):
    """A result that cannot be computed. The message says why."""


@dataclass(frozen=True)
class Progress:
    state: Literal["none", "computing", "done", "failed"] = "none"
    stage: str = ""
    share: float = 0.0
    """Share of the stage that is done, 0 to 1."""
    problem: str | None = None
    at: float = 0.0
    """Time of the last heartbeat, Unix seconds."""
    made: str = ""
    """Identifies the newest result; empty if there is none."""
    version: int = 0
    """Version of the table that the newest result was computed from."""
    settings: dict | None = None
    """Settings of the newest result."""


@dataclass(frozen=True)
class Result:
    arrays: dict[str, np.ndarray]
    """The return value of the kind's `compute`; "ids" (n,) bytes are the ids of the whole collection at that time."""
    settings: dict
    new: int
    """Number of items added since."""
    gone: int
    """Number of items deleted since. Items replaced under the same id are not counted."""

    @property
    def stale(self) -> bool:
        return bool(self.new or self.gone)


class Derived:
    """One kind of result for one encoder's table of a collection. Raises IndexProblem."""

    def __init__(self, index: Index, kind: str):
        self.index, self.kind = index, kind
        self._path = f"derived/{index.stored}.{index.encoder_id}/{kind}"
        self._key = (str(index.store.uri), self._path)

    def progress(self) -> Progress:
        data = self.index.store.read(f"{self._path}.json")
        progress = Progress(**json.loads(data)) if data else Progress()
        if progress.state == "computing" and self._key not in RUNNING and time.time() - progress.at > SILENT_S:
            return replace(progress, state="failed", problem="its process ended unexpectedly; start it again")
        if progress.state == "computing" and progress.at <= ENDED.get(self._key, 0.0):  # it could not write that
            problem = "its process failed, and the service's log says why; perhaps the disk is full"
            return replace(progress, state="failed", problem=problem)
        return progress

    def result(self, progress: Progress | None = None) -> Result | None:
        """Returns the newest result, None if there is none."""
        progress = progress or self.progress()
        if not progress.made or (arrays := _arrays(self.index.store.uri, self._path, progress.made)) is None:
            return None
        if not NEEDED[self.kind] <= arrays.keys():
            return None
        version, new, gone = self.index.facts().version, 0, 0
        if version != progress.version:
            table = (self.index.store.uri, self.index.encoder_id, self.index.dimension, self.index.name)
            new, gone = _changes(table, version, self._path, progress.made)
        return Result(arrays, progress.settings or {}, new, gone)

    def start(self, **settings: Any) -> Progress:
        """Start the computation in a separate process, unless one is running already."""
        progress = self.progress()
        if progress.state == "computing":
            return progress
        progress = replace(progress, state="computing", stage="starting", share=0.0, problem=None, at=time.time())
        self.write(progress)
        store = self.index.store
        task = {
            "index": str(store.local.resolve()) if store.local else store.uri,
            "encoder": self.index.encoder_id,
            "dimension": self.index.dimension,
            "name": self.index.name,
            "kind": self.kind,
            "settings": settings,
        }
        command = [sys.executable, "-m", "serving.derived.task", json.dumps(task)]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        RUNNING.add(self._key)
        threading.Thread(target=self._note_failure, args=(process,), daemon=True).start()
        return progress

    def _note_failure(self, process: subprocess.Popen) -> None:
        failed = process.wait() != 0
        RUNNING.discard(self._key)
        if failed:
            ENDED[self._key] = time.time()

    def compute(self, **settings: Any) -> Result:
        """Compute the result in this process and store it. Raises IndexProblem, DerivedProblem."""
        module = importlib.import_module(KINDS[self.kind])
        with self._heartbeat() as heartbeat:
            while True:
                with self.index.store.lease("derived") as held:
                    if held:
                        version = self.index.facts().version
                        arrays = module.compute(self.index, heartbeat, **settings)
                        buffer = io.BytesIO()
                        np.savez(buffer, **arrays)
                        self.index.store.write(f"{self._path}.npz", buffer.getvalue())
                        made = secrets.token_hex(8)
                        done = Progress("done", at=time.time(), made=made, version=version, settings=settings)
                        heartbeat.final = done
                        return Result(arrays, settings, 0, 0)
                heartbeat("waiting for another computation", 0.0)
                time.sleep(1)

    def write(self, progress: Progress) -> None:
        self.index.store.write(f"{self._path}.json", json.dumps(asdict(progress)).encode())

    @contextmanager
    def _heartbeat(self) -> Iterator["_Heartbeat"]:
        heartbeat = _Heartbeat(self)
        try:
            yield heartbeat
        except IndexProblem as error:
            heartbeat.fail(str(error))
            raise
        except MemoryError as error:
            problem = "this machine has too little memory for a collection of this size"
            heartbeat.fail(problem)
            raise DerivedProblem(problem) from error
        except BaseException as error:
            heartbeat.fail(f"its process failed: {error or type(error).__name__}")
            raise
        finally:
            heartbeat.end()


class _Heartbeat:
    """Writes the progress every HEARTBEAT_S in a thread. Call it with the stage and the share to change them."""

    def __init__(self, derived: Derived):
        self._derived = derived
        now = time.time()
        self._now = replace(derived.progress(), state="computing", stage="starting", share=0.0, problem=None, at=now)
        derived.write(self._now)
        self.final: Progress | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __call__(self, stage: str, share: float) -> None:
        self._now = replace(self._now, stage=stage, share=round(float(share), 3))

    def fail(self, problem: str) -> None:
        self.final = replace(self._now, state="failed", problem=problem)

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        if self.final:
            self._derived.write(replace(self.final, at=time.time()))

    def _run(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            with suppress(IndexProblem):  # if one heartbeat cannot be written, the next may be
                self._derived.write(replace(self._now, at=time.time()))


def read_all(index: Index, report: Report, fields: tuple[str, ...]) -> tuple[dict[str, list], np.ndarray]:
    """Returns these fields of all items and the vectors (n, d), of one version."""
    count, read = index.count(), 0
    columns, parts = {field: [] for field in fields}, []
    for items, vectors in index.scan(batch=READ_TOGETHER):
        for field, column in columns.items():
            column += [getattr(item, field) for item in items]
        parts.append(vectors)
        read += len(items)
        report("reading", read / max(read, count))
    return columns, np.concatenate(parts) if parts else np.empty((0, index.dimension), np.float32)


@lru_cache(RESULTS_KEPT)
def _arrays(uri: str, path: str, made: str) -> dict[str, np.ndarray] | None:
    data = FileStore(uri).read(f"{path}.npz")
    if data is None:
        return None
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return dict(file)


@lru_cache(CHANGES_KEPT)
def _changes(table: tuple[str, str, int, str], version: int, path: str, made: str) -> tuple[int, int]:
    """Returns how many items were added and deleted since the result. table: arguments of Index; version: of it now."""
    now = Index(*table).ids()
    if (arrays := _arrays(table[0], path, made)) is None:
        raise IndexProblem(f"{table[0]}/{path}.npz has just been deleted; try again")
    then = {id.decode() for id in arrays["ids"].tolist()}
    return len(now - then), len(then - now)


def main(task: str) -> int:
    """Run the computation that `Derived.start` describes."""
    lower_priority()
    query = json.loads(task)
    index = Index(query["index"], query["encoder"], query["dimension"], query["name"])
    try:
        Derived(index, query["kind"]).compute(**query["settings"])
    except (IndexProblem, KeyboardInterrupt) as error:
        print(f"error: {query['kind']} of {query['name']}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
