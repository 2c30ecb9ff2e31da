"""One holder at a time over all processes: a context that yields True to it, and False at once to the others.

In a folder it is a lock of the system, which lets go when the process dies. In an object store it is an object
`.leases/<name>` that says until when it is held; it is renewed while the holder lives, and each change of it is on
condition that it is the one last seen, so that of two who find it expired one gets it.
"""

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LEASE_S = 60  # in an object store a holder that died is waited for this long


@contextmanager
def of_folder(folder: Path, name: str) -> Iterator[bool]:
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
def of_objects(objects, name: str) -> Iterator[bool]:
    """`objects`: obstore's store."""
    claim = _Claim(objects, f".leases/{name}")
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
        claim.renew(expires=0)


class _Claim:
    def __init__(self, objects, path: str):
        self._objects, self._path = objects, path
        self._mark = secrets.token_hex(8)  # so that no two holders' objects are the same
        self._seen: dict | None = None

    def take(self) -> bool:
        self._seen = self._put("create", time.time() + LEASE_S)
        if self._seen is None:
            try:
                old = self._objects.get(self._path)
            except FileNotFoundError:
                return False  # its holder has just gone: the next one who asks will have it
            if float(bytes(old.bytes()).split()[0]) < time.time():
                self._seen = self._put(_condition(old.meta), time.time() + LEASE_S)
        return self._seen is not None

    def renew(self, expires: float | None = None) -> None:
        """Or give it up, with 0."""
        try:
            until = time.time() + LEASE_S if expires is None else expires
            self._seen = self._put(_condition(self._seen), until) or self._seen
        except Exception:  # the store may answer again at the next turn; else it expires
            return

    def _put(self, mode, expires: float) -> dict | None:
        """None where it is not as `mode` wants it."""
        from obstore.exceptions import AlreadyExistsError, NotFoundError, PreconditionError

        try:
            return self._objects.put(self._path, f"{expires} {self._mark}".encode(), mode=mode)
        except (AlreadyExistsError, PreconditionError, NotFoundError):
            return None


def _condition(seen) -> dict:
    return {key: seen[key] for key in ("e_tag", "version") if seen.get(key)}
