import base64
import hashlib
import io
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from export.artifact import load_bundle, save_bundle

torch = pytest.importorskip("torch")
sync = pytest.mark.parametrize("connect", ["sync"], indirect=True)


def pixels(uri: str) -> np.ndarray:
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), np.float64)


@pytest.fixture(params=[False, True], ids=["centred", "whitened"])
def projector(request, bundle, make_bundle, tmp_path):
    """h -> z by g of a run, where h is features @ whitening - centre. Writes its checkpoint and a bundle of the encoder
    of `bundle` in tmp_path/run/encoder."""
    from training.encoders import projection_head

    torch.manual_seed(0)
    g = projection_head(48, 3, 16)
    for module in g.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.uniform_(-1, 1)
        if isinstance(module, torch.nn.BatchNorm1d):  # statistics as after training
            for values in (module.running_mean, module.running_var, module.weight, module.bias):
                values.data.uniform_(0.5, 1.5)
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    centre, whitening = torch.rand(48), torch.rand(48, 48) + 5 * torch.eye(48)
    state = {"encoder.centre": centre} | {f"projector.{k}": v for k, v in g.state_dict().items()}
    if request.param:
        state["encoder.whitening"] = whitening
    torch.save({"state_dict": state}, checkpoint)
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    card = replace(bundle.card, training={"checkpoint_sha256": digest})
    save_bundle(tmp_path / "run/encoder", bundle.graph.read_bytes(), card)
    back = whitening.inverse() if request.param else torch.eye(48)
    return lambda h: g.eval()((h + centre) @ back)


def draw(http, picture, **form):
    answer = http.post("/views", files={"image": ("a.png", picture(3))}, data=form)
    assert answer.status_code == 200, answer.text
    return answer.json()["pairs"]


def test_views_are_those_of_pretraining_and_are_compared_by_h(http, bundle, picture):
    from export.artifact import read_pixels
    from training.augment import AugmentSettings, augment

    pairs = draw(http, picture, pairs=3, seed=7, strength=0.5, crop_area=[0.2, 0.9])
    images = torch.tensor(read_pixels(picture(3), bundle.card.preprocessing)).repeat(6, 1, 1, 1)
    settings = AugmentSettings(strength=0.5, crop_area=(0.2, 0.9))
    expected = augment(images, settings, torch.Generator().manual_seed(7), 32).permute(0, 2, 3, 1) * 255
    views = np.stack([pixels(view) for pair in pairs for view in pair["views"]])  # (6, 32, 32, 3)
    np.testing.assert_allclose(views, expected.numpy(), atol=0.5001)
    h = unit_h(views).reshape(3, 2, 48)
    np.testing.assert_allclose([pair["similarity"] for pair in pairs], (h[:, 0] * h[:, 1]).sum(-1), atol=1e-5)


def test_the_same_seed_draws_the_same_views_and_another_seed_different_ones(http, picture):
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
        ({"crop": 0.2}, "crop is not an augmentation setting; the settings are crop_area"),
        ({"strength": "much"}, 'strength: "much" is not a number'),
        ({"strength": "nan"}, "strength must be in"),
        ({"flip": 2}, "flip is a probability"),
        ({"crop_area": 0.2}, "crop_area takes 2 values, not 1"),
        ({"flip": [0, 1]}, "flip takes 1 value, not 2"),
        ({"crop_sampling": "jax"}, "crop_sampling must be torchvision or tensorflow, not 'jax'"),
    ],
)
def test_an_unknown_setting_is_named(http, picture, form, message):
    answer = http.post("/views", files={"image": ("a.png", picture(3))}, data=form)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)


def test_a_file_as_a_setting_is_refused(http, picture):
    answer = http.post("/views", files={"image": ("a.png", picture(3)), "flip": ("b.png", picture(3))})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "flip: must not be a file"


def test_without_torch_views_answer_501(http, picture, monkeypatch):
    monkeypatch.setitem(sys.modules, "training.augment", None)
    answer = http.post("/views", files={"image": ("a.png", picture(3))})
    assert answer.status_code == 501
    assert answer.json()["error"]["code"] == "not_offered"


def unit_h(views: np.ndarray) -> np.ndarray:
    """(n, 32, 32, 3) -> (n, 48): the bundle's h of unit length, with its dimensions in another order."""
    h = views.reshape(-1, 4, 8, 4, 8, 3).mean(axis=(2, 4)).reshape(-1, 48)
    return h / np.linalg.norm(h, axis=1, keepdims=True)


