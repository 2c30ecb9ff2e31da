"""Encoders against torchvision's ResNets, the initialisation and heads against the published layout."""

import math

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from training.encoders import ARCHITECTURES, ResNetEncoder, batch_size, embed, projection_head, to_input

RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESNETS)
def test_parameters_have_torchvisions_names_and_shapes(name):
    with torch.device("meta"):
        ours, theirs = ResNetEncoder(name, 1, 224), getattr(torchvision.models, name)()
    expected = {key: shape for key, shape in shapes(theirs).items() if not key.startswith("fc.")}
    found = {key: shape for key, shape in shapes(ours).items() if key != "centre"}
    assert found == expected
    assert list(found) == list(expected)
    assert ours.dimension == theirs.fc.in_features


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_torchvisions_weights_give_torchvisions_features(name):
    torch.manual_seed(0)
    with torch.device("meta"):
        ours, theirs = ResNetEncoder(name, 1, 64), getattr(torchvision.models, name)(num_classes=1)
    weights = {}
    for key, value in theirs.state_dict().items():
        if key.endswith("running_var"):
            weights[key] = torch.rand(value.shape) + 0.5
        elif value.ndim == 4:
            weights[key] = torch.randn(value.shape) * (2 / value[0].numel()) ** 0.5
        elif value.ndim == 0:
            weights[key] = torch.zeros((), dtype=torch.int64)
        else:
            weights[key] = torch.rand(value.shape) - (0.0 if key.endswith("weight") else 0.5)
    theirs.load_state_dict(weights, assign=True)
    ours.load_state_dict({k: v for k, v in weights.items() if not k.startswith("fc.")}, assign=True)
    theirs.fc = nn.Identity()
    x = torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        expected = theirs.eval()(x)
        h = ours.eval()(x)
    assert h.shape == (2, ours.dimension)
    assert expected.std() > 0.01
    torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "resnet18", "resnet50"])
def test_width_multiplies_every_channel_count(name):
    with torch.device("meta"):
        one, two, four = (ResNetEncoder(name, width, 224) for width in (1, 2, 4))
    assert (two.dimension, four.dimension) == (2 * one.dimension, 4 * one.dimension)
    for key, shape in shapes(one).items():
        expected = tuple(n if n == 3 and key == "conv1.weight" else 2 * n for n in shape[:2]) + shape[2:]
        assert shapes(two)[key] == expected, key


@pytest.mark.parametrize(("size_px", "resolution"), [(1, 1), (8, 8), (28, 28), (32, 32), (33, 9), (64, 16), (224, 56)])
def test_the_stem_keeps_the_resolution_up_to_32_px_and_quarters_it_above(size_px, resolution):
    encoder = ResNetEncoder("tiny", 1, size_px).eval()
    seen = {}
    encoder.layer1.register_forward_hook(lambda _, x, y: seen.update(entering=x[0].shape))
    with torch.no_grad():
        h = encoder(torch.rand(1, 3, size_px, size_px))
    assert seen["entering"] == (1, 16, resolution, resolution)
    assert h.shape == (1, encoder.dimension)
    assert h.isfinite().all()


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_the_last_gain_of_each_block_starts_at_0_and_every_other_at_1(name):
    encoder = ResNetEncoder(name, 1, 32)
    last = {id(m.bn3) for m in encoder.modules() if isinstance(m, Bottleneck)}
    last |= {id(m.bn2) for m in encoder.modules() if isinstance(m, BasicBlock)}
    assert len(last) == sum(ARCHITECTURES[name][1])
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == (0 if id(module) in last else 1)).all()
            assert (module.bias == 0).all()
            assert (module.momentum, module.eps) == (0.1, 1e-5)


@pytest.mark.slow
def test_kernels_start_as_a_truncated_normal_of_variance_1_over_fan_in():
    torch.manual_seed(0)
    # The deviation of the distribution, by integration: x^2 and 1 over a standard normal cut at two deviations.
    x = np.linspace(-2, 2, 200_001)
    density = np.exp(-(x**2) / 2)
    narrowing = math.sqrt((x**2 * density).sum() / density.sum())
    for name, module in ResNetEncoder("resnet18", 1, 32).named_modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach().double()
            fan_in = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
            error = 1 / math.sqrt(weight.numel())  # of a standard deviation, about
            std = fan_in**-0.5
            assert weight.std().item() == pytest.approx(std, rel=4 * error), name
            assert weight.mean().item() == pytest.approx(0, abs=4 * std * error), name
            cut = 2 * std / narrowing
            assert weight.abs().max() <= cut * (1 + 1e-4), name
            assert weight.abs().max() > 0.95 * cut, name


