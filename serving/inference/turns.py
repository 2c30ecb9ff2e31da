"""The order in which the parts of several requests are served.

Start-time fair queueing (Goyal, Vin, Cheng 1996, SIGCOMM): each request gets the same share, however much it wants. So
a small request waits for no more than a part of each of the others, not for the rest of a large one.
"""

import heapq
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import count
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Parts of requests, the next one first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._order = count()  # parts of the same rank stay in the order of their arrival
        self._now = 0.0

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[T]:
        """The waiting parts, in no order."""
        return (part for _, _, part in self._heap)

    def put(self, parts: Iterable[tuple[T, float]]) -> None:
        """Add the parts of one request, each with its size."""
        rank = self._now
        for part, size in parts:
            rank += size
            heapq.heappush(self._heap, (rank, next(self._order), part))

    def first(self) -> T:
        return self._heap[0][2]

    def pop(self) -> T:
        self._now, _, part = heapq.heappop(self._heap)
        return part


class FairThreads(Generic[T]):
    """Threads that call functions of several requests in turns. Each thread has an object for its calls, such as a
    process."""

    def __init__(self, name: str, owned: Sequence[T]):
        """owned  the object of each thread"""
        self._waiting: FairQueue[tuple[Future, Callable[[T], Any]]] = FairQueue()
        self._changed = threading.Condition()
        self._closed = False
        for one in owned:
            threading.Thread(target=self._run, args=(one,), name=name, daemon=True).start()

    def submit(self, calls: Sequence[Callable[[T], Any]]) -> list[Future]:
        """Queue the calls of one request. A cancelled one that no thread has begun is dropped."""
        futures: list[Future] = [Future() for _ in calls]
        with self._changed:
            self._waiting.put(((future, call), 1) for future, call in zip(futures, calls, strict=True))
            self._changed.notify(len(calls))
        return futures

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for future, _ in self._waiting:
                future.cancel()
            self._changed.notify_all()

    def _run(self, owned: T) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._waiting))
                if self._closed:
                    return
                future, call = self._waiting.pop()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call(owned)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, call  # so that nothing is kept in memory while the thread waits
