import asyncio
import os
import signal
import socket

import numpy as np
import pytest

from export.artifact import BundleError, TooManyPixels, read_pixels
from serving.inference.lane import BatchResult, Problem, ProcessLane, open_lanes

PIXELS = 2**20


@pytest.fixture
def lane(bundle):
    return start(bundle)


def start(bundle, max_pixels: int = PIXELS) -> ProcessLane:
    one = ProcessLane(bundle, 1, max_pixels)
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


@pytest.mark.slow
def test_a_killed_process_is_restarted_and_its_batch_is_answered(lane, picture, expected):
    async def kill():
        await lane([[picture(1)]])
        os.kill(lane.process.pid, signal.SIGSTOP)
        batch = asyncio.create_task(lane([[picture(2)], [picture(3)]]))
        while lane._connection._answer.done():  # until the batch has been sent, and its answer is awaited
            await asyncio.sleep(0)
        os.kill(lane.process.pid, signal.SIGKILL)
        answers = await batch, await lane([[picture(4)]])
        lane.close()
        await asyncio.sleep(0)
        return answers

    ran, after = asyncio.run(kill())
    np.testing.assert_allclose(np.concatenate(ran.parts), expected(2, 3), atol=1e-5)
    np.testing.assert_allclose(after.parts[0], expected(4), atol=1e-5)


@pytest.mark.slow
def test_an_image_that_crashes_its_decoder_is_refused_and_the_rest_of_its_batch_is_answered(
    bundle, picture, expected, tmp_path, monkeypatch
):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nimport PIL.Image\nopen_ = PIL.Image.open\n"
        "def falling(file, *rest, **more):\n"
        "    if file.getvalue() == b'deadly':\n        os.abort()\n"
        "    return open_(file, *rest, **more)\n"
        "PIL.Image.open = falling\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    [ran] = ask(start(bundle), [[picture(1)], [picture(2), b"deadly"], [picture(3)]])
    np.testing.assert_allclose(np.concatenate([ran.parts[0], ran.parts[2]]), expected(1, 3), atol=1e-5)
    assert str(ran.parts[1].error) == "crashes its decoder" and ran.parts[1].image == 1


@pytest.mark.slow
def test_a_process_ends_with_the_service(lane):
    lane._socket.shutdown(socket.SHUT_RDWR)  # as the system does when a process ends
    assert lane.process.wait(60) == 0
    lane.close()


@pytest.mark.slow
def test_a_process_ends_when_its_lane_is_garbage_collected(bundle, picture):
    async def forget():
        lane = start(bundle)
        await lane([[picture(1)]])
        process = lane.process
        del lane
        return await asyncio.to_thread(process.wait, 60)  # this loop closes the connection meanwhile

    asyncio.run(forget())  # raises TimeoutExpired when the process does not end


@pytest.mark.slow
def test_a_restarted_lane_refuses_a_bundle_that_replaced_its_own(make_bundle, picture, tmp_path):
    first = make_bundle(tmp_path / "place")
    lane = start(first)
    second = make_bundle(tmp_path / "place", 1 / 128)
    lane.process.kill()
    with pytest.raises(BundleError, match=f"now holds {second.card.id} instead of {first.card.id}"):
        ask(lane, [[picture(1)]])


@pytest.mark.slow
def test_on_the_cpu_each_core_has_a_lane(bundle, picture, expected):
    lanes, provider = open_lanes(bundle, 2, PIXELS, None)
    assert provider == "CPUExecutionProvider" and len(lanes) == 2

    assert len({lane.process.pid for lane in lanes}) == 2
    for i, lane in enumerate(lanes):
        [ran] = ask(lane, [[picture(i)]])
        np.testing.assert_allclose(ran.parts[0], expected(i), atol=1e-5)
