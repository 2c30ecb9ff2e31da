"""A batch in chunks against the same batch in one pass."""

import copy

import pytest
import torch
from torch import nn

from training.loss import nt_xent
from training.recompute import recomputed


def network(normalised: bool = True) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4) if normalised else nn.Identity()
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 8))


def loss(model: nn.Module, images: torch.Tensor, chunk: int | None) -> torch.Tensor:
    def pairs(part):
        return model(part), model(part.flip(3))

    if chunk is None:
        return nt_xent(*pairs(images), 0.5)
    z_a, z_b = zip(*(recomputed(pairs, model, part) for part in images.split(chunk)), strict=True)
    return nt_xent(torch.cat(z_a), torch.cat(z_b), 0.5)


@pytest.fixture
def images():
    return torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["in evaluation", "absent"])
@pytest.mark.parametrize("chunk", [3, 5])
def test_without_batch_statistics_chunks_have_the_gradients_of_one_pass(images, kind, chunk):
    model = network(normalised=kind == "in evaluation")
    model.train(kind == "absent")
    whole, chunked = model, copy.deepcopy(model)
    expected, actual = loss(whole, images, None), loss(chunked, images, chunk)
    expected.backward()
    actual.backward()
    assert abs(actual - expected) < 1e-6
    for ours, theirs in zip(chunked.parameters(), whole.parameters(), strict=True):
        assert theirs.grad.norm() > 1e-4
        assert (ours.grad - theirs.grad).norm() < 1e-5 * theirs.grad.norm()


def test_the_second_call_leaves_the_running_statistics_alone(images):
    model, once = network(), network()
    loss(model, images, 5).backward()
    with torch.no_grad():
        for part in images.split(5):
            once(part), once(part.flip(3))
    for name, value in once.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model[1].momentum == 0.1


def test_only_z_is_kept_for_the_backward_pass(images):
    def kept(chunk: int | None) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            loss(network(), images, chunk)
        return sum(sizes)

    assert kept(5) < kept(None) / 2
