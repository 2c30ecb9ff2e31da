import asyncio
import gc
import io
import logging
import os
import shutil
import threading
import time
import weakref
from functools import partial

import numpy as np
import pytest
from PIL import Image

from export.artifact import BundleError, TooManyPixels, read_pixels, record_measured, save_bundle
from serving.collection.index import DEFAULT, Item, WrongEncoder
from serving.engine import Engine
from serving.errors import Busy, NotFound, Undecodable
from serving.inference.decode import SMALL_BYTES, Upload
from serving.limits import DEFAULT_LIMITS, Limits
from serving.metrics import Metrics
from serving.protocol.queries import SearchQuery
from tests.conftest import PATIENCE_S

CPU = "CPUExecutionProvider"


@pytest.fixture
def start(bundle, tmp_path):
    """start(encoders, limits) -> an Engine that is closed after the test."""
    opened = []

    def engine(encoders: str = str(bundle.folder), limits: Limits = DEFAULT_LIMITS) -> Engine:
        opened.append(Engine(encoders, tmp_path / "index", limits, Metrics()))
        return opened[-1]

    yield engine
    for one in opened:
        one.close()


@pytest.fixture
def expected(bundle, picture, means):
    """expected(*seeds, scale=...) -> the embeddings of picture(seed), computed by numpy."""

    def rows(*seeds: int, scale: float = 1 / 255) -> np.ndarray:
        pixels = [read_pixels(picture(seed), bundle.card.preprocessing) for seed in seeds]
        return means(np.stack(pixels), scale)

    return rows


@pytest.fixture
def files(picture):
    def several(*seeds: int) -> list[Upload]:
        return [Upload(f"images[{i}]", "", picture(seed)) for i, seed in enumerate(seeds)]

    return several


class Held:
    """Batches wait in the encoder until `go_on` is set."""

    def __init__(self, engine: Engine):
        self.go_on = threading.Event()
        self.images = 0
        """Number of images whose batch has begun."""
        for lane in engine._encoders.default.batch.lanes:
            lane.encode = partial(self._encode, lane.encode)

    def _encode(self, encode, pixels: np.ndarray) -> np.ndarray:
        self.images += len(pixels)
        assert self.go_on.wait(PATIENCE_S)
        return encode(pixels)


async def admitted(engine: Engine, images: int) -> None:
    """Returns once this many images are in flight."""
    while engine._gate.in_flight < images:
        await asyncio.sleep(0)


def test_embedded_images_name_their_encoder_and_the_time_in_each_stage(start, bundle, files, expected):
    engine = start(limits=Limits(threads=1))  # one lane: no batches run at the same time, so the times add up
    started = time.perf_counter()
    answer = asyncio.run(engine.embed(files(*range(40))))
    took = time.perf_counter() - started
    assert answer.model == bundle.card.id
    assert answer.vectors.dtype == np.float32
    np.testing.assert_allclose(answer.vectors, expected(*range(40)), atol=1e-5)
    assert set(answer.times) == {"decode", "queue", "model"}
    assert all(seconds >= 0 for seconds in answer.times.values())
    assert 0 < sum(answer.times.values()) < took


def test_an_embedding_does_not_depend_on_the_other_images_of_the_batch(start, files):
    engine = start()

    async def ask():
        together = await asyncio.gather(*(engine.embed(files(i, i + 1, i)) for i in range(30)))
        return together, [(await engine.embed(files(i))).vectors[0] for i in range(31)]

    together, alone = asyncio.run(ask())
    for i, answer in enumerate(together):
        np.testing.assert_allclose(answer.vectors, [alone[i], alone[i + 1], alone[i]], atol=1e-5)


def test_a_broken_image_fails_only_its_own_request(start, files, expected):
    engine = start()
    broken = [*files(1), Upload("images[1]", "", b"no picture")]

    async def ask():
        return await asyncio.gather(
            *(engine.embed(broken if i % 2 else files(i)) for i in range(40)), return_exceptions=True
        )

    for i, answer in enumerate(asyncio.run(ask())):
        if i % 2:
            assert isinstance(answer, Undecodable) and answer.param == "images[1]"
        else:
            np.testing.assert_allclose(answer.vectors, expected(i), atol=1e-5)


