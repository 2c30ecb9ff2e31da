import asyncio

import numpy as np
import pytest

from export.artifact import TooManyPixels, UnreadableImage
from serving.errors import NotReady, Undecodable
from serving.inference.batcher import Batcher
from serving.inference.decode import Upload
from serving.inference.lane import BatchResult, LaneLost, Problem, run_batch


class Recorder:
    """Fake lane: a vector is its image's mean. Waits for `release` before each batch."""

    def __init__(self, released: bool = False):
        self.sizes, self.release, self.busy = [], asyncio.Event(), False
        if released:
            self.release.set()

    async def __call__(self, parts) -> BatchResult:
        assert not self.busy
        self.busy = True
        self.sizes.append(sum(map(len, parts)))
        await self.release.wait()
        await asyncio.sleep(0)
        self.busy = False
        if any(isinstance(part, np.ndarray) and (part == 255).all(axis=(1, 2, 3)).any() for part in parts):
            raise RuntimeError("white")
        return run_batch(parts, lambda pixels: pixels.mean(axis=(1, 2, 3), dtype=np.float32)[:, None], read)

    def close(self) -> None:
        pass


def read(data: bytes) -> np.ndarray:
    if data == b"":
        raise UnreadableImage("is empty")
    if data == b"large":
        raise TooManyPixels("has too many pixels")
    return images(data[0])[0]


def images(*values: int) -> np.ndarray:
    return np.stack([np.full((2, 2, 3), value, np.uint8) for value in values])


def files(*values: int | None) -> list[Upload]:
    return [Upload(f"images[{i}]", "", b"" if v is None else bytes([v])) for i, v in enumerate(values)]


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_waiting_requests_share_batches_and_get_their_own_rows():
    lane, runs = Recorder(), []
    batch = Batcher([lane], lambda *facts: runs.append(facts), max_batch=8)

    async def ask():
        first = asyncio.create_task(batch(images(0)))
        await settle()  # its batch runs, and the others wait
        others = [asyncio.create_task(batch(images(i, i + 100))) for i in range(1, 8)]
        await settle()
        assert batch.waiting == 14
        lane.release.set()
        return await asyncio.gather(first, *others)

    answers = asyncio.run(ask())
    assert lane.sizes == [1, 8, 6]
    assert [images for images, seconds in runs if seconds > 0] == [1, 8, 6]
    assert batch.waiting == 0
    assert [answer.vectors.ravel().tolist() for answer in answers] == [[0], *([i, i + 100] for i in range(1, 8))]


def test_a_request_larger_than_a_batch_gets_all_its_rows():
    lane = Recorder(released=True)
    answer = asyncio.run(Batcher([lane], max_batch=4)(images(*range(11))))
    assert answer.vectors.ravel().tolist() == list(range(11))
    assert lane.sizes == [4, 4, 3]


def test_a_failed_batch_fails_its_requests_and_the_next_one_runs():
    batch = Batcher([Recorder(released=True)], max_batch=1)

    async def ask():
        return await asyncio.gather(batch(images(255)), batch(images(7)), return_exceptions=True)

    failed, answered = asyncio.run(ask())
    assert str(failed) == "white"
    assert answered.vectors.tolist() == [[7]]


class Falling(Recorder):
    """Is lost with each batch that holds an image of this value, until `well`."""

    def __init__(self, value: int, well: bool = False):
        super().__init__(released=True)
        self.value, self.well, self.restarts = value, well, 0

    async def __call__(self, parts) -> BatchResult:
        if any((np.asarray(part) == self.value).any() for part in parts if isinstance(part, np.ndarray)):
            raise LaneLost("it fell")
        return await super().__call__(parts)

    async def restart(self) -> None:
        self.restarts += 1
        if not self.well:
            raise RuntimeError("no memory")


def test_the_batch_of_a_lost_lane_goes_to_another_lane_while_it_restarts():
    lanes = [Recorder(released=True), Falling(7)]  # the last one is taken first

    async def ask():
        batch = Batcher(lanes, max_batch=1)
        answers = [(await batch(images(7))).vectors.item() for _ in range(3)]
        batch.close()
        return answers, await asyncio.gather(*batch._running, return_exceptions=True)

    assert asyncio.run(ask())[0] == [7, 7, 7]
    assert lanes[1].restarts >= 1


