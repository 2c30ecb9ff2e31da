"""The .safetensors file beside the graph loads into torchvision's and timm's own networks, which give the same h."""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors import safe_open

from export.artifact import WEIGHTS, load_bundle
from export.to_onnx import ExportSettings, export, export_zoo
from export.weights import weights_file
from training import zoo
from training.checkpoint import AtomicCheckpointIO
from training.config import PretrainSettings
from training.encoders import to_input

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


def read(path: Path) -> tuple[dict, dict]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def embedded(network: torch.nn.Module, facts: dict, whitening: torch.Tensor | None = None) -> torch.Tensor:
    mean, std, centre = (torch.tensor(json.loads(facts[name])) for name in ("mean", "std", "centre"))
    x = to_input(torch.from_numpy(PIXELS))
    with torch.no_grad():
        h = network.eval()((x - mean[:, None, None]) / std[:, None, None])
        return (h if whitening is None else h @ whitening) - centre


def without_classifier(network: torch.nn.Module, weights: dict, classifier: str) -> torch.nn.Module:
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) == {f"{classifier}.weight", f"{classifier}.bias"}
    above, _, key = classifier.rpartition(".")
    setattr(network.get_submodule(above), key, torch.nn.Identity())
    return network


def write(tmp_path, encoder, architecture) -> tuple[dict, dict, torch.Tensor]:
    """The weights, the metadata, and h of PIXELS, of an encoder with a centre."""
    encoder.centre.normal_()
    (tmp_path / WEIGHTS).write_bytes(weights_file(encoder.eval(), architecture))
    with torch.no_grad():
        return *read(tmp_path / WEIGHTS), encoder(to_input(torch.from_numpy(PIXELS)))


def test_a_resnet_of_this_project_loads_into_torchvision_and_timm(tmp_path):
    weights, facts, h = write(tmp_path, zoo.build("resnet18", 1, 64), "resnet18")
    theirs = without_classifier(torchvision.models.resnet18(), weights, "fc")
    torch.testing.assert_close(embedded(theirs, facts), h, rtol=0, atol=1e-5)
    theirs = timm.create_model("resnet18", num_classes=0)
    theirs.load_state_dict(weights)
    torch.testing.assert_close(embedded(theirs, facts), h, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["resnet18", "timm:test_resnet"])
def test_the_file_of_a_whitened_encoder_contains_the_matrix(tmp_path, architecture):
    encoder = zoo.build(architecture, 1, 64).eval()
    encoder.whiten(PIXELS, 0.25)
    weights, facts, h = write(tmp_path, encoder, architecture)
    whitening = weights.pop("whitening")
    theirs = timm.create_model(architecture.removeprefix("timm:"), num_classes=0)
    theirs.load_state_dict(weights)
    torch.testing.assert_close(embedded(theirs, facts, whitening), h, rtol=1e-4, atol=1e-4)


def test_networks_of_others_load_into_their_library(tmp_path):
    weights, facts, h = write(tmp_path, zoo.load("torchvision:mobilenet_v3_small:random", 64).encoder, "torchvision:x")
    theirs = without_classifier(torchvision.models.mobilenet_v3_small(), weights, "classifier.3")
    torch.testing.assert_close(embedded(theirs, facts), h, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_an_export_contains_them_and_the_code_in_the_documents_reads_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundle = export_zoo(ExportSettings("timm:test_resnet:random", size_px=64, out=Path("runs/NAME/encoder")))
    text = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    code = re.search(r"## Weights for torch.*?```python\n(.*?)```", text, re.DOTALL)[1]
    found = {"x": to_input(torch.from_numpy(PIXELS))}
    with torch.no_grad():
        exec(compile(ast.parse(code), "integrations.md", "exec"), found)
        expected = zoo.load("timm:test_resnet:random", 64).encoder(found["x"])
    torch.testing.assert_close(found["h"], expected, rtol=0, atol=1e-5)
    assert load_bundle(bundle.folder) and (bundle.folder / WEIGHTS).is_file()


@pytest.mark.slow
def test_a_run_exported_without_them_before_is_exported_again(tmp_path):
    settings = PretrainSettings(encoder="tiny", size_px=20)
    encoder = zoo.build("tiny", 1, 20)
    weights = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    facts = {"data": "pictures", "images": 64, "commit": "abc", "before": {}, "after": {}}
    saved = {"state_dict": weights, "settings": settings.to_dict(), "facts": facts, "history": []}
    AtomicCheckpointIO().save_checkpoint(saved, tmp_path / "checkpoints" / "last.ckpt")
    bundle, _ = export(ExportSettings(str(tmp_path)))
    written, metadata = read(bundle.folder / WEIGHTS)
    assert metadata["architecture"] == "tiny"
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in written.items())
    (bundle.folder / WEIGHTS).unlink()
    assert export(ExportSettings(str(tmp_path)))[1] and (bundle.folder / WEIGHTS).is_file()
    assert not export(ExportSettings(str(tmp_path)))[1]
