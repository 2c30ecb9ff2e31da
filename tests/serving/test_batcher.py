import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from serving.batcher import Batcher
from serving.decode import File
from serving.errors import Undecodable


class Recorder:
    """Stands in for an encoder: a row's mean. Waits for `release` before each batch."""

    def __init__(self):
        self.sizes, self.threads, self.release = [], set(), threading.Event()

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        self.sizes.append(len(pixels))
        self.threads.add(threading.get_ident())
        assert self.release.wait(10)
        if (pixels == 255).all(axis=(1, 2, 3)).any():
            raise RuntimeError("white")
        return pixels.mean(axis=(1, 2, 3), dtype=np.float32)[:, None]


@pytest.fixture
def thread():
    with ThreadPoolExecutor(1) as one:
        yield one


def images(*values: int) -> np.ndarray:
    return np.stack([np.full((2, 2, 3), value, np.uint8) for value in values])


def test_requests_that_wait_are_joined_into_batches_and_get_their_own_rows(thread):
    encode = Recorder()
    batch = Batcher(encode, thread, max_batch=8)

    async def ask():
        first = asyncio.create_task(batch(images(0)))
        await asyncio.sleep(0.05)  # its batch runs; the others gather
        others = [asyncio.create_task(batch(images(i, i + 100))) for i in range(1, 8)]
        await asyncio.sleep(0.05)
        assert batch.waiting == 14
        encode.release.set()
        return await asyncio.gather(first, *others)

    answers = asyncio.run(ask())
    assert encode.sizes == [1, 8, 6]
    assert len(encode.threads) == 1
    assert batch.waiting == 0
    assert [answer.vectors.ravel().tolist() for answer in answers] == [[0], *([i, i + 100] for i in range(1, 8))]


def test_a_request_larger_than_a_batch_comes_back_whole(thread):
    encode = Recorder()
    encode.release.set()
    answer = asyncio.run(Batcher(encode, thread, max_batch=4)(images(*range(11))))
    assert answer.vectors.ravel().tolist() == list(range(11))
    assert encode.sizes == [4, 4, 3]


def test_a_batch_that_fails_is_told_to_its_requests_and_the_next_one_runs(thread):
    encode = Recorder()
    encode.release.set()
    batch = Batcher(encode, thread, max_batch=1)

    async def ask():
        return await asyncio.gather(batch(images(255)), batch(images(7)), return_exceptions=True)

    failed, answered = asyncio.run(ask())
    assert str(failed) == "white"
    assert answered.vectors.tolist() == [[7]]


@pytest.mark.parametrize("size", [2, 20])
def test_a_request_that_has_gone_away_is_not_encoded(thread, size):
    encode = Recorder()
    batch = Batcher(encode, thread, max_batch=8)

    async def ask():
        first = asyncio.create_task(batch(images(0)))
        await asyncio.sleep(0.05)
        gone, stays = asyncio.create_task(batch(images(*range(size)))), asyncio.create_task(batch(images(3)))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        encode.release.set()
        await asyncio.gather(first, stays)

    asyncio.run(ask())
    assert encode.sizes == [1, 1]


def test_as_many_batches_run_at_once_as_there_are_lanes():
    together = threading.Barrier(2, timeout=10)

    def encode(pixels: np.ndarray) -> np.ndarray:
        together.wait()  # for ever alone
        return pixels.mean(axis=(1, 2, 3), dtype=np.float32)[:, None]

    async def ask():
        batch = Batcher(encode, threads, lanes=2, max_batch=1)
        answers = await asyncio.gather(*(batch(images(i)) for i in range(8)))
        assert batch.waiting == 0
        return [answer.vectors.item() for answer in answers]

    with ThreadPoolExecutor(4) as threads:
        assert asyncio.run(ask()) == list(range(8))


def test_a_request_alone_is_spread_over_the_lanes():
    encode, go_on = Recorder(), threading.Event()
    encode.release.set()

    async def ask():
        batch = Batcher(encode, threads, lanes=2)
        threads.submit(go_on.wait, 10), threads.submit(go_on.wait, 10)
        answer = asyncio.create_task(batch(images(*range(30))))
        await asyncio.sleep(0.05)
        sizes = [len(part.images) for part in batch._waiting]
        go_on.set()
        return sizes, (await answer).vectors.ravel().tolist()

    with ThreadPoolExecutor(2) as threads:
        assert asyncio.run(ask()) == ([15, 15], list(range(30)))


