"""Leases: locks with one holder at a time across all processes. A context yields True to the holder, and immediately
False to the others.

In a folder it is a file lock of the operating system, which is released when the process dies. In an object store it is
an object `.leases/<name>` that contains the time at which the lease expires. The holder renews it; every change is
conditional on the object that was last seen, so if two processes find an expired lease, only one of them gets it.
"""

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LEASE_S = 60  # in an object store, the lease of a dead holder expires after this time


@contextmanager
def lease_in_folder(folder: Path, name: str) -> Iterator[bool]:
    from filelock import FileLock, Timeout

    (folder / ".leases").mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".leases" / name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def lease_in_objects(objects: Any, name: str) -> Iterator[bool]:
    """`objects`: an obstore store."""
    claim = _LeaseClaim(objects, f".leases/{name}")
    if not claim.take():
        yield False
        return
    done = threading.Event()

    def renew() -> None:
        while not done.wait(LEASE_S / 4):
            claim.renew()

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield True
    finally:
        done.set()
        thread.join()
        claim.release()


class _LeaseClaim:
    def __init__(self, objects: Any, path: str):
        self._objects, self._path = objects, path
        self._mark = secrets.token_hex(8)  # so that the objects of two holders differ
        self._seen: dict | None = None

    def take(self) -> bool:
        self._seen = self._put("create", time.time() + LEASE_S)
        if self._seen is None:
            try:
                old = self._objects.get(self._path)
            except FileNotFoundError:
                return False  # it has just been released; a later caller gets it
            if float(bytes(old.bytes()).split()[0]) < time.time():
                self._seen = self._put(_condition(old.meta), time.time() + LEASE_S)
        return self._seen is not None

    def renew(self) -> None:
        self._extend(time.time() + LEASE_S)

    def release(self) -> None:
        self._extend(0)

    def _extend(self, expires: float) -> None:
        try:
            self._seen = self._put(_condition(self._seen), expires) or self._seen
        except Exception:  # the next renewal may succeed; otherwise the lease expires
            return

    def _put(self, mode: Any, expires: float) -> dict | None:
        """Write the object; return None if its state is not the one that `mode` requires."""
        from obstore.exceptions import AlreadyExistsError, NotFoundError, PreconditionError

        try:
            return self._objects.put(self._path, f"{expires} {self._mark}".encode(), mode=mode)
        except (AlreadyExistsError, PreconditionError, NotFoundError):
            return None


def _condition(seen: Any) -> dict:
    return {key: seen[key] for key in ("e_tag", "version") if seen.get(key)}
