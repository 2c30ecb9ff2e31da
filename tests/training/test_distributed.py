"""Two processes with half of the batch each against one process with all of it.

The network has no batch norm: SyncBatchNorm runs on accelerators only, and without it each process would normalise by
its own half, so that one process and two would not compute the same function.
"""

import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import nn

from tests.conftest import PATIENCE_S
from training import checkpoint
from training.budget import Budget
from training.loss import dcl, gather, nt_xent
from training.pretrain import pretrain
from training.zoo import build

ROOT = Path(__file__).parents[2]


WORLD, IMAGES = 2, 8

# training/pretrain.py, whose second process is killed right after the first checkpoint.
KILLED = """
import os, signal
from training import pretrain
save = pretrain.EveryEpoch.on_train_epoch_end
def then_killed(*arguments):
    save(*arguments)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
pretrain.EveryEpoch.on_train_epoch_end = then_killed
pretrain.main()
"""

# training/pretrain.py with clocks that count how often they are read; writes how many steps each process took.
CLOCKS = """
import itertools, os
from training import budget, pretrain
reads, rank = itertools.count(), os.environ["RANK"]
pretrain.process_began = budget.clock = lambda: next(reads) * 0.5 * (5 if rank == "1" else 1)
fit = pretrain.fit
def counting(module, *arguments):
    fit(module, *arguments)
    open(f"steps-{rank}.txt", "w").write(str(module.global_step))
pretrain.fit = counting
pretrain.main()
"""


def network() -> nn.Module:
    """f and g in one: (N, 3, 8, 8) -> z (N, 16)."""
    torch.manual_seed(0)
    encoder = [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*encoder, nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16, bias=False))


def views() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(IMAGES, 3, 8, 8, generator=generator)
    return image, image + 0.2 * torch.rand(IMAGES, 3, 8, 8, generator=generator)


