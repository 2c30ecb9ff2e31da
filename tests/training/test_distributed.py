"""Two processes with half of the batch each against one process with all of it.

The network has no batch norm: SyncBatchNorm runs on accelerators only, and without it each process would normalise by
its own half, so that one process and two would not compute the same function.
"""

import torch
import torch.distributed
import torch.multiprocessing
from torch import nn

from training.loss import gather, nt_xent

torch.set_num_threads(1)  # the tensors are small: a second thread costs more in waiting than it computes

WORLD, IMAGES = 2, 8


def network() -> nn.Module:
    """f and g in one: (N, 3, 8, 8) -> z (N, 16)."""
    torch.manual_seed(0)
    encoder = [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*encoder, nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16, bias=False))


def views() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(IMAGES, 3, 8, 8, generator=generator)
    return image, image + 0.2 * torch.rand(IMAGES, 3, 8, 8, generator=generator)


def one_of_two(rank: int, folder: str) -> None:
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
    loss = nt_xent(gather(z_a), gather(z_b), 0.2)
    loss.backward()
    for p in model.parameters():  # as DDP does
        torch.distributed.all_reduce(p.grad)
        p.grad /= WORLD
    torch.save(
        gathered | {"loss": loss.detach(), "gradients": [p.grad for p in model.parameters()]}, f"{folder}/{rank}.pt"
    )
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_loss_and_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(one_of_two, args=(str(tmp_path),), nprocs=WORLD)

    model = network()
    z_a, z_b = model(torch.cat(views())).chunk(2)
    loss = nt_xent(z_a, z_b, 0.2)
    loss.backward()
    for rank in range(WORLD):
        report = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        # Rows stand in the order of the ranks; a row's gradient is the sum of what all processes say of it.
        assert report["rows"].tolist() == [[1.0] * 3] * 2 + [[2.0] * 3] * 2
        assert torch.equal(report["z"], 11 * torch.arange(12.0).view(4, 3)[2 * rank : 2 * rank + 2])
        # Two gathers that autograd hands the very same gradient do not spoil it for each other.
        assert report["a"].tolist() == report["b"].tolist() == [[[2.0, 4.0]], [[6.0, 8.0]]][rank]

        torch.testing.assert_close(report["loss"], loss.detach(), rtol=1e-5, atol=0)
        for ours, p in zip(report["gradients"], model.parameters(), strict=True):
            assert p.grad.norm() > 1e-4
            assert (ours - p.grad).norm() < 1e-5 * p.grad.norm()
