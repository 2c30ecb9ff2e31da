import asyncio
import os
import signal
import socket

import numpy as np
import pytest

from export.artifact import BundleError, TooManyPixels, read_pixels
from serving.errors import NotReady
from serving.inference.batcher import Batcher
from serving.inference.decode import Upload
from serving.inference.device import open_lanes
from serving.inference.health import Health
from serving.inference.lane import BatchResult, LaneLost, PrivateCopy, Problem, ProcessLane
from tests.conftest import PATIENCE_S

PIXELS = 2**20


@pytest.fixture
def lane(bundle):
    return start(bundle)


def start(bundle, max_work: int = PIXELS) -> ProcessLane:
    one = ProcessLane(bundle.card, PrivateCopy(bundle), 1, max_work)
    one.wait()
    return one


def ask(lane: ProcessLane, *batches) -> list[BatchResult]:
    """Run the batches one after the other, then close the lane."""

    async def asked():
        try:
            return [await lane(parts) for parts in batches]
        finally:
            lane.close()
            await asyncio.sleep(0)

    return asyncio.run(asked())


@pytest.fixture
def expected(bundle, picture, means):
    def rows(*seeds: int) -> np.ndarray:
        return means(np.stack([read_pixels(picture(seed), bundle.card.preprocessing) for seed in seeds]))

    return rows


@pytest.mark.slow
def test_a_batch_may_have_files_and_pixels(lane, bundle, picture, expected):
    pixels = np.stack([read_pixels(picture(i), bundle.card.preprocessing) for i in (3, 4, 5)])
    parts = [[picture(1), picture(2)], pixels, [b"no picture"], [picture(6), b""], [picture(7)]]
    [ran] = ask(lane, parts)
    np.testing.assert_allclose(ran.parts[0], expected(1, 2), atol=1e-5)
    np.testing.assert_allclose(ran.parts[1], expected(3, 4, 5), atol=1e-5)
    np.testing.assert_allclose(ran.parts[4], expected(7), atol=1e-5)
    assert [(part.image, str(part.error)) for part in ran.parts[2:4]] == [
        (0, "is not an image in a supported format"),
        (1, "is empty"),
    ]
    assert ran.decode_s[0] > 0 and ran.decode_s[1] == 0 and ran.model_s > 0


@pytest.mark.slow
def test_a_batch_of_undecodable_files_does_not_run_the_encoder(lane):
    [ran] = ask(lane, [[b"no picture"], [b""]])
    assert all(isinstance(part, Problem) for part in ran.parts) and ran.model_s == 0


@pytest.mark.slow
def test_a_file_of_too_many_pixels_has_its_own_error(bundle, picture):
    [ran] = ask(start(bundle, 40 * 30), [[picture(1, (40, 30)), picture(1, (41, 30))]])
    assert ran.parts[0].image == 1 and isinstance(ran.parts[0].error, TooManyPixels)


async def stopped_with(lane: ProcessLane, call) -> asyncio.Task:
    """Stop the process, and start the call, whose batch it has got when this returns."""
    await lane([np.zeros((1, 32, 32, 3), np.uint8)])
    os.kill(lane.process.pid, signal.SIGSTOP)
    task = asyncio.create_task(call())
    while lane._connection._answer.done():
        await asyncio.sleep(0)
    return task


@pytest.fixture
def pixels(bundle, picture):
    return lambda *seeds: np.stack([read_pixels(picture(seed), bundle.card.preprocessing) for seed in seeds])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_the_batch_of_a_lost_lane_is_run_again_and_the_lane_is_restarted(lane, pixels, expected, how, monkeypatch):
    if how == "stopped":
        monkeypatch.setattr("serving.inference.lane.LOOK_S", 0.05)

    async def lose():
        batch = Batcher([lane])
        asked = await stopped_with(lane, lambda: batch(pixels(2, 3)))
        if how == "killed":
            os.kill(lane.process.pid, signal.SIGKILL)
        answers = await asked, await batch(pixels(4))
        batch.close()
        return answers

    ran, after = asyncio.run(lose())
    np.testing.assert_allclose(ran.vectors, expected(2, 3), atol=1e-5)
    np.testing.assert_allclose(after.vectors, expected(4), atol=1e-5)