def one_of_two(rank: int, folder: str, function) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    z = torch.full((2, 3), float(rank + 1), requires_grad=True)
    rows = gather(z)
    rows.backward(torch.arange(12.0).view(4, 3) * 10**rank)
    a, b = (torch.full((1, 2), float(rank), requires_grad=True) for _ in range(2))
    (gather(a) + gather(b)).backward(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    gathered = {"rows": rows.detach(), "z": z.grad, "a": a.grad, "b": b.grad}

    model = network()
    half = slice(rank * IMAGES // WORLD, (rank + 1) * IMAGES // WORLD)
    z_a, z_b = model(torch.cat([view[half] for view in views()])).chunk(2)
    loss = function(gather(z_a), gather(z_b), 0.2)
    loss.backward()
    for p in model.parameters():  # as DDP does
        torch.distributed.all_reduce(p.grad)
        p.grad /= WORLD
    torch.save(
        gathered | {"loss": loss.detach(), "gradients": [p.grad for p in model.parameters()]}, f"{folder}/{rank}.pt"
    )
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("function", [nt_xent, dcl])
def test_two_processes_give_the_loss_and_the_gradients_of_one(function, tmp_path):
    torch.multiprocessing.spawn(one_of_two, args=(str(tmp_path), function), nprocs=WORLD)

    model = network()
    z_a, z_b = model(torch.cat(views())).chunk(2)
    loss = function(z_a, z_b, 0.2)
    loss.backward()
    for rank in range(WORLD):
        report = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        # Rows are in the order of the ranks; a row's gradient is the sum over all processes' losses.
        assert report["rows"].tolist() == [[1.0] * 3] * 2 + [[2.0] * 3] * 2
        assert torch.equal(report["z"], 11 * torch.arange(12.0).view(4, 3)[2 * rank : 2 * rank + 2])
        # Two gathers that get the same gradient tensor from autograd do not change it for each other.
        assert report["a"].tolist() == report["b"].tolist() == [[[2.0, 4.0]], [[6.0, 8.0]]][rank]

        torch.testing.assert_close(report["loss"], loss.detach(), rtol=1e-5, atol=0)
        for ours, p in zip(report["gradients"], model.parameters(), strict=True):
            assert p.grad.norm() > 1e-4
            assert (ours - p.grad).norm() < 1e-5 * p.grad.norm()


@pytest.mark.slow
def test_a_run_of_two_processes_says_that_one_was_killed_and_is_resumed(small_shapes, tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    options = ["--data", small_shapes, "--name", "two", "--size-px", "16", "--batch-size", "32", "--epochs", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    last = tmp_path / "runs" / "two" / "checkpoints" / "last.ckpt"

    def run(script: Path) -> tuple[int, str]:
        done = subprocess.run(
            [*launch, script, *options, "--resume"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    status, printed = run(tmp_path / "killed.py")
    assert status != 0
    assert re.search(r"error: .*another process .*ended\. Run the same command with --resume to continue\.", printed), (
        printed
    )
    assert checkpoint.load(last)["global_step"] == 2

    status, printed = run(ROOT / "training" / "pretrain.py")
    assert status == 0, printed
    assert printed.count("done in") == 1  # only the first process prints
    assert checkpoint.load(last)["global_step"] == 8


@pytest.mark.slow
def test_two_processes_without_torchrun_need_no_name_and_are_resumed(small_shapes, tmp_path):
    command = [sys.executable, ROOT / "training" / "pretrain.py", "--data", small_shapes, "--size-px", "16"]
    command += ["--batch-size", "32", "--epochs", "4", "--devices", "2"]
    for options, steps in ((["--max-steps", "2"], 2), (["--resume"], 8)):
        result = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert checkpoint.load(tmp_path / "runs/some-shapes-tiny/checkpoints/last.ckpt")["global_step"] == steps


@pytest.mark.slow
def test_two_processes_whose_clocks_differ_end_their_minutes_together(small_shapes, tmp_path):
    """The second one's clock is five times as fast: by its own it would end first, and the other would wait for it."""
    (tmp_path / "clocks.py").write_text(CLOCKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "clocks.py"]
    command += ["--data", small_shapes, "--name", "two", "--size-px", "16", "--batch-size", "32", "--minutes", "0.8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, "--knn-epochs", "2"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    saved = checkpoint.load(tmp_path / "runs" / "two" / "checkpoints" / "last.ckpt")
    first, second = (int((tmp_path / f"steps-{rank}.txt").read_text()) for rank in (0, 1))
    assert first == second == saved["global_step"] > 4
    assert saved["facts"]["epochs"] == saved["settings"]["epochs"] == len(saved["history"])


def test_processes_whose_clocks_differ_write_the_same_checkpoints(tmp_path):
    meet, said = threading.Barrier(WORLD, timeout=PATIENCE_S), [False] * WORLD

    class Strategy:
        def __init__(self, rank: int):
            self.rank = rank

        def reduce_boolean_decision(self, decision: bool, all: bool) -> bool:
            said[self.rank] = decision
            meet.wait()
            agreed = any(said)
            meet.wait()
            return agreed

    def end_of_epoch(rank: int) -> list[Path]:
        written = []
        callback = checkpoint.EveryEpoch(tmp_path / "last.ckpt")
        callback.saved_at = time.monotonic() + 60 - rank * 60 - checkpoint.EVERY_S  # due for the second one alone
        callback.on_train_epoch_end(
            SimpleNamespace(
                strategy=Strategy(rank),
                current_epoch=0,
                max_epochs=9,
                global_step=1,
                max_steps=-1,
                should_stop=False,
                save_checkpoint=written.append,
            ),
            SimpleNamespace(facts={}, budget=Budget(None)),
        )
        return written

    with ThreadPoolExecutor(WORLD) as pool:
        assert list(pool.map(end_of_epoch, range(WORLD))) == [[tmp_path / "last.ckpt"]] * WORLD


@pytest.mark.parametrize(("batch", "world"), [(33, 2), (2, 2)])
def test_a_batch_that_does_not_divide_among_the_processes_is_refused(
    small_settings, tmp_path, monkeypatch, batch, world
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"--batch-size {batch} cannot be shared by {world} processes"):
        pretrain(small_settings(batch_size=batch, devices=world))


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one(small_shapes, tmp_path):
    """With a network without batch norm, views that are the pictures themselves, and two pictures left over."""
    command = [sys.executable, ROOT / "training" / "pretrain.py", "--data", small_shapes, "--size-px", "32"]
    command += [
        "--encoder",
        "timm:test_vit",
        "--head-layers",
        "0",
        "--batch-size",
        "12",
        "--epochs",
        "2",
        "--seed",
        "3",
    ]
    command += ["--optimizer", "sgd", "--lr", "0.05", "--augment.crop-area", "1", "1", "--whiten", "0"]
    command += [word for name in ("flip", "jitter", "grey", "blur") for word in (f"--augment.{name}", "0")]
    weights, losses = [], []
    for devices in ("1", "2"):
        options = ["--devices", devices, "--name", devices]
        result = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        saved = checkpoint.load(tmp_path / "runs" / devices / "checkpoints" / "last.ckpt")
        assert saved["global_step"] == 2 * (64 // 12)
        weights.append(saved["state_dict"])
        losses.append([row["loss"] for row in saved["history"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.manual_seed(3)
    start = build("timm:test_vit", 1, 32).state_dict()
    for name, one in weights[0].items():
        moved = (one - start[name.removeprefix("encoder.")]).norm()
        assert (one - weights[1][name]).norm() <= 0.01 * moved, name
