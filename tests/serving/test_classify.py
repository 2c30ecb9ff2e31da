"""POST /classify with a bundle whose logits are known: a matrix times the 48 mean colours of conftest's encoder."""

import asyncio
import dataclasses
import hashlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.artifact import Bundle, encoder_id, read_pixels, save_bundle
from serving.api.classify import likeliest
from serving.client import ServiceError
from serving.errors import ErrorAnswer
from serving.inference.encoder import OnnxEncoder
from serving.inference.lane import PrivateCopy, ProcessLane
from serving.protocol.pack import MEDIA_TYPE, pack

CLASSES = ["cat", "dog", "Kuh", "cow", "hen", "ant"]
WEIGHT = np.random.default_rng(0).normal(0, 2, (48, len(CLASSES))).astype(np.float32)


@pytest.fixture(scope="module")
def classifier(bundle, tmp_path_factory) -> Bundle:
    model = onnx.load(bundle.graph)
    model.graph.node.append(helper.make_node("MatMul", ["embedding", "weight"], ["logits"]))
    model.graph.initializer.append(numpy_helper.from_array(WEIGHT, "weight"))
    model.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(CLASSES)]))
    content = model.SerializeToString()
    digest = hashlib.sha256(content).hexdigest()
    id = encoder_id("means", digest, bundle.card.preprocessing)
    card = dataclasses.replace(bundle.card, id=id, sha256=digest, classes=CLASSES)
    return save_bundle(tmp_path_factory.mktemp("runs") / "classes" / "encoder", content, card)


@pytest.fixture
def http(serve, classifier):
    return serve(encoder=classifier.folder)


@pytest.fixture
def expected(bundle, means, picture):
    """expected(seed) -> {class: probability} of picture(seed), in float64."""

    def probabilities(seed: int) -> dict[str, float]:
        logits = means(read_pixels(picture(seed), bundle.card.preprocessing)[None])[0] @ WEIGHT.astype(np.float64)
        return dict(zip(CLASSES, np.exp(logits) / np.exp(logits).sum(), strict=True))

    return probabilities


def assert_is(prediction: list[dict], expected: dict[str, float], k: int) -> None:
    best = sorted(expected, key=expected.get, reverse=True)[:k]
    assert [guess["label"] for guess in prediction] == best
    given = [guess["probability"] for guess in prediction]
    np.testing.assert_allclose(given, [expected[label] for label in best], atol=1e-4)


def test_each_way_of_sending_pictures_returns_their_likeliest_classes(http, classifier, picture, expected):
    files = [("images", (f"{i}.png", picture(i))) for i in range(3)]
    packed = {"content": pack([picture(i) for i in range(3)]), "headers": {"Content-Type": MEDIA_TYPE}}
    for request, n in (({"files": files}, 3), (packed, 3), ({"content": picture(0)}, 1)):
        answer = http.post("/classify", **request).json()
        assert answer["model"] == classifier.card.id
        assert len(answer["predictions"]) == n
        for i, prediction in enumerate(answer["predictions"]):
            assert_is(prediction, expected(i), 5)


def test_the_clients_return_the_likeliest_classes_of_any_number_of_pictures(
    connect, http, classifier, picture, expected, monkeypatch
):
    monkeypatch.setattr("serving.client.messages.PACK_IMAGES", 3)
    found = connect(http).classify((picture(i) for i in range(7)), k=2)
    assert (found.model, len(found.predictions)) == (classifier.card.id, 7)
    for i, guesses in enumerate(found.predictions):
        assert_is([vars(guess) for guess in guesses], expected(i), 2)
    assert connect(http).classify(picture(0), model=classifier.card.id).predictions[0][:2] == found.predictions[0]


def test_the_clients_name_a_broken_picture_and_a_model_without_classes(connect, serve, http, bundle, picture):
    with pytest.raises(ServiceError, match=r"images\[1\] \(image\) is not an image"):
        connect(http).classify([picture(0), b"no picture"])
    with pytest.raises(ServiceError, match="is an encoder and has no classes; fine-tune one"):
        connect(serve(encoder=bundle.folder)).classify(picture(0))


def test_k_limits_the_number_of_classes(http, picture, expected):
    for k, given in ((1, 1), (3, 3), (1000, 6)):
        (prediction,) = http.post(f"/classify?k={k}", content=picture(4)).json()["predictions"]
        assert_is(prediction, expected(4), given)
    for k in ("0", "1001", "many"):
        answer = http.post(f"/classify?k={k}", content=picture(4))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "k")


def test_pictures_of_several_batches_stay_in_order(http, picture, expected):
    files = [("images", (f"{i}.png", picture(i))) for i in range(75)]
    predictions = http.post("/classify?k=2", files=files).json()["predictions"]
    assert len(predictions) == 75
    for i, prediction in enumerate(predictions):
        assert_is(prediction, expected(i), 2)


def test_the_error_for_an_encoder_says_how_to_train_a_classifier(serve, bundle, classifier, picture):
    http = serve(encoder=f"{bundle.folder},{classifier.folder}")
    for model in ({}, {"model": "twinview"}, {"model": bundle.card.id}):
        answer = http.post("/classify", params=model, content=picture(0))
        error = ErrorAnswer.model_validate(answer.json()).error
        assert (answer.status_code, error.code, error.param) == (404, "not_found", "model")
        assert error.message.startswith(f"{bundle.card.id} is an encoder and has no classes; fine-tune one: ")
    answer = http.post("/classify", params={"model": classifier.card.id}, content=picture(0))
    assert answer.json()["model"] == classifier.card.id
    answer = http.post("/classify", params={"model": "nobody"}, content=picture(0))
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")


def test_a_classifier_embeds_as_its_encoder_does(http, bundle, means, picture):
    h = means(read_pixels(picture(1), bundle.card.preprocessing)[None])[0]
    answer = http.post("/embed", content=picture(1)).json()
    assert answer["dimension"] == 48
    np.testing.assert_allclose(answer["embeddings"], [h], atol=1e-5)
    npy = http.post("/embed", content=picture(1), headers={"Accept": "application/x-npy"}).content
    np.testing.assert_allclose(np.frombuffer(npy[-4 * 48 :], "<f4"), h, atol=1e-5)
    card = http.get("/v1/models").json()["data"][0]
    assert (card["classes"], card["precision"]) == (CLASSES, "fp32")


def test_a_broken_picture_is_named(http, picture):
    files = [("images", ("a.png", picture(0))), ("images", ("b.txt", b"no picture"))]
    answer = http.post("/classify", files=files)
    assert answer.status_code == 422
    assert answer.json()["error"]["message"] == "images[1] (b.txt) is not an image in a supported format"


@pytest.mark.slow
def test_a_lanes_process_returns_the_logits_after_the_embedding(classifier):
    pixels = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8)

    async def run() -> np.ndarray:
        lane = ProcessLane(classifier.card, PrivateCopy(classifier), 1, 2**20)
        lane.wait()
        try:
            return (await lane([pixels])).parts[0]
        finally:
            lane.close()

    np.testing.assert_allclose(asyncio.run(run()), OnnxEncoder(classifier).rows(pixels), rtol=1e-5)


def test_probabilities_of_any_logits_sum_to_one():
    (guesses,) = likeliest(np.float32([[1000, 999, -1000]]), ["a", "b", "c"], 3)
    assert [guess.label for guess in guesses] == ["a", "b", "c"]
    assert sum(guess.probability for guess in guesses) == pytest.approx(1, abs=1e-5)
    assert guesses[0].probability == pytest.approx(1 / (1 + np.exp(-1)), abs=1e-6)