@pytest.mark.slow
def test_files_of_a_lost_lane_are_left_to_the_caller_because_one_of_them_may_be_the_cause(lane, picture, expected):
    async def lose():
        batch = Batcher([lane])
        asked = await stopped_with(lane, lambda: batch([Upload("images[0]", "", picture(1))]))
        os.kill(lane.process.pid, signal.SIGKILL)
        with pytest.raises(LaneLost, match=r"has ended \(ended by SIGKILL"):
            await asked
        after = await batch([Upload("images[0]", "", picture(2))])
        batch.close()
        return after

    np.testing.assert_allclose(asyncio.run(lose()).vectors, expected(2), atol=1e-5)


@pytest.mark.slow
def test_a_lane_that_is_lost_again_and_again_answers_and_the_queue_goes_on(lane, pixels, expected, monkeypatch):
    monkeypatch.setattr("serving.inference.lane.LOOK_S", 0.05)

    async def lose():
        batch, restart = Batcher([lane]), lane.restart

        async def restart_and_stop():
            await restart()
            os.kill(lane.process.pid, signal.SIGSTOP)

        asked = await stopped_with(lane, lambda: batch(pixels(1)))
        lane.restart = restart_and_stop
        os.kill(lane.process.pid, signal.SIGKILL)
        with pytest.raises(NotReady, match=r"encoder has failed: .* has not answered: it has used no processor time"):
            await asked
        lane.restart = restart
        after = await batch(pixels(4))
        batch.close()
        return after

    np.testing.assert_allclose(asyncio.run(lose()).vectors, expected(4), atol=1e-5)


@pytest.mark.slow
def test_a_process_ends_with_the_service(lane):
    lane.process.socket.shutdown(socket.SHUT_RDWR)  # as the system does when a process ends
    assert lane.process._process.wait(PATIENCE_S) == 0
    lane.close()


@pytest.mark.slow
def test_a_process_ends_when_its_lane_is_garbage_collected(bundle, picture):
    async def forget():
        lane = start(bundle)
        await lane([[picture(1)]])
        process = lane.process._process
        del lane
        return await asyncio.to_thread(process.wait, 60)  # this loop closes the connection meanwhile

    asyncio.run(forget())  # raises TimeoutExpired when the process does not end


@pytest.mark.slow
def test_a_lane_is_restarted_from_its_own_copy_when_another_bundle_has_taken_its_place(
    make_bundle, picture, expected, tmp_path
):
    lane = start(make_bundle(tmp_path / "place"))
    make_bundle(tmp_path / "place", 1 / 128)
    (tmp_path / "place" / "encoder.onnx").write_bytes(b"no graph")

    async def restarted():
        await lane.restart()
        ran = await lane([[picture(1)]])
        lane.close()
        return ran

    np.testing.assert_allclose(asyncio.run(restarted()).parts[0], expected(1), atol=1e-5)


def test_a_graph_that_is_replaced_while_it_is_loaded_is_refused(make_bundle, tmp_path):
    first = make_bundle(tmp_path / "place")
    make_bundle(tmp_path / "place", 1 / 128)
    with pytest.raises(BundleError, match="has changed while it was loaded"):
        PrivateCopy(first)


@pytest.mark.slow
def test_on_the_cpu_each_core_has_a_lane(bundle, picture, expected):
    lanes = open_lanes(bundle, 2, PIXELS)
    assert [(lane.provider, lane.gpu_problem) for lane in lanes] == [("CPUExecutionProvider", None)] * 2

    assert len({lane.process.pid for lane in lanes}) == 2
    for i, lane in enumerate(lanes):
        [ran] = ask(lane, [[picture(i)]])
        np.testing.assert_allclose(ran.parts[0], expected(i), atol=1e-5)


@pytest.mark.slow
def test_an_encoder_that_does_not_answer_is_not_ready_until_it_does(lane, monkeypatch):
    monkeypatch.setattr("serving.inference.health.EVERY_S", 0)
    monkeypatch.setattr("serving.inference.health.LIMIT_S", 0.2)
    monkeypatch.setattr("serving.inference.health.PATIENCE_S", 0.3)

    async def hang():
        batch = Batcher([lane])
        health = Health(batch, 32)
        await health.check()
        os.kill(lane.process.pid, signal.SIGSTOP)
        with pytest.raises(NotReady, match=r"has not answered for 0.2 s"):
            await health.check()
        os.kill(lane.process.pid, signal.SIGCONT)
        await health._probe
        await health.check()
        os.kill(lane.process.pid, signal.SIGKILL)
        monkeypatch.setattr(lane, "restart", fail)
        with pytest.raises(NotReady, match="no memory"):
            await health.check()
        batch.close()

    async def fail():
        raise OSError("no memory")

    asyncio.run(hang())
