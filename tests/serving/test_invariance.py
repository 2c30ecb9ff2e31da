import asyncio
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from export.artifact import read_pixels, save_bundle
from serving.client import ServiceError
from serving.views import analysis
from tests.conftest import PATIENCE_S

torch = pytest.importorskip("torch")
sync = pytest.mark.parametrize("connect", ["sync"], indirect=True)


def moved(curves) -> dict[str, list[float]]:
    return {curve.augmentation: curve.moved for curve in curves}


@pytest.mark.slow
@sync
def test_curves_are_those_of_training_evaluate_on_the_collections_pictures(http, fill, bundle, means, connect):
    from training.evaluation.sensitivity import sensitivity

    items = fill(6)
    found = connect(http).invariance(count=6)
    files = [connect(http).thumbnail(item.id) for item in items]
    pixels = np.stack([read_pixels(file, bundle.card.preprocessing) for file in files])
    expected = sensitivity(lambda x: torch.tensor(means(x), dtype=torch.float32), pixels)
    assert found.trained.pictures == 6 and found.trained.others == pytest.approx(expected.others, abs=1e-4)
    for name in ("grey", "brightness"):  # flips and crops differ with the order of the pictures
        strongest = next(curve for curve in expected.curves if curve.augmentation == name).moved[-1]
        assert moved(found.trained.curves)[name][-1] == pytest.approx(strongest, abs=0.2)
    assert moved(found.trained.curves)["grey"] == pytest.approx(moved(expected.curves)["grey"], abs=1e-4)
    assert found.sentence.startswith("This encoder notices")
    assert found.untrained is None


@pytest.mark.slow
@sync
def test_it_is_compared_with_the_untrained_architecture(serve, fill, bundle, picture, tmp_path, connect):
    from training.encoders import ResNetEncoder, embed
    from training.evaluation.sensitivity import sensitivity

    fill(4)
    card = replace(bundle.card, architecture="tiny-2x", training={"settings": {"seed": 7}})
    save_bundle(tmp_path / "encoder", bundle.graph.read_bytes(), card)
    found = connect(serve(encoder=tmp_path / "encoder")).invariance(count=4)
    torch.manual_seed(7)
    twin = ResNetEncoder("tiny", 2, 32)
    pixels = np.stack([read_pixels(picture(i), card.preprocessing) for i in range(4)])
    expected = sensitivity(lambda x: embed(twin, x), pixels)
    assert moved(found.untrained.curves)["grey"] == pytest.approx(moved(expected.curves)["grey"], rel=0.02)
    assert [curve.augmentation for curve in found.untrained.curves] == [c.augmentation for c in found.trained.curves]
    assert moved(found.untrained.curves) != moved(found.trained.curves)


@pytest.mark.slow
def test_a_single_picture_has_its_own_curves(http, fill, picture, connect):
    fill(4)
    found = connect(http).invariance(picture(9), count=4).picture
    curves = {curve.augmentation: curve for curve in found.curves}
    assert {name: len(views) for name, views in found.strips.items()} == {
        name: len(curve.strengths) for name, curve in curves.items()
    }
    assert found.name == "image" and len({found.pixels, *found.strips["brightness"]}) == 5
    assert curves["saturation"].moved == sorted(curves["saturation"].moved)
    (other,) = (connect(http).invariance(count=4).picture.name,)
    assert other.endswith(".png"), "without an image, one of the collection"


@pytest.mark.slow
@sync
def test_the_curves_of_the_sample_are_cached(http, fill, picture, monkeypatch, connect):
    fill(4)
    first = connect(http).invariance(picture(8), count=4, seed=3)
    monkeypatch.setattr("serving.views.analysis.compare_encoders", None)
    again = connect(http).invariance(picture(9), count=4, seed=3)
    assert again.trained == first.trained and again.picture.curves != first.picture.curves


@sync
def test_a_missing_or_too_small_collection_is_named(http, fill, picture, connect):
    with pytest.raises(ServiceError, match="there is no collection pictures") as absent:
        connect(http).invariance(picture(1))
    fill(1)
    with pytest.raises(ServiceError, match=r"^collection: at least two pictures are compared, and pictures") as small:
        connect(http).invariance(picture(1))
    assert (absent.value.status, small.value.status, small.value.param) == (404, 400, "collection")


@pytest.mark.slow
@sync
def test_a_request_that_takes_too_long_is_cancelled_and_the_next_is_answered(http, fill, monkeypatch, connect):
    fill(4)
    slot = http.app.state.engine._encoders._slots[0]
    encoder = slot.encoder

    async def never(images):
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr("serving.views.analysis.DEADLINE_S", 0.05)
        patch.setattr(slot, "encoder", replace(encoder, batch=never))
        with pytest.raises(ServiceError, match=r"^count: 4 pictures take this encoder longer than 0.05 s") as slow:
            connect(http).invariance(count=4)
    assert (slow.value.status, slow.value.param) == (413, "count")
    assert http.app.state.engine._gate.in_flight == 0
    assert connect(http).invariance(count=4).trained.pictures == 4


@pytest.mark.parametrize("slow", ["encoding", "drawing"])
def test_the_work_is_cancelled_when_the_client_disconnects(http, fill, slow, monkeypatch):
    """Both while the thread encodes and while it draws."""
    from training.evaluation import sensitivity

    fill(4)
    engine = http.app.state.engine
    slot = engine._encoders._slots[0]
    encoder, render, compare, encoded = slot.encoder, sensitivity.render, analysis.compare_encoders, []
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    async def encode(images):
        encoded.append(len(images))
        if slow == "encoding":
            begun.set()
            await asyncio.Event().wait()
        return await encoder.batch(images)

    def draw(*arguments):
        if slow == "drawing":
            begun.set()
            assert go_on.wait(PATIENCE_S)
        return render(*arguments)

    def in_thread(*arguments):
        try:
            return compare(*arguments)
        finally:
            ended.set()

    monkeypatch.setattr(sensitivity, "render", draw)
    monkeypatch.setattr(analysis, "compare_encoders", in_thread)
    slot.encoder = replace(encoder, batch=encode)

    async def go_away():
        task = asyncio.create_task(engine.views.invariance(None, "pictures", 4, 0))
        assert await asyncio.to_thread(begun.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        slot.encoder = encoder

    http.portal.call(go_away)
    assert ended.wait(PATIENCE_S)
    assert len(encoded) == 1
    assert engine._gate.in_flight == 0


@sync
def test_without_the_code_of_training_it_answers_501(http, fill, monkeypatch, connect):
    fill(2)
    monkeypatch.setitem(sys.modules, "training.evaluation.sensitivity", None)
    with pytest.raises(ServiceError, match="without training's code") as refused:
        connect(http).invariance(count=2)
    assert (refused.value.status, refused.value.code) == (501, "not_offered")
