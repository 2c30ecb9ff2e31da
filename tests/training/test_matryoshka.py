"""--matryoshka: the beginnings of h are trained too."""

import copy
from itertools import combinations

import pytest
import torch

from tests.training.conftest import RandomPictures
from training.loss import LOSSES
from training.simclr import SimCLR


def cut(projector: torch.nn.Sequential, length: int) -> torch.nn.Sequential:
    """g without the columns of its first layer that belong to the rest of h."""
    first = copy.deepcopy(projector)
    first[0].weight = torch.nn.Parameter(first[0].weight[:, :length].detach().clone())
    return first


@pytest.mark.parametrize(("views", "head_layers"), [(2, 2), (3, 3), (2, 1)])
def test_the_loss_is_the_mean_over_h_and_its_half_quarter_and_eighth(small_settings, views, head_layers):
    module = SimCLR(small_settings(views=views, head_layers=head_layers, matryoshka=True), RandomPictures(8), None)
    images = torch.from_numpy(module.train_store.pixels)
    seen, project = [], module.project
    module.project = lambda batch: seen.append(batch) or project(batch)
    loss = module.loss(images, 3)
    h = module.encoder(seen[0])
    d = h.shape[1]
    losses = []
    for length in (d, d // 2, d // 4, d // 8):
        z = cut(module.projector, length)(h[:, :length]).chunk(views)
        losses += [LOSSES["nt_xent"].function(a, b, 0.2) for a, b in combinations(z, 2)]
    assert len({round(value.item(), 5) for value in losses}) == len(losses)
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_the_running_statistics_of_g_are_those_of_whole_h(small_settings):
    statistics = []
    for matryoshka in (False, True):
        module = SimCLR(small_settings(matryoshka=matryoshka), RandomPictures(8), None)
        module.loss(torch.from_numpy(module.train_store.pixels), 3)
        statistics.append(dict(module.projector.named_buffers()))
    assert all(torch.equal(statistics[0][name], value) for name, value in statistics[1].items())


def test_a_batch_in_chunks_has_the_same_loss(small_settings):
    losses = []
    for chunk_size in (0, 3):
        settings = small_settings(matryoshka=True, chunk_size=chunk_size)
        module = SimCLR(settings, RandomPictures(8), None).eval()  # else batch norm has the statistics of a chunk
        losses.append(module.loss(torch.from_numpy(module.train_store.pixels), 3).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
