"""Settings of the whole suite, and the one way to wait for an event."""

import atexit
import gc
import signal
import time
from collections.abc import Callable

import pytest

PATIENCE_S = 60.0

# A shell makes its background jobs ignore Ctrl-C, and every process started by these tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


# What the test modules import is never freed. While they are imported no garbage is collected, and later collections
# skip them: otherwise collections take a third of the time.
gc.disable()
atexit.register(gc.unfreeze)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """wait_until(condition, message, seconds=60) returns once condition() is true; fails with the message otherwise.

    The deadline is no measure of speed: it only ends a test whose event never comes.
    """

    def wait(condition: Callable[[], object], message: str, seconds: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"after {seconds:g} s: {message}")
            time.sleep(0.01)

    return wait