def test_many_pixels_in_few_bytes_are_not_decoded_within_a_batch(start, bundle, means):
    engine, buffer = start(), io.BytesIO()
    Image.new("RGB", (1100, 1000), (200, 30, 90)).save(buffer, "PNG")
    file = Upload("images[0]", "", buffer.getvalue())
    assert len(file.data) < SMALL_BYTES
    with pytest.raises(TooManyPixels):
        asyncio.run(engine._encoders.default.batch([file]))
    expected = means(read_pixels(file.data, bundle.card.preprocessing)[None], 1 / 255)
    np.testing.assert_allclose(asyncio.run(engine.embed([file])).vectors, expected, atol=1e-5)


# Several encoders -----------------------------------------------------------------------------------------------------


def test_several_encoders_are_served_and_the_first_is_the_default(
    start, make_bundle, bundle, files, expected, tmp_path
):
    other = make_bundle(tmp_path / "other", scale=1 / 128)
    engine = start(f"{bundle.folder}, {other.folder}")
    assert [card.id for card in engine.cards] == [bundle.card.id, other.card.id]
    assert engine.card.id == engine.library.index(DEFAULT).encoder_id == bundle.card.id
    assert engine.providers == [CPU]

    async def ask():
        names = (None, other.card.id, bundle.card.id)
        return await asyncio.gather(*(engine.embed(files(i), names[i % 3]) for i in range(30)))

    for i, answer in enumerate(asyncio.run(ask())):
        assert answer.model == (other if i % 3 == 1 else bundle).card.id
        np.testing.assert_allclose(answer.vectors, expected(i, scale=1 / 128 if i % 3 == 1 else 1 / 255), atol=1e-4)


def test_an_encoder_that_is_not_served_is_not_found(start, bundle, files):
    with pytest.raises(NotFound, match=f"no encoder resnet is served here, only {bundle.card.id}") as refused:
        asyncio.run(start().embed(files(1), "resnet"))
    assert refused.value.param == "model"


def test_the_one_of_several_encoders_that_cannot_be_served_is_named(start, bundle, tmp_path, no_store):
    with pytest.raises(BundleError, match="nowhere is neither"):
        start(f"{bundle.folder},{tmp_path / 'nowhere'}")


# Replaced encoders ----------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Checks for newer encoders all the time."""
    monkeypatch.setattr("serving.inference.served.CHECK_EVERY_S", 0.02)


@pytest.fixture
def place(make_bundle, tmp_path):
    """A bundle that another can replace."""
    return make_bundle(tmp_path / "place")


def test_a_newer_encoder_takes_over_and_running_requests_keep_theirs(
    quick, start, make_bundle, place, files, expected, caplog, wait_until
):
    engine = start(str(place.folder))
    held, old, collection = Held(engine), engine.card.id, engine.library.index(DEFAULT).encoder_id

    async def ask():
        begun = asyncio.create_task(engine.embed(files(1, 2)))
        await asyncio.to_thread(wait_until, lambda: held.images == 2, "the first batch has not begun")
        models = engine._encoders
        waiting = asyncio.create_task(engine.embed(files(3)))
        await asyncio.to_thread(wait_until, lambda: held.images + models.waiting == 3, "the second does not wait")
        newer = await asyncio.to_thread(make_bundle, place.folder, 1 / 128)
        await asyncio.to_thread(wait_until, lambda: engine.card.id == newer.card.id, "the newer one does not serve")
        after = asyncio.create_task(engine.embed(files(4)))
        held.go_on.set()
        return await asyncio.gather(begun, waiting, after)

    with caplog.at_level(logging.INFO, "twinview"):
        begun, waiting, after = asyncio.run(ask())
        log = f"serving {engine.card.id} instead of {old}"
        wait_until(lambda: any(message.startswith(log) for message in caplog.messages), "the change is not logged")
    assert begun.model == waiting.model == old
    np.testing.assert_allclose(begun.vectors, expected(1, 2), atol=1e-5)
    np.testing.assert_allclose(waiting.vectors, expected(3), atol=1e-5)
    assert after.model == engine.card.id != old
    np.testing.assert_allclose(after.vectors, expected(4, scale=1 / 128), atol=1e-4)
    assert engine.library.index(DEFAULT).encoder_id == engine.card.id != collection
    with pytest.raises(NotFound):
        asyncio.run(engine.embed(files(1), old))


