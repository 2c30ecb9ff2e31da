import asyncio
import json
import os
import shutil
import threading
import time

import numpy as np
import pytest

from export.artifact import BundleError
from serving.encoder import Batcher, Encoder, NoEncoder, _providers, find_bundle


def test_the_newest_export_is_served_unless_another_is_chosen(make_bundle, tmp_path):
    old, new = (make_bundle(tmp_path / "runs" / name / "encoder", scale) for name, scale in (("b", 1), ("a", 2)))
    os.utime(old.folder / "model_card.json", (1, 1))
    assert find_bundle(None, tmp_path / "runs").card.id == new.card.id
    assert find_bundle(str(old.folder), tmp_path / "runs").card.id == old.card.id


def test_the_model_store_is_asked_for_a_tag_and_when_there_is_no_export(bundle, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("serving.encoder._in_store", lambda tag: asked.append(tag) or bundle.folder)
    assert find_bundle("cats:v2", tmp_path).card.id == bundle.card.id
    assert find_bundle(None, tmp_path).card.id == bundle.card.id
    assert asked == ["cats:v2", "twinview-encoder"]


def test_without_any_encoder_the_message_says_how_to_make_one(tmp_path, no_store):
    with pytest.raises(NoEncoder, match=r"training/pretrain.py.*export/to_onnx.py"):
        find_bundle(None, tmp_path)
    with pytest.raises(NoEncoder, match=r"cats:v2 is neither"):
        find_bundle("cats:v2", tmp_path)


def test_a_graph_that_does_not_run_or_gives_another_dimension_is_refused(bundle, tmp_path):
    card = bundle.card.to_dict()
    for change, message in (({"dimension": 47}, "48"), ({"preprocessing": {"size_px": 16}}, "does not run")):
        folder = tmp_path / message
        shutil.copytree(bundle.folder, folder)
        (folder / "model_card.json").write_text(json.dumps({**card, **change}))
        with pytest.raises(BundleError, match=message):
            Encoder(find_bundle(str(folder)))


def test_a_row_of_a_batch_equals_the_row_alone(bundle):
    encode = Encoder(bundle)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), np.uint8)
    alone = np.concatenate([encode(pixels[i : i + 1]) for i in range(32)])
    np.testing.assert_allclose(encode(pixels), alone, atol=1e-6)


def test_a_gpu_is_used_where_the_runtime_and_the_driver_both_have_one(monkeypatch):
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("serving.encoder.ort.preload_dlls", lambda: None, raising=False)
    for available, device, expected in ((both, True, both), (both, False, both[1:]), (both[1:], True, both[1:])):
        monkeypatch.setattr("serving.encoder.ort.get_available_providers", lambda available=available: available)
        monkeypatch.setattr("serving.encoder._cuda_device", lambda device=device: device)
        assert [name if isinstance(name, str) else name[0] for name in _providers()] == expected


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


def images(*values: int) -> np.ndarray:
    return np.stack([np.full((2, 2, 3), value, np.uint8) for value in values])


def test_requests_that_wait_are_joined_into_batches_and_get_their_own_rows():
    encode = Recorder()
    batch = Batcher(encode, max_batch=8)

    async def ask():
        first = asyncio.create_task(batch(images(0)))
        await asyncio.sleep(0.05)  # its batch runs; the others gather
        others = [asyncio.create_task(batch(images(i, i + 100))) for i in range(1, 8)]
        await asyncio.sleep(0.05)
        encode.release.set()
        return await asyncio.gather(first, *others)

    answers = asyncio.run(ask())
    assert encode.sizes == [1, 8, 6]
    assert len(encode.threads) == 1
    assert [answer.ravel().tolist() for answer in answers] == [[0], *([i, i + 100] for i in range(1, 8))]


def test_a_request_larger_than_a_batch_comes_back_whole():
    encode = Recorder()
    encode.release.set()
    answer = asyncio.run(Batcher(encode, max_batch=4)(images(*range(11))))
    assert answer.ravel().tolist() == list(range(11))
    assert encode.sizes == [4, 4, 3]


def test_a_batch_that_fails_is_told_to_its_requests_and_the_next_one_runs():
    encode = Recorder()
    encode.release.set()
    batch = Batcher(encode, max_batch=1)

    async def ask():
        return await asyncio.gather(batch(images(255)), batch(images(7)), return_exceptions=True)

    failed, answered = asyncio.run(ask())
    assert str(failed) == "white"
    assert answered.tolist() == [[7]]


def test_a_request_that_has_gone_away_is_not_encoded():
    encode = Recorder()
    batch = Batcher(encode, max_batch=8)

    async def ask():
        first = asyncio.create_task(batch(images(0)))
        await asyncio.sleep(0.05)
        gone, stays = asyncio.create_task(batch(images(1, 2))), asyncio.create_task(batch(images(3)))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        encode.release.set()
        await asyncio.gather(first, stays)

    asyncio.run(ask())
    assert encode.sizes == [1, 1]


def test_a_lone_request_does_not_wait_for_company():
    encode = Recorder()
    encode.release.set()
    batch = Batcher(encode)
    asyncio.run(batch(images(1)))
    started = time.perf_counter()
    asyncio.run(batch(images(1)))
    assert time.perf_counter() - started < 0.5
