"""Leases: locks with one holder at a time across all processes. A context yields a Lease, which is true for the holder;
for the others it is false, immediately.

In a folder it is a file lock of the operating system, which is released when the process dies. In an object store it is
an object `.leases/<name>` that contains the time at which the lease expires. The holder renews it; every change is
conditional on the object that was last seen, so if two processes find an expired lease, only one of them gets it. If it
cannot be renewed in time, because the store does not answer or the process was stopped, the holder's becomes false.
"""

import logging
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

log = logging.getLogger("twinview")

LEASE_S = 60  # in an object store, the lease of a dead holder expires after this time


class Lease:
    """Whether this process holds the lease, at the moment of asking."""

    def __init__(self, held: bool):
        self._held = held

    def __bool__(self) -> bool:
        return self._held

    def lose(self) -> None:
        self._held = False


@contextmanager
def lease_in_folder(folder: Path, name: str) -> Iterator[Lease]:
    from filelock import FileLock, Timeout

    (folder / ".leases").mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".leases" / name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield Lease(False)
        return
    try:
        yield Lease(True)
    finally:
        lock.release()


@contextmanager
def lease_in_objects(objects: Any, name: str) -> Iterator[Lease]:
    """`objects`: an obstore store."""
    claim = _LeaseClaim(objects, f".leases/{name}")
    if not claim.take():
        yield Lease(False)
        return
    done, lease = threading.Event(), Lease(True)

    def renew() -> None:
        while not done.wait(LEASE_S / 4):
            if not claim.renew():
                log.warning("the lease %s was lost: it could not be renewed in time", name)
                lease.lose()
                return

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        done.set()
        thread.join()
        if lease:
            claim.release()


class _LeaseClaim:
    def __init__(self, objects: Any, path: str):
        self._objects, self._path = objects, path
        self._mark = secrets.token_hex(8)  # so that the objects of two holders differ
        self._seen: dict | None = None
        self._expires = 0.0

    def take(self) -> bool:
        self._expires = time.time() + LEASE_S
        self._seen = self._put("create", self._expires)
        if self._seen is None:
            try:
                old = self._objects.get(self._path)
            except FileNotFoundError:
                return False  # it has just been released; a later caller gets it
            if float(bytes(old.bytes()).split()[0]) < time.time():
                self._seen = self._put(_condition(old.meta), self._expires)
        return self._seen is not None

    def renew(self) -> bool:
        """Returns False when the lease has expired, or another process has taken it."""
        expires = time.time() + LEASE_S
        try:
            if (seen := self._put(_condition(self._seen), expires)) is None:
                current = self._objects.get(self._path)
                if self._mark not in bytes(current.bytes()).decode():
                    return False
                seen = current.meta  # an earlier renewal whose answer was lost
            self._seen, self._expires = seen, expires
        except Exception:  # the next renewal may succeed
            pass
        return time.time() < self._expires

    def release(self) -> None:
        with suppress(Exception):  # otherwise it expires
            self._put(_condition(self._seen), 0)

    def _put(self, mode: Any, expires: float) -> dict | None:
        """Write the object; return None if its state is not the one that `mode` requires."""
        from obstore.exceptions import AlreadyExistsError, NotFoundError, PreconditionError

        try:
            return self._objects.put(self._path, f"{expires} {self._mark}".encode(), mode=mode)
        except (AlreadyExistsError, PreconditionError, NotFoundError):
            return None


def _condition(seen: Any) -> dict:
    return {key: seen[key] for key in ("e_tag", "version") if seen.get(key)}
