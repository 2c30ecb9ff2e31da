import base64
import io
import sys

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")


def pixels(uri: str) -> np.ndarray:
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), np.float64)


def draw(http, picture, **form):
    answer = http.post("/views", files={"image": ("a.png", picture(3))}, data=form)
    assert answer.status_code == 200, answer.text
    return answer.json()["pairs"]


def test_views_are_those_of_pretraining_and_their_cosine_is_under_h(http, bundle, picture):
    from export.artifact import read_pixels
    from training.augment import AugmentSettings, augment

    pairs = draw(http, picture, pairs=3, seed=7, strength=0.5, crop_area=[0.2, 0.9])
    images = torch.tensor(read_pixels(picture(3), bundle.card.preprocessing)).repeat(6, 1, 1, 1)
    settings = AugmentSettings(strength=0.5, crop_area=(0.2, 0.9))
    expected = augment(images, settings, torch.Generator().manual_seed(7), 32).permute(0, 2, 3, 1) * 255
    views = np.stack([pixels(view) for pair in pairs for view in pair["views"]])  # (6, 32, 32, 3)
    np.testing.assert_allclose(views, expected.numpy(), atol=0.5001)
    h = views.reshape(6, 4, 8, 4, 8, 3).mean(axis=(2, 4)).reshape(3, 2, 48)
    h /= np.linalg.norm(h, axis=-1, keepdims=True)
    np.testing.assert_allclose([pair["similarity"] for pair in pairs], (h[:, 0] * h[:, 1]).sum(-1), atol=1e-5)


def test_the_same_seed_draws_the_same_views_and_another_seed_others(http, picture):
    assert draw(http, picture, seed=1) == draw(http, picture, seed=1)
    assert draw(http, picture, seed=1) != draw(http, picture, seed=2)


def test_without_augmentation_both_views_are_the_picture(http, picture):
    (pair,) = draw(
        http, picture, pairs=1, crop_area=[1, 1], crop_sampling="tensorflow", flip=0, jitter=0, grey=0, blur=0
    )
    assert pair["similarity"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"crop": 0.2}, "crop is no setting of the augmentation; there are crop_area"),
        ({"strength": "much"}, "strength must be a number, not 'much'"),
        ({"strength": "nan"}, "strength must be in"),
        ({"flip": 2}, "flip is a probability"),
        ({"crop_area": 0.2}, "crop_area takes 2 values, not 1"),
        ({"flip": [0, 1]}, "flip takes 1 value, not 2"),
        ({"crop_sampling": "jax"}, "crop_sampling must be torchvision or tensorflow, not 'jax'"),
    ],
)
def test_a_setting_that_is_none_is_named(http, picture, form, message):
    answer = http.post("/views", files={"image": ("a.png", picture(3))}, data=form)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)


def test_without_torch_views_are_not_offered(http, picture, monkeypatch):
    monkeypatch.setitem(sys.modules, "training.augment", None)
    answer = http.post("/views", files={"image": ("a.png", picture(3))})
    assert answer.status_code == 501
    assert answer.json()["error"]["code"] == "not_offered"
