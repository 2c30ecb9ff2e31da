"""BentoML's supervisor, the process that `bentoml serve` starts and that starts the workers, made safe.

Its control port, that of Circus, asks for no key: whoever reaches it runs commands as the service's user. BentoML opens
it on TCP, where every user of the machine reaches it; here it is a socket in a folder that only this user can enter.
Metrics of the workers are files in that folder too: BentoML's own folder is shared by all services of a BENTOML_HOME,
and each deletes the others' files. Workers give freed memory back to the system. A worker ends when its supervisor has
ended, instead of holding the port for ever.
"""

import atexit
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import bentoml._internal.utils.circus as circus
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.context import server_context
from circus.sockets import CircusSockets

LOOK_S = 1.0  # between two looks at the supervisor
LONGEST_FOLDER = 80  # characters; the path of a socket has at most 107


def is_worker() -> bool:
    """Whether this process is a worker that a supervisor has started."""
    return server_context.worker_index is not None


@lru_cache  # once is enough
def prepare() -> None:
    """Call it in the process that may become the supervisor, before it does."""
    initialise = circus.Arbiter.__init__

    def __init__(self: circus.Arbiter, *arguments: Any, **options: Any) -> None:
        sockets = {name: f"ipc://{private_folder()}/{name}" for name in ("endpoint", "pubsub_endpoint")}
        initialise(self, *arguments, **options | sockets)

    circus.Arbiter.__init__ = __init__
    CircusSockets.bind_and_listen_all = _listen  # pyrefly: ignore[bad-assignment]  # has a further default
    # Workers give blocks of this size back to the system when they are freed. By default the C library raises the limit
    # after the first large block, and a gigabyte of uploads leaves 0.7 GB with the worker.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**17))
    metrics = private_folder() / "metrics"
    metrics.mkdir()
    BentoMLContainer.prometheus_multiproc_dir.set(str(metrics))


def _listen(
    sockets: CircusSockets, listen: Callable[[CircusSockets], None] = CircusSockets.bind_and_listen_all
) -> None:
    """Circus would end with a traceback."""
    try:
        listen(sockets)
    except OSError as error:
        places = ", ".join(f"{one.host}:{one.port}" for one in sockets.values() if one.port)
        reason = os.strerror(error.errno) if error.errno else str(error)
        sys.exit(f"error: {places} cannot be used ({reason}); choose another port with --port")


@lru_cache
def private_folder() -> Path:
    """A folder that only this user can enter, until this process ends."""
    parent = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="twinview-", dir=parent if len(parent) < LONGEST_FOLDER else "/tmp")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def end_with_supervisor() -> None:
    """Stop this worker as soon as its supervisor has ended, however that happened."""
    supervisor = os.getppid()

    def watch() -> None:
        while os.getppid() == supervisor:
            time.sleep(LOOK_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="supervisor", daemon=True).start()