def test_an_unknown_architecture_is_rejected_by_name():
    with pytest.raises(ValueError, match=r"encoder must be one of tiny, .*resnet152, not 'resnet19'"):
        ResNetEncoder("resnet19", 1, 32)


def kinds(module: nn.Module) -> list[type]:
    return [type(m) for m in module]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_head_is_linear_bn_relu_repeated_then_linear_and_bn(layers):
    head = projection_head(24, layers, 10)
    assert kinds(head) == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * (layers - 1) + [nn.Linear, nn.BatchNorm1d]
    linears = [m for m in head if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linears] == [(24, 24)] * (layers - 1) + [(24, 10)]
    assert all(m.bias is None for m in linears)
    norms = [m for m in head if isinstance(m, nn.BatchNorm1d)]
    assert [m.num_features for m in norms] == [24] * (layers - 1) + [10]
    assert all((m.momentum, m.eps) == (0.1, 1e-5) for m in norms)
    assert [m.bias.requires_grad for m in norms] == [True] * (layers - 1) + [False]
    assert all(m.weight.requires_grad for m in norms)
    assert (norms[-1].bias == 0).all()
    assert head(torch.randn(4, 24)).shape == (4, 10)


def test_a_head_of_no_layers_gives_h():
    h = torch.randn(4, 24)
    assert torch.equal(projection_head(24, 0, 10)(h), h)


def test_the_last_bias_of_a_head_stays_0_in_training():
    torch.manual_seed(0)
    head = projection_head(24, 2, 10)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        (head(torch.randn(8, 24)) - 1).exp().sum().backward()
        optimizer.step()
    assert (head[-1].bias == 0).all()
    assert not (head[1].bias == 0).all()
    assert not (head[-1].weight == 1).all()


def test_matrices_of_a_head_start_as_a_normal_of_deviation_a_hundredth():
    torch.manual_seed(0)
    head = projection_head(512, 3, 128)
    for linear in (m for m in head if isinstance(m, nn.Linear)):
        error = 1 / math.sqrt(linear.weight.numel())
        assert linear.weight.std().item() == pytest.approx(0.01, rel=4 * error)
        assert linear.weight.abs().max() > 0.035  # not cut


@pytest.mark.parametrize("layers", [-1, 4])
def test_another_number_of_head_layers_is_rejected(layers):
    with pytest.raises(ValueError, match=f"head_layers must be 0 to 3, not {layers}"):
        projection_head(24, layers, 10)


@pytest.fixture
def encoder() -> ResNetEncoder:
    torch.manual_seed(0)
    encoder = ResNetEncoder("tiny", 1, 16)
    for module in encoder.modules():  # statistics and gains of an encoder that has been trained a little
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
    return encoder


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize("at_once", [1, 3, 7, 100])
def test_embedding_in_batches_gives_every_image_its_own_row_in_order(encoder, pixels, at_once, monkeypatch):
    sizes = []
    monkeypatch.setattr("training.encoders.PIXELS_AT_ONCE", at_once * 16 * 16)
    encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    rows = embed(encoder, pixels)
    assert max(sizes) == min(at_once, 7)
    assert rows.shape == (7, encoder.dimension)
    assert (rows.dtype, rows.device.type) == (torch.float32, "cpu")
    encoder.eval()
    for i, image in enumerate(pixels):
        x = torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / 255)[None]
        torch.testing.assert_close(rows[i], encoder(x)[0].detach(), rtol=1e-5, atol=1e-6)


def test_large_images_are_encoded_in_smaller_batches():
    assert [batch_size(px) for px in (16, 224, 4096)] == [512, 83, 1]


@pytest.mark.parametrize("training", [True, False])
def test_embedding_restores_the_encoders_mode_and_changes_no_statistics(encoder, pixels, training):
    encoder.train(training)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    embed(encoder, pixels)
    assert encoder.training is training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_the_input_is_only_scaled():
    pixels = torch.tensor([[[[0, 51, 255], [102, 153, 204]]]], dtype=torch.uint8)  # (1, 1, 2, 3)
    x = to_input(pixels)
    assert x.shape == (1, 3, 1, 2)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([0, 0.2, 1]))
    torch.testing.assert_close(x[0, :, 0, 1], torch.tensor([0.4, 0.6, 0.8]))