def test_without_a_configured_name_the_newest_export_takes_over(
    quick, start, make_bundle, files, tmp_path, monkeypatch, wait_until
):
    monkeypatch.chdir(tmp_path)
    make_bundle(tmp_path / "runs" / "a" / "encoder")
    engine = start("")
    asyncio.run(engine.embed(files(1)))
    old = weakref.ref(engine._encoders.default.batch.lanes[0])
    gc.freeze()  # as the service does: existing objects are never collected from now on
    try:
        newer = make_bundle(tmp_path / "runs" / "b" / "encoder", 1 / 128)
        wait_until(lambda: engine.card.id == newer.card.id, "the newer one does not serve")
        wait_until(lambda: old() is None, "the old one is still in memory")
    finally:
        gc.unfreeze()


def test_figures_that_are_added_to_a_card_are_no_other_encoder(quick, start, place, caplog, wait_until):
    with caplog.at_level(logging.INFO, "twinview"):
        engine = start(str(place.folder))
        record_measured(place.folder, {"knn": 0.5})
        wait_until(lambda: engine.card.figures.get("measured"), "the new card is not read")
        wait_until(lambda: f"{engine.card.id} has a new card" in caplog.messages, "the change is not logged")


def items_of(engine, files, *numbers) -> list[Item]:
    """Items of these pictures, put into the collection by the default encoder of the collection."""
    index = engine.library.index(DEFAULT)
    items = [Item(f"{i}", f"{i}.png", None, None, 4, 3, 10) for i in numbers]
    index.upsert(items, np.random.default_rng(0).random((len(items), 48)), allow_other_encoder=True)
    return items


def test_a_collection_keeps_its_encoder_until_the_newer_one_has_embedded_all_of_it(
    quick, start, make_bundle, place, files, caplog, wait_until, monkeypatch
):
    monkeypatch.setattr("serving.inference.served.COUNT_EVERY_S", 0)
    engine = start(str(place.folder))
    old = engine.card.id
    items = items_of(engine, files, 1, 2)
    with caplog.at_level(logging.INFO, "twinview"):
        newer = make_bundle(place.folder, 1 / 128)
        wait_until(lambda: engine.card.id == newer.card.id, "the newer one does not serve")
        index = engine.library.index(DEFAULT)
        assert (index.encoder_id, index.count()) == (old, 2)
        assert engine.library.index("new").encoder_id == newer.card.id
        assert engine.library.index(DEFAULT, newer.card.id).encoder_id == newer.card.id
        assert [card.id for card in engine.cards] == [newer.card.id, old]

        async def search(query, images):
            searches = engine.searches
            return await searches.find([await searches.prepare(DEFAULT, query, images, None, None)])

        [found] = asyncio.run(search(SearchQuery(), files(1)))
        assert (found.model, len(found.results)) == (old, 2)
        vector = SearchQuery(positive=[[1.0] * 48])
        with pytest.raises(WrongEncoder):  # it may be the newer one's
            asyncio.run(search(vector, []))
        index = engine.library.index(DEFAULT, newer.card.id)
        index.upsert(items[:1], np.ones((1, 48)), allow_other_encoder=True)
        assert engine.library.index(DEFAULT).encoder_id == old  # of two items
        index.upsert(items, np.ones((2, 48)))
        wait_until(lambda: engine.library.index(DEFAULT).encoder_id == newer.card.id, "the collection does not switch")
        wait_until(lambda: len(engine.cards) == 1, "the old one is still served")
    said = [message for message in caplog.messages if message.startswith("the collection")]
    assert said == [
        f"the collection pictures uses {old} until {newer.card.id} is complete",
        f"the collection pictures uses {newer.card.id} from now on",
    ]


