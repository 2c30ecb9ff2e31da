"""Settings of the whole suite, and the one way to wait for an event."""

import atexit
import gc
import logging
import os
import signal
import time
from collections.abc import Callable
from functools import partial

import httpx
import pytest

PATIENCE_S = 300  # for an event that must come: on a busy machine, work at low priority may take minutes

# For torch, here and in the processes that tests start: the tensors are small, and threads that wait for each other on
# a busy machine cost minutes.
os.environ["OMP_NUM_THREADS"] = "1"

# Five seconds, the default, are too few for a server on a busy machine.
for method in ("get", "put", "post", "patch", "delete"):
    setattr(httpx, method, partial(getattr(httpx, method), timeout=PATIENCE_S))

# A shell makes its background jobs ignore Ctrl-C, and every process started by these tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Loggers(dict):
    """pytest goes through all loggers at each test, while a thread may be making one by an import."""

    def values(self) -> list:
        return list(super().values())


logging.root.manager.loggerDict = Loggers(logging.root.manager.loggerDict)

# What the test modules import is never freed. While they are imported no garbage is collected, and later collections
# skip them: otherwise collections take a third of the time.
gc.disable()
atexit.register(gc.unfreeze)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _logging_is_enabled():
    """Commands turn other libraries' warnings off for their whole process, which here is that of all tests."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """wait_until(condition, message) returns once condition() is true; fails with the message otherwise.

    The deadline is no measure of speed: it only ends a test whose event never comes.
    """

    def wait(condition: Callable[[], object], message: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"after {PATIENCE_S:g} s: {message}")
            time.sleep(0.01)

    return wait
