"""How much the service accepts: in one request, and in all requests together."""

import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from export.artifact import MAX_PIXELS

if TYPE_CHECKING:
    from serving.errors import Busy

RETRY_AFTER_S = 1
DECODE_S = 2.0
YES, NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
PREFIX = "TWINVIEW_"
SETTINGS = (  # the environment variables, without PREFIX
    *("API_KEY", "API_KEYS", "API_KEYS_FILE", "CONSISTENCY_S", "DECODE_S", "ENCODER", "GPU", "INDEX", "KEEP_ORIGINALS"),
    *("LOG", "OPEN", "ORIGINS", "PROXY", "PUBLIC_PATH", "RUNS"),
)
NEAR = 0.75  # similarity of a misspelt one, of difflib


class SettingProblem(ValueError):
    """An environment variable that cannot be used. The message names it."""


@dataclass(frozen=True)
class Limits:
    body_bytes: int = 64 * 2**20
    """Largest request body, in bytes."""
    images: int = 256
    """Most images in one request."""
    rows: int = 1000
    """Most ids, or vectors computed elsewhere, in one request."""
    pixels: int = MAX_PIXELS
    """Largest image, in pixels."""
    request_pixels: int = 4 * MAX_PIXELS
    """Most pixels of all images in one request, as `export.artifact.open_image` counts their work."""
    pixels_at_once: int = 8 * MAX_PIXELS
    """Most pixels of all large images that are decoded or wait for it, counted in the same way."""
    images_at_once: int = 1024
    """Most images in progress (decoded, queued or encoded) at once; further requests get 429."""
    bytes_at_once: int = 2**30
    """Most bytes of request bodies in memory at once, each from its arrival until its response."""
    rows_at_once: int = 10_000
    """Most rows in progress (waiting or being written to collections) at once."""
    reads_at_once: int = 256
    """Most reads of collections in progress (waiting or running) at once."""
    threads: int = 0
    """Processes for decoding, and as many for the encoder; 0 for one per core."""


DEFAULT_LIMITS = Limits()


class Gate:
    """Admission counter: raises Busy when more than `most` would be in flight."""

    def __init__(self, most: int, unit: str = "images"):
        """unit  what is counted, for the error message"""
        self._most, self._unit = most, unit
        self.in_flight = 0

    def check(self, count: int = 1) -> None:
        """Raises Busy when `count` more would exceed the limit."""
        if self.in_flight + count > self._most:
            raise busy(f"{self._most} {self._unit}")

    @contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Counts `count` as in flight inside the context. Raises Busy as `check`."""
        self.check(count)
        self.in_flight += count
        try:
            yield
        finally:
            self.in_flight -= count


def busy(limit: str) -> "Busy":
    message = f"the service is busy with {limit}, the most it takes at once; try again soon"
    from serving.errors import Busy  # here, since training's benchmarks count cores where there is no FastAPI

    return Busy(message, headers={"Retry-After": str(RETRY_AFTER_S)})


def is_on(environment: Mapping[str, str], name: str, default: bool = False) -> bool:
    """Returns whether a switch among the environment variables is on. Raises SettingProblem for other values."""
    value = environment.get(name, "").strip().lower()
    if value in YES:
        return True
    if value not in NO:
        raise SettingProblem(f"{name} is 1 or 0, not {environment[name]!r}")
    return default if value == "" else False


def refuse_misspelt(environment: Mapping[str, str] = os.environ) -> None:
    """Raises SettingProblem for a variable that is called almost like one of SETTINGS. Others are not ours: for a
    service that is called twinview, Kubernetes sets some that begin in the same way."""
    for name in sorted(name.removeprefix(PREFIX) for name in environment if name.startswith(PREFIX)):
        near = difflib.get_close_matches(name, SETTINGS, 1, NEAR)
        if near and name not in SETTINGS:
            raise SettingProblem(f"there is no setting {PREFIX}{name}; did you mean {PREFIX}{near[0]}?")


def keeps_originals(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the files of uploaded pictures are kept, as TWINVIEW_KEEP_ORIGINALS says. Raises SettingProblem."""
    return is_on(environment, "TWINVIEW_KEEP_ORIGINALS", default=True)


def gpu_required(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether TWINVIEW_GPU says that encoders never run on the CPU. Raises SettingProblem for another value."""
    if (value := environment.get("TWINVIEW_GPU", "")) not in ("", "auto", "required"):
        raise SettingProblem(f"TWINVIEW_GPU is auto or required, not {value!r}")
    return value == "required"


def decode_s(environment: Mapping[str, str] = os.environ) -> float:
    """Seconds of processor time for decoding a file, besides those for its pixels. Raises SettingProblem for a value of
    TWINVIEW_DECODE_S that is not a number from 0.1 to 600."""
    given = environment.get("TWINVIEW_DECODE_S") or str(DECODE_S)
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 600:
        raise SettingProblem(f"TWINVIEW_DECODE_S is a number of seconds from 0.1 to 600, not {given!r}")
    return seconds


def consistency_s(environment: Mapping[str, str] = os.environ) -> float:
    """Seconds for which a process may not see what others have written to a collection in an object store. Raises
    SettingProblem for a value of TWINVIEW_CONSISTENCY_S that is not a number from 0 to 3600."""
    given = environment.get("TWINVIEW_CONSISTENCY_S") or "1"
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 3600:
        raise SettingProblem(f"TWINVIEW_CONSISTENCY_S is a number of seconds from 0 to 3600, not {given!r}")
    return seconds


def cores() -> int:
    """Returns the number of processor cores this process may use, by its CPU affinity and the container's quota."""
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        usable = min(usable, -(-int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or no quota ("max")
        pass
    return max(1, usable)


def lower_priority() -> None:
    """Run this process at low priority from now on, so that others get the cores first."""
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, 0, 10)