def test_a_batch_that_is_lost_twice_is_answered_and_the_next_one_runs():
    lane = Falling(7, well=True)

    async def ask():
        batch = Batcher([lane], max_batch=1)
        return await asyncio.gather(batch(images(7)), batch(images(8)), return_exceptions=True)

    lost, answered = asyncio.run(ask())
    assert isinstance(lost, NotReady) and lost.detail == "the encoder has failed: it fell"
    assert answered.vectors.tolist() == [[8]] and lane.restarts == 2


def test_while_no_lane_can_be_restarted_requests_are_answered_with_the_reason(monkeypatch):
    monkeypatch.setattr("serving.inference.batcher.RESTART_S", 0)
    lane = Falling(7)

    async def ask():
        batch = Batcher([lane], max_batch=1)
        for value in (7, 8):
            with pytest.raises(NotReady, match="no memory"):
                await batch(images(value))
        lane.well = True
        after = await batch(images(9))
        return after.vectors.item()

    assert asyncio.run(ask()) == 9


def test_an_answer_that_cannot_be_delivered_fails_its_request_and_the_queue_goes_on():
    class Wrong(Recorder):
        async def __call__(self, parts) -> BatchResult:
            result = await super().__call__(parts)
            return (
                BatchResult([Problem(0, UnreadableImage("is wrong"))], [0.0], 0.0)
                if parts[0][0, 0, 0, 0] == 7
                else result
            )

    async def ask():
        batch = Batcher([Wrong(released=True)], max_batch=1)
        return await asyncio.gather(batch(images(7)), batch(images(8)), return_exceptions=True)

    failed, answered = asyncio.run(ask())
    assert isinstance(failed, Exception)
    assert answered.vectors.tolist() == [[8]]


def test_a_small_request_does_not_wait_for_the_rest_of_a_large_one():
    lane = Recorder()

    async def ask():
        batch = Batcher([lane], max_batch=8)
        large = asyncio.create_task(batch(images(*range(80))))
        await settle()
        small = asyncio.create_task(batch(images(1)))
        await settle()
        lane.release.set()
        await asyncio.gather(small, large)

    asyncio.run(ask())
    assert 1 in lane.sizes[:3], lane.sizes


@pytest.mark.parametrize("size", [2, 20])
def test_a_cancelled_request_is_not_encoded(size):
    lane = Recorder()
    batch = Batcher([lane], max_batch=8)

    async def ask():
        first = asyncio.create_task(batch(images(0)))
        await settle()
        gone, stays = asyncio.create_task(batch(images(*range(size)))), asyncio.create_task(batch(images(3)))
        await settle()
        gone.cancel()
        await settle()
        lane.release.set()
        await asyncio.gather(first, stays)

    asyncio.run(ask())
    assert lane.sizes == [1, 1]