def test_after_a_restart_a_collection_still_has_the_encoder_of_an_earlier_run(
    start, make_bundle, files, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    first = make_bundle(tmp_path / "runs" / "a" / "encoder")
    items_of(start(""), files, 1)
    make_bundle(tmp_path / "runs" / "unneeded" / "encoder", 1 / 64)
    newest = make_bundle(tmp_path / "runs" / "b" / "encoder", 1 / 128)
    for age, name in enumerate(("b", "unneeded", "a")):
        os.utime(tmp_path / "runs" / name / "encoder" / "model_card.json", (1e9 - age, 1e9 - age))
    engine = start("")
    assert [card.id for card in engine.cards] == [newest.card.id, first.card.id]
    assert engine.library.index(DEFAULT).encoder_id == first.card.id


def test_an_export_that_does_not_work_is_logged_and_the_old_encoder_keeps_serving(
    start, make_bundle, place, files, tmp_path, caplog, no_store, monkeypatch
):
    monkeypatch.setattr("serving.inference.served.CHECK_EVERY_S", 3600)  # only this test checks
    engine = start(str(place.folder))
    old = engine.card.id
    good = make_bundle(tmp_path / "good", 1 / 128)
    graph = good.graph.read_bytes()
    wrong = make_bundle(tmp_path / "wrong", 1 / 64).card.probe

    def damage(**facts):
        card = {**vars(good.card), **facts}
        return lambda: save_bundle(place.folder, graph, type(good.card)(**card))

    def cut():
        save_bundle(place.folder, graph[:-100], good.card)

    def look_four_times():
        for _ in range(4):
            engine._encoders._check(engine._encoders._slots[0])

    reasons = [
        (cut, "is not the file its card describes"),
        (lambda: (place.folder / "model_card.json").write_text("{"), "cannot be read as a model card"),
        (damage(dimension=47), "returns 48 numbers per image; its card says 47"),
        (damage(probe=wrong), "differs by"),
        (lambda: shutil.rmtree(place.folder), None),
        (lambda: place.folder.mkdir(), None),
    ]
    for do, reason in reasons:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "twinview"):
            do()
            look_four_times()
        assert engine.card.id == old
        assert asyncio.run(engine.embed(files(1))).model == old
        assert len(caplog.messages) == bool(reason)  # once, not at every check
        if reason:
            assert caplog.messages[0].startswith(
                f"still serving {old}, because the export that replaced it does not work:"
            )
            assert reason in caplog.messages[0]
    make_bundle(place.folder, 1 / 128)
    look_four_times()
    assert engine.card.id == good.card.id


def test_an_encoder_that_is_still_being_copied_is_not_loaded_yet(
    start, make_bundle, place, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("serving.inference.served.CHECK_EVERY_S", 3600)
    engine = start(str(place.folder))
    newer = make_bundle(tmp_path / "newer", 1 / 128)
    content, old = newer.graph.read_bytes(), engine.card.id

    def look() -> str:
        engine._encoders._check(engine._encoders._slots[0])
        return engine.card.id

    with caplog.at_level(logging.WARNING, "twinview"), open(place.graph, "wb", buffering=0) as file:
        (place.folder / "model_card.json").write_bytes((newer.folder / "model_card.json").read_bytes())
        for i in range(0, len(content), 100):
            file.write(content[i : i + 100])
            assert look() == old
        assert look() == newer.card.id
    assert caplog.messages == []


# Admission ------------------------------------------------------------------------------------------------------------


def test_beyond_its_limit_the_engine_refuses_at_once_and_recovers(start, files):
    engine = start(limits=Limits(images_at_once=8))
    held = Held(engine)

    async def flood():
        accepted = [asyncio.create_task(engine.embed(files(i, i))) for i in range(4)]
        await admitted(engine, 8)
        refused = await asyncio.gather(*(engine.embed(files(1)) for _ in range(500)), return_exceptions=True)
        held.go_on.set()  # only now: the refused requests did not wait
        return refused, await asyncio.gather(*accepted)

    for _ in range(2):
        held.go_on.clear()
        refused, answered = asyncio.run(flood())
        assert all(isinstance(answer, Busy) and answer.headers["Retry-After"] == "1" for answer in refused)
        assert len(answered) == 4
        assert engine._gate.in_flight == engine._encoders.waiting == 0


def test_a_failed_or_cancelled_request_is_no_longer_in_flight(start, files):
    engine = start(limits=Limits(images_at_once=4))
    held = Held(engine)

    async def ask():
        gone = asyncio.create_task(engine.embed(files(1, 2, 3)))
        await admitted(engine, 3)
        with pytest.raises(Busy):
            await engine.embed(files(1, 2))
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        held.go_on.set()
        with pytest.raises(Undecodable):
            await engine.embed([Upload("images[0]", "", b"no picture")] * 4)
        return await engine.embed(files(1, 2, 3, 4))

    assert len(asyncio.run(ask()).vectors) == 4


def test_readyz_runs_the_encoder(http):
    assert http.get("/readyz").status_code == 200

    def fail(pixels):
        raise RuntimeError("out of memory")

    for lane in http.app.state.engine._encoders.default.batch.lanes:
        lane.encode = fail
    http.app.state.engine._encoders.default.health._begun -= 60
    answer = http.get("/readyz")
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "out of memory")
