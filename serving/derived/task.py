"""What is computed of a whole collection, once and in a process of its own, and kept beside it: map and duplicates.

    INDEX/derived/<collection>.<encoder id>/<kind>.npz     the newest result
    INDEX/derived/<collection>.<encoder id>/<kind>.json    of what it was made; how far the next one is

A result stays until the next one is there. It tells for itself how much of the collection has changed since. One at a
time is computed in an index, whatever asks for it.
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
from typing import Literal

import numpy as np

from serving.collection.index import Index, IndexProblem
from serving.collection.store import Store, StoreProblem
from serving.limits import give_way

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"duplicates": "serving.derived.duplicates", "map": "serving.derived.map"}
SIGN_S = 2.0  # between two signs of life
SILENT_S = 60.0  # without one, it is dead
TOGETHER = 4096  # rows read at once

Report = Callable[[str, float], None]  # the stage, and its share that is done


class DerivedProblem(IndexProblem):
    """What cannot be computed. The message says why."""


@dataclass(frozen=True)
class Progress:
    state: Literal["none", "computing", "done", "failed"] = "none"
    stage: str = ""
    share: float = 0.0
    """0 to 1, of the stage."""
    problem: str | None = None
    at: float = 0.0
    """Unix seconds of the last sign of life."""
    made: str = ""
    """Mark of the newest result; none where it is empty."""
    version: int = 0
    """Of the table, of the newest result."""
    settings: dict | None = None
    """Of the newest result."""


@dataclass(frozen=True)
class Result:
    arrays: dict[str, np.ndarray]
    """What the kind's `compute` has returned; "ids" (n,) bytes are the ids of the whole collection then."""
    settings: dict
    new: int
    """Items of today that it does not know."""
    gone: int
    """Items that it knows and that are no more. Whether one was replaced under its id is not looked at."""

    @property
    def stale(self) -> bool:
        return bool(self.new or self.gone)


class Derived:
    """One kind of result, of one encoder's vectors of one collection. raises StoreProblem"""

    def __init__(self, index: Index, kind: str):
        self.index, self.kind = index, kind
        self._path = f"derived/{index.name}.{index.encoder_id}/{kind}"

    def progress(self) -> Progress:
        with _of_index():
            data = self.index.store.read(f"{self._path}.json")
        progress = Progress(**json.loads(data)) if data else Progress()
        if progress.state == "computing" and time.time() - progress.at > SILENT_S:
            return replace(progress, state="failed", problem="its process ended without a word; start it again")
        return progress

    def result(self, progress: Progress | None = None) -> Result | None:
        """The newest, None where there is none."""
        progress = progress or self.progress()
        if not progress.made or (arrays := _arrays(self.index.store.uri, self._path, progress.made)) is None:
            return None
        version = self.index.facts().version
        new, gone = (0, 0) if version == progress.version else _changes(self.index, version, progress.made, arrays)
        return Result(arrays, progress.settings or {}, new, gone)

    def start(self, **settings) -> Progress:
        """Have it computed by a process of its own, unless one is at it."""
        progress = self.progress()
        if progress.state == "computing":
            return progress
        progress = replace(progress, state="computing", stage="starting", share=0.0, problem=None, at=time.time())
        self._write(progress)
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
        threading.Thread(target=process.wait, daemon=True).start()  # or it stays as a zombie
        return progress

    def compute(self, **settings) -> Result:
        """Here and now. raises StoreProblem, DerivedProblem"""
        module = importlib.import_module(KINDS[self.kind])
        with _of_index(), self._living() as report:
            while True:
                with self.index.store.lease("derived") as held:
                    if held:
                        version = self.index.facts().version
                        arrays = module.compute(self.index, report, **settings)
                        buffer = io.BytesIO()
                        np.savez(buffer, **arrays)
                        self.index.store.write(f"{self._path}.npz", buffer.getvalue())
                        made = secrets.token_hex(8)
                        done = Progress("done", at=time.time(), made=made, version=version, settings=settings)
                        report.final = done
                        return Result(arrays, settings, 0, 0)
                report("waiting for another computation", 0.0)
                time.sleep(1)

    @contextmanager
    def _living(self) -> Iterator["_Signs"]:
        signs = _Signs(self)
        try:
            yield signs
        except StoreProblem as error:
            signs.fail(str(error))
            raise
        except MemoryError as error:
            signs.fail("the machine's memory is too small for a collection of this size")
            raise DerivedProblem(signs.final.problem) from error
        except BaseException as error:
            signs.fail(f"its process failed: {error or type(error).__name__}")
            raise
        finally:
            signs.end()

    def _write(self, progress: Progress) -> None:
        with _of_index():
            self.index.store.write(f"{self._path}.json", json.dumps(asdict(progress)).encode())


class _Signs:
    """Called with stage and share; writes them down every SIGN_S, also while nothing is reported."""

    def __init__(self, derived: Derived):
        self._derived = derived
        now = time.time()
        self._now = replace(derived.progress(), state="computing", stage="starting", share=0.0, problem=None, at=now)
        derived._write(self._now)
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
            self._derived._write(replace(self.final, at=time.time()))

    def _run(self) -> None:
        while not self._ended.wait(SIGN_S):
            with suppress(StoreProblem):  # the next sign may come through
                self._derived._write(replace(self._now, at=time.time()))


def whole(index: Index, report: Report, fields: tuple[str, ...]) -> tuple[dict[str, list], np.ndarray]:
    """The given fields of all items, and their vectors (n, d), of one version."""
    count, read = index.count(), 0
    columns, vectors = {field: [] for field in fields}, []
    for items, some in index.scan(batch=TOGETHER):
        for field, column in columns.items():
            column += [getattr(item, field) for item in items]
        vectors.append(some)
        read += len(items)
        report("reading", read / max(read, count))
    return columns, np.concatenate(vectors) if vectors else np.empty((0, index.dimension), np.float32)


@lru_cache(4)
def _arrays(uri: str, path: str, made: str) -> dict[str, np.ndarray] | None:
    with _of_index():
        data = Store(uri).read(f"{path}.npz")
    if data is None:
        return None
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return dict(file)


@contextmanager
def _of_index() -> Iterator[None]:
    try:
        yield
    except StoreProblem as error:
        raise error if isinstance(error, IndexProblem) else IndexProblem(str(error)) from error.__cause__


_changed: dict[tuple, tuple[int, int]] = {}


def _changes(index: Index, version: int, made: str, arrays: dict[str, np.ndarray]) -> tuple[int, int]:
    """How many items are new since, and how many are gone."""
    key = (made, version)
    if key not in _changed:
        today, then = index.ids(), {id.decode() for id in arrays["ids"].tolist()}
        _changed.clear()
        _changed[key] = len(today - then), len(then - today)
    return _changed[key]


def main(task: str) -> int:
    """What `start` starts."""
    give_way()
    given = json.loads(task)
    index = Index(given["index"], given["encoder"], given["dimension"], given["name"])
    try:
        Derived(index, given["kind"]).compute(**given["settings"])
    except (StoreProblem, KeyboardInterrupt) as error:
        print(f"error: {given['kind']} of {given['name']}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