def test_a_request_that_goes_while_its_batch_runs_takes_nothing_from_the_others(thread):
    go_on, sizes = [threading.Event(), threading.Event()], []

    def encode(pixels: np.ndarray) -> np.ndarray:
        sizes.append(len(pixels))
        assert go_on[len(sizes) - 1].wait(10)
        return pixels.mean(axis=(1, 2, 3), dtype=np.float32)[:, None]

    async def ask():
        batch = Batcher(encode, thread)
        first = asyncio.create_task(batch(images(0)))
        await asyncio.sleep(0.05)
        gone, stays = asyncio.create_task(batch(images(1))), asyncio.create_task(batch(images(2)))
        await asyncio.sleep(0.05)
        go_on[0].set()
        await first
        while len(sizes) < 2:
            await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0.01)
        go_on[1].set()
        async with asyncio.timeout(5):
            return (await stays).vectors.tolist()

    assert asyncio.run(ask()) == [[2]]
    assert sizes == [1, 2]


def read(file: File) -> np.ndarray:
    """Stands in for the decoder."""
    if not file.data:
        raise Undecodable(f"{file.field} is empty", param=file.field)
    return images(file.data[0])[0]


def test_a_file_that_cannot_be_read_fails_its_request_and_none_of_the_same_batch(thread):
    encode = Recorder()
    batch = Batcher(encode, thread, read=read)

    def files(*values: int | None) -> list[File]:
        return [File(f"images[{i}]", "", b"" if v is None else bytes([v])) for i, v in enumerate(values)]

    async def ask():
        first = asyncio.create_task(batch(files(0)))
        await asyncio.sleep(0.05)
        others = [batch(files(1)), batch(files(2, None)), batch(images(3)), batch(files(None, 4)), batch(files(5, 6))]
        others = [asyncio.create_task(one) for one in others]
        await asyncio.sleep(0.05)
        encode.release.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    answers = asyncio.run(ask())
    assert encode.sizes == [1, 4]
    problems = [answer.param for answer in answers if isinstance(answer, Undecodable)]
    assert problems == ["images[1]", "images[0]"]
    rows = [answer.vectors.ravel().tolist() for answer in answers if not isinstance(answer, Undecodable)]
    assert rows == [[0], [1], [3], [5, 6]]


def test_of_a_request_in_several_batches_the_first_file_that_cannot_be_read_is_named(thread):
    encode = Recorder()
    encode.release.set()
    batch = Batcher(encode, thread, read=read, max_batch=2)
    files = [File(f"images[{i}]", "", b"" if i in (5, 7) else b"x") for i in range(9)]
    with pytest.raises(Undecodable, match=r"images\[5\]"):
        asyncio.run(batch(files))


def test_a_lone_request_does_not_wait_for_company(thread):
    encode = Recorder()
    encode.release.set()
    batch = Batcher(encode, thread)
    asyncio.run(batch(images(1)))
    started = time.perf_counter()
    asyncio.run(batch(images(1)))
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize("size", [1, 3])
def test_the_time_in_the_queue_and_in_the_model_are_told_apart(thread, size, monkeypatch):
    """By a clock that only the encoder moves: a second a batch."""
    now, go_on = 0.0, threading.Event()
    monkeypatch.setattr("serving.batcher.perf_counter", lambda: now)

    def encode(pixels):
        nonlocal now
        assert go_on.wait(10)
        now += 1
        return pixels.mean(axis=(1, 2, 3), dtype=np.float32)[:, None]

    batch = Batcher(encode, thread, max_batch=1)

    async def ask():
        first = asyncio.create_task(batch(images(0)))
        behind = asyncio.create_task(batch(images(*range(size))))
        await asyncio.sleep(0.05)
        go_on.set()
        return await first, await behind, await batch(images(*range(size)))

    times = [(told.queue_s, told.model_s) for told in asyncio.run(ask())]
    assert times == [(0, 1), (1, size), (0, size)]
