"""Every setting reaches the step: a run with unusual settings, compared with values computed here by hand."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from training import pretrain as command
from training.augment import AugmentSettings, draw
from training.batches import Batches
from training.data.sources import open_source
from training.data.store import load
from training.pretrain import fit, pretrain
from training.simclr import SimCLR

PICTURES, BATCH, STEPS, EPOCHS = 64, 12, 5, 2
UNUSUAL = {
    "batch_size": BATCH,
    "epochs": EPOCHS,
    "seed": 11,
    "head_layers": 2,
    "head_dimension": 24,
    "loss_scale": 3.0,
    "temperature": 0.37,
    "optimizer": "sgd",
    "lr": 0.9,
    "lr_scaling": "linear",
    "encoder_lr": 0.25,
    "warmup": 0.3,
    "momentum": 0.7,
    "weight_decay": 0.02,
    "augment": AugmentSettings((0.3, 0.7), "tensorflow", 1.2, 0.1, 0.2, 0.3, 20.0, 0.4, 0.6, 0.7, 0.3, 0.9),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_settings):
    """The steps of a run: batch, draws, z, loss that is minimised, and the optimiser's groups."""
    steps: list[SimpleNamespace] = []

    class Recorded(SimCLR):
        def training_step(self, images, batch_index):
            steps.append(SimpleNamespace(images=images.clone(), groups=self.groups()))
            loss = super().training_step(images, batch_index)
            steps[-1].minimised = loss.item()
            return loss

        def project_views(self, images, draws):
            z = super().project_views(images, draws)
            if steps and not hasattr(steps[-1], "z"):
                steps[-1].z, steps[-1].draws = [view.detach().clone() for view in z], draws
            return z

        def groups(self):
            return [
                {name: value for name, value in g.items() if name != "params"} for g in self.optimizers().param_groups
            ]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("wiring"))
        patch.setattr(command, "SimCLR", Recorded)
        folder = pretrain(small_settings(**UNUSUAL))
        pixels = load(open_source(small_settings().data), small_settings().preprocessing, "train").pixels
        yield SimpleNamespace(steps=steps, pixels=np.array(pixels), folder=folder)


@pytest.mark.slow
def test_the_batches_are_a_new_permutation_in_each_epoch(run):
    assert len(run.steps) == STEPS * EPOCHS
    for epoch in range(EPOCHS):
        order = np.random.default_rng([11, epoch]).permutation(PICTURES)
        for step in range(STEPS):
            rows = np.sort(order[step * BATCH : (step + 1) * BATCH])
            assert np.array_equal(run.steps[epoch * STEPS + step].images.numpy(), run.pixels[rows])


@pytest.mark.slow
def test_the_draws_follow_seed_step_and_every_augmentation_setting(run):
    for number, step in enumerate(run.steps):
        (mixed,) = np.random.SeedSequence([11, number, 0]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(mixed))
        expected = draw(2 * BATCH, 16, 16, UNUSUAL["augment"], generator)
        for name, value in expected._asdict().items():
            assert torch.equal(getattr(step.draws, name), value), (number, name)


@pytest.mark.slow
def test_the_loss_is_nt_xent_at_the_temperature_times_the_scale(run):
    for step in run.steps:
        z = torch.cat(step.z).double()
        assert z.shape == (2 * BATCH, 24)
        z = z / z.norm(dim=1, keepdim=True)
        similarity = (z @ z.T / 0.37).numpy()
        losses = []
        for i in range(2 * BATCH):
            others = [similarity[i, k] for k in range(2 * BATCH) if k != i]
            losses.append(math.log(sum(map(math.exp, others))) - similarity[i, (i + BATCH) % (2 * BATCH)])
        assert step.minimised == pytest.approx(3 * np.mean(losses), rel=1e-4)


