"""What a step needs of a GPU's memory, and what a run says that does not fit into it."""

import numpy as np
import pytest
import torch

from training import memory
from training.batches import Batches
from training.config import PRESETS
from training.pretrain import pretrain
from training.simclr import SimCLR
from training.watch import RunProblem


class Pictures:
    source = "pixels"

    def __init__(self, n: int, size_px: int):
        self.pixels = np.zeros((n, size_px, size_px, 3), np.uint8)
        self.labels = np.full(n, -1)


@pytest.mark.slow
def test_a_view_of_resnet50_at_224_px_keeps_about_42_mib():
    module = SimCLR(PRESETS["imagenet"][1], Pictures(4, 224), None)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert memory.bytes_per_view(module) / 2**20 == pytest.approx(41.7, abs=1.5)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    words = memory.advice(module, 4096, 80 * 2**30)
    assert (
        "a step of 4,096 images at once does not fit into this device's memory of 80.0 GiB: a view at 224 px " in words
    )
    assert "Give --chunk-size 512, which encodes 512 images at once, or use more GPUs" in words
    assert "Give a smaller --size-px or --encoder" in memory.advice(module, 4096, 2**27)


def test_the_chunk_that_is_suggested_is_smaller_than_what_did_not_fit_and_fits(small_settings):
    for views, chunk_size in ((2, 0), (4, 0), (2, 16)):
        module = SimCLR(small_settings(views=views, chunk_size=chunk_size), Pictures(32, 16), None)
        per_image = memory.HEADROOM * views * memory.bytes_per_view(module)
        words = memory.advice(module, 32, int(10 * per_image))
        assert "Give --chunk-size 8, " in words
        assert f"a step of {chunk_size or 32} images" in words
        assert "Give --chunk-size 8, " in memory.advice(module, 12, int(1000 * per_image)) or chunk_size


def test_pictures_stay_on_the_gpu_only_beside_what_a_step_needs(small_settings, monkeypatch):
    pictures = Pictures(32, 16)
    module = SimCLR(small_settings(), pictures, None)
    needed = memory.step_bytes(module, 32) + pictures.pixels.nbytes
    found = []
    for free in (needed - 1, needed + 1):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
        monkeypatch.setattr(SimCLR, "device", torch.device("cuda"))
        monkeypatch.setattr(module, "first_images", lambda n: torch.from_numpy(pictures.pixels[:n]))
        monkeypatch.setattr(torch, "tensor", lambda pixels, device: pixels)
        found.append(Batches(module).resident is not None)
    assert found == [False, True]


@pytest.mark.slow
def test_a_run_that_runs_out_of_memory_says_which_chunk_size_fits(small_settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "capacity", lambda: 2**25)

    def full(self, images, batch_index):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SimCLR, "training_step", full)
    with pytest.raises(RunProblem, match=r"a step of 32 images at once .* Give --chunk-size \d+"):
        pretrain(small_settings())
