"""The API keys: their names and what they may do.

A key is written as [NAME] [read] KEY, for example `s3cr3t`, `anna s3cr3t` or `dashboard read s3cr3t`. With `read` it
may not add, change or delete items. The log shows the name. Keys without one are called key 1, key 2, ..., in order.
"""

import hashlib
import hmac
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.paths import local_path

logger = logging.getLogger("twinview")

LOOK_S = 1.0  # between two looks at the file


class KeyProblem(ValueError):
    """Keys that cannot be used. The message never contains a key."""


@dataclass(frozen=True)
class ApiKey:
    name: str
    digest: bytes
    """SHA-256 of the key."""
    may_write: bool = True


class ApiKeys:
    """The given keys, and those of a file, which is read again when it changes."""

    def __init__(self, given: Sequence[str] = (), file: str | None = None):
        """raises  KeyProblem, also when there is a file without a key"""
        self._given, self._file = parse(given), local_path(file) if file else None
        self._from_file: tuple[ApiKey, ...] = ()
        self._stamp, self._looked = self._current_stamp(), time.monotonic()
        if self._file:
            self._from_file = self._read()
            if not (self._given or self._from_file):
                raise KeyProblem(f"{self._file} holds no key")

    def __bool__(self) -> bool:
        """Whether keys are required. A file that has become empty admits nobody."""
        return bool(self._given or self._file)

    def __iter__(self) -> Iterator[ApiKey]:
        self._look()
        return iter((*self._given, *self._from_file))

    def find(self, secret: bytes) -> ApiKey | None:
        """Takes the same time for every wrong key: it is compared with all of them."""
        digest = hashlib.sha256(secret).digest()
        return ([key for key in self if hmac.compare_digest(digest, key.digest)] or [None])[0]

    def _look(self) -> None:
        if self._file is None or time.monotonic() - self._looked < LOOK_S:
            return
        self._looked, stamp = time.monotonic(), self._current_stamp()
        if stamp == self._stamp:
            return
        try:
            self._from_file = self._read()
        except KeyProblem as error:
            logger.warning("%s; the keys that were there before stay valid", error)
        else:
            logger.info("read %d API keys from %s", len(self._from_file), self._file)
        self._stamp = stamp

    def _current_stamp(self) -> tuple[int, int, int] | None:
        try:
            facts = os.stat(self._file or "")
        except OSError:
            return None
        return facts.st_mtime_ns, facts.st_size, facts.st_ino

    def _read(self) -> tuple[ApiKey, ...]:
        try:
            # Editors on Windows write a byte-order mark, which is not part of the first key.
            lines = Path(self._file or "").read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise KeyProblem(f"{self._file} cannot be read") from error
        return parse([line for line in lines if not line.lstrip().startswith("#")], len(self._given))


def parse(lines: Sequence[str], first: int = 0) -> tuple[ApiKey, ...]:
    """first  number of keys before these. Raises KeyProblem."""
    keys: list[ApiKey] = []
    for words in filter(None, map(str.split, lines)):
        *facts, secret = words
        number = first + len(keys) + 1
        names = [word for word in facts if word != "read"]
        if secret == "read" or len(names) > 1 or facts.count("read") > 1 or (names and facts[0] != names[0]):
            raise KeyProblem(f"key {number} is not written as [NAME] [read] KEY")
        name = names[0] if names else f"key {number}"
        keys.append(ApiKey(name, hashlib.sha256(secret.encode()).digest(), "read" not in facts))
    return tuple(keys)