@pytest.mark.slow
def test_the_optimiser_has_the_learning_rate_of_every_step_momentum_and_decay(run):
    peak, warmup, total = 0.9 * BATCH / 256, 3, STEPS * EPOCHS
    for number, step in enumerate(run.steps):
        cosine = 0.5 * (1 + math.cos(math.pi * (number - warmup) / (total - warmup)))
        lr = peak * (number / warmup if number < warmup else cosine)
        assert [group["lr"] for group in step.groups] == pytest.approx([lr, lr, lr / 4, lr / 4], abs=1e-12)
        assert [group["weight_decay"] for group in step.groups] == [0.02, 0.0, 0.02, 0.0]
        assert {group["momentum"] for group in step.groups} == {0.7}
        assert not any(group["nesterov"] for group in step.groups)


def test_each_process_takes_its_own_share_of_every_batch(small_settings, monkeypatch):
    module = SimCLR(small_settings(batch_size=BATCH), Noise(), None)
    batches = Batches(module, resident=False)
    order = np.random.default_rng([0, 3]).permutation(PICTURES)
    shares = []
    for rank in range(3):
        module._trainer = SimpleNamespace(current_epoch=3, global_rank=rank, world_size=3)
        shares.append([share.numpy() for share in batches])
    for step in range(STEPS):
        rows = order[step * BATCH : (step + 1) * BATCH]
        for rank in range(3):
            assert np.array_equal(shares[rank][step], Noise().pixels[np.sort(rows[rank::3])])


def test_pictures_kept_on_the_device_give_the_same_batches(small_settings):
    module = SimCLR(small_settings(batch_size=BATCH), Noise(), None)
    read, resident = (list(Batches(module, resident).epoch(1, 1, 2)) for resident in (False, True))
    assert len(read) == len(resident) == STEPS
    assert all(torch.equal(a, b) for a, b in zip(read, resident, strict=True))


@pytest.mark.parametrize(("gpu", "devices", "nodes"), [(True, 2, 1), (True, 1, 2), (True, 1, 1), (False, 2, 1)])
def test_several_gpus_share_the_statistics_of_batch_norm_and_a_gpu_trains_in_bfloat16(
    small_settings, tmp_path, monkeypatch, gpu, devices, nodes
):
    made = SimpleNamespace()

    class Trainer:
        should_stop = False

        def __init__(self, **options):
            vars(made).update(options)

        def fit(self, module, ckpt_path):
            made.resumed = ckpt_path

    monkeypatch.setattr(command.pl, "Trainer", Trainer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(command, "training_device", lambda: torch.device("cuda" if gpu else "cpu"))
    monkeypatch.setattr("training.device.torch.cpu.get_capabilities", dict)
    settings = small_settings(batch_size=BATCH, max_steps=7, head_first=2)
    module = SimCLR(settings, Noise(), None)
    fit(module, tmp_path, False, devices, nodes)
    together = gpu and devices * nodes > 1
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, nn.SyncBatchNorm) == together for norm in norms)
    assert made.precision == ("bf16-mixed" if gpu else "32-true")
    assert (made.devices, made.num_nodes, made.max_epochs, made.max_steps) == (devices, nodes, 3, 7)
    assert made.resumed is None
    assert ("find_unused" in made.strategy) == (devices * nodes > 1)


class Noise:
    source = "noise"

    def __init__(self) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 256, (PICTURES, 16, 16, 3), np.uint8)
        self.labels = np.full(PICTURES, -1)


def test_the_unusual_settings_differ_from_every_preset_in_all_they_change(small_settings):
    """Otherwise a setting that is ignored could go unseen."""
    usual = dataclasses.asdict(small_settings())
    for name, value in dataclasses.asdict(small_settings(**UNUSUAL)).items():
        if name in UNUSUAL and name != "augment":
            assert value != usual[name], name
    augment, unusual = AugmentSettings(), UNUSUAL["augment"]
    assert all(getattr(augment, f.name) != getattr(unusual, f.name) for f in dataclasses.fields(augment))