def test_as_many_batches_run_at_once_as_there_are_lanes():
    lanes = [Recorder(), Recorder()]

    async def ask():
        batch = Batcher(lanes, max_batch=1)
        asked = [asyncio.create_task(batch(images(i))) for i in range(8)]
        await settle()
        assert [lane.busy for lane in lanes] == [True, True]
        assert batch.waiting == 6
        for lane in lanes:
            lane.release.set()
        return [answer.vectors.item() for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == list(range(8))


def test_a_single_request_is_split_over_the_lanes():
    lanes = [Recorder(released=True), Recorder(released=True)]
    answer = asyncio.run(Batcher(lanes)(images(*range(30))))
    assert [lane.sizes for lane in lanes] == [[15], [15]]
    assert answer.vectors.ravel().tolist() == list(range(30))


def test_a_request_cancelled_during_its_batch_does_not_affect_the_others():
    go_on, sizes = [asyncio.Event(), asyncio.Event()], []

    async def lane(parts) -> BatchResult:
        sizes.append(sum(map(len, parts)))
        await go_on[len(sizes) - 1].wait()
        return run_batch(parts, lambda pixels: pixels.mean(axis=(1, 2, 3), dtype=np.float32)[:, None])

    async def ask():
        batch = Batcher([lane])
        first = asyncio.create_task(batch(images(0)))
        await settle()
        gone, stays = asyncio.create_task(batch(images(1))), asyncio.create_task(batch(images(2)))
        await settle()
        go_on[0].set()
        await first
        await settle()
        gone.cancel()
        await settle()
        go_on[1].set()
        return (await stays).vectors.tolist()

    assert asyncio.run(ask()) == [[2]]
    assert sizes == [1, 2]


def test_an_undecodable_file_fails_only_its_own_request_of_the_batch():
    lane, encoded = Recorder(), []
    batch = Batcher([lane], lambda images, seconds: encoded.append(images))

    async def ask():
        first = asyncio.create_task(batch(files(0)))
        await settle()
        others = [batch(files(1)), batch(files(2, None)), batch(images(3)), batch(files(None, 4)), batch(files(5, 6))]
        others = [asyncio.create_task(one) for one in others]
        await settle()
        lane.release.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    answers = asyncio.run(ask())
    assert encoded == [1, 4]
    problems = [answer.param for answer in answers if isinstance(answer, Undecodable)]
    assert problems == ["images[1]", "images[0]"]
    rows = [answer.vectors.ravel().tolist() for answer in answers if not isinstance(answer, Undecodable)]
    assert rows == [[0], [1], [3], [5, 6]]


def test_the_first_undecodable_file_of_a_request_in_several_batches_is_named():
    batch = Batcher([Recorder(released=True)], max_batch=2)
    with pytest.raises(Undecodable, match=r"images\[5\]"):
        asyncio.run(batch(files(*(None if i in (5, 7) else i for i in range(9)))))


def test_a_file_that_is_too_large_for_a_lane_raises_too_many_pixels():
    batch = Batcher([Recorder(released=True)])
    with pytest.raises(TooManyPixels):
        asyncio.run(batch([Upload("images[0]", "", b"large")]))


def test_a_lone_request_does_not_wait_for_others(monkeypatch):
    monkeypatch.setattr(asyncio.BaseEventLoop, "call_at", lambda *_, **__: pytest.fail("a timer is set"))
    batch = Batcher([Recorder(released=True)])
    assert asyncio.run(batch(images(1))).vectors.tolist() == [[1]]


@pytest.mark.parametrize("size", [1, 3])
def test_the_time_in_the_queue_and_in_the_model_are_separate(size, monkeypatch):
    """With a clock that only the encoder advances, by a second per batch."""
    now, go_on = 0.0, asyncio.Event()
    monkeypatch.setattr("serving.inference.batcher.perf_counter", lambda: now)

    async def lane(parts):
        nonlocal now
        await go_on.wait()
        now += 1
        return BatchResult(
            [part.mean(axis=(1, 2, 3), dtype=np.float32)[:, None] for part in parts], [0.0] * len(parts), 1.0
        )

    batch = Batcher([lane], max_batch=1)

    async def ask():
        first = asyncio.create_task(batch(images(0)))
        behind = asyncio.create_task(batch(images(*range(size))))
        await settle()
        go_on.set()
        return await first, await behind, await batch(images(*range(size)))

    times = [(answer.queue_s, answer.model_s) for answer in asyncio.run(ask())]
    assert times == [(0, 1), (1, size), (0, size)]


def test_the_time_in_decoding_is_separate_from_the_queue_and_the_model(monkeypatch):
    """With a clock that only the lane advances: a batch takes 5 s, of which 2 s are the queue's."""
    now = 0.0
    monkeypatch.setattr("serving.inference.batcher.perf_counter", lambda: now)

    async def lane(parts):
        nonlocal now
        now += 5
        return BatchResult([np.zeros((1, 1), np.float32)], [2.0], 1.0)

    answer = asyncio.run(Batcher([lane])(files(1)))
    assert (answer.decode_s, answer.queue_s, answer.model_s) == (2, 2, 1)