@sync
def test_z_is_computed_by_the_projection_head_of_the_run(serve, tmp_path, picture, means, projector, connect):
    http = serve(encoder=tmp_path / "run/encoder")
    pairs = draw(http, picture, pairs=3, seed=1)
    h = means(np.stack([pixels(view) for pair in pairs for view in pair["views"]]))
    with torch.no_grad():
        z = torch.nn.functional.normalize(projector(torch.tensor(h, dtype=torch.float32)), dim=1).reshape(3, 2, -1)
    np.testing.assert_allclose([pair["projected"] for pair in pairs], (z[:, 0] * z[:, 1]).sum(1), atol=1e-4)
    assert min(pair["projected"] for pair in pairs) < 0.98
    found = connect(http).matrix([picture(1), picture(2)], count=2)
    assert found.z is found.cosines and np.abs(found.z - found.h).max() > 0.01


@sync
def test_without_its_run_an_encoder_has_no_z(serve, tmp_path, picture, projector, connect):
    """A checkpoint in the expected place is ignored if the encoder was not exported from it."""
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    saved = torch.load(checkpoint)
    torch.save(saved | {"epoch": 1}, checkpoint)
    http = serve(encoder=tmp_path / "run/encoder")
    assert {pair["projected"] for pair in draw(http, picture)} == {None}
    assert connect(http).matrix([picture(1), picture(2)], count=2).z is None


def test_the_weights_that_a_run_started_from_have_no_z(serve, tmp_path, bundle, picture, projector):
    """An export that kept them has 0 epochs; g was trained with others."""
    folder = tmp_path / "run/encoder"
    card = load_bundle(folder).card
    save_bundle(folder, bundle.graph.read_bytes(), replace(card, training=card.training | {"epochs": 0}))
    assert {pair["projected"] for pair in draw(serve(encoder=folder), picture)} == {None}


def test_a_damaged_checkpoint_is_ignored(serve, tmp_path, bundle, picture):
    damaged = tmp_path / "run/checkpoints/last.ckpt"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"no checkpoint")
    card = replace(bundle.card, training={"checkpoint_sha256": hashlib.sha256(b"no checkpoint").hexdigest()})
    save_bundle(tmp_path / "run/encoder", bundle.graph.read_bytes(), card)
    assert {pair["projected"] for pair in draw(serve(encoder=tmp_path / "run/encoder"), picture)} == {None}


def test_the_matrix_compares_all_views_and_its_loss_is_that_of_training(http, picture, connect):
    from training.loss import nt_xent

    found = connect(http).matrix([picture(i) for i in range(4)], count=4, seed=5, strength=0.5)
    views = np.stack([pixels(view) for one in found.pictures for view in one.views])
    h = unit_h(views)
    np.testing.assert_allclose(found.h, h @ h.T, atol=1e-5)
    first, second = (torch.tensor(h[start::2], dtype=torch.float32) for start in (0, 1))
    for temperature in (0.05, 0.2, 1.0):
        assert found.loss(temperature) == pytest.approx(nt_xent(first, second, temperature).item(), abs=1e-3)
        weights = np.exp(found.log_weights(temperature))
        np.testing.assert_allclose(weights.sum(axis=1), 1)
        assert np.diag(weights).max() == 0


@sync
def test_both_views_show_their_picture(http, picture, connect):
    plain = {"crop_area": [1, 1], "crop_sampling": "tensorflow", "flip": 0, "jitter": 0, "grey": 0, "blur": 0}
    found = connect(http).matrix([picture(1), picture(2)], count=2, **plain)
    np.testing.assert_allclose([found.h[0, 1], found.h[2, 3]], 1, atol=1e-5)
    assert found.h[0, 2] < 0.99


@pytest.mark.slow
@sync
def test_the_matrix_is_completed_with_other_pictures_of_the_collection(http, picture, connect):
    client, names = connect(http), [f"{i}.png" for i in range(8)]
    files = [picture(i, (300, 300)) for i in range(8)]
    items = client.put_items(files, [{"name": name} for name in names]).items
    known = {item.id: name for item, name in zip(items, names, strict=True)}
    for image in (files[3], client.thumbnail(items[3].id)):
        first, *others = client.matrix(image, count=12).pictures
        assert first.id is None and sorted(one.name for one in others) == sorted({*names} - {"3.png"})
        assert all(known[one.id] == one.name for one in others)
    same = [[one.id for one in client.matrix(count=4, seed=seed).pictures] for seed in (1, 1, 2)]
    assert same[0] == same[1] != same[2]


def test_a_matrix_needs_two_pictures(http, picture):
    answer = http.post("/matrix", files={"image": picture(1)})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(
        "image: at least two pictures are compared, and the collection pictures has no other"
    )
    answer = http.post("/matrix", files=[("image", picture(i)) for i in range(13)])
    assert (answer.status_code, answer.json()["error"]["param"]) == (413, "image")
    answer = http.post("/matrix", files=[("image", picture(i)) for i in range(2)], data={"flop": 1})
    assert answer.json()["error"]["param"] == "flop"
