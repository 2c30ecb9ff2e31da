"""LARS against a float64 port of the published algorithm, which excludes parameters by module, not by rank."""

import copy
import functools
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from training.encoders import ResNetEncoder, projection_head
from training.lars import LARS, lars_groups
from training.schedule import warmup_cosine

STEPS, WARMUP, PEAK = 50, 10, 0.5


class Network(nn.Module):
    """A small SimCLR network with all kinds of parameters: kernels, matrices, batch norm, biases."""

    def __init__(self):
        super().__init__()
        self.encoder = ResNetEncoder("tiny", 1, 32)
        self.projector = projection_head(self.encoder.dimension, 2, 16)
        self.readout = nn.Linear(16, 5)  # with a bias of its own

    def forward(self, x):
        return self.readout(self.projector(self.encoder(x)))


def network() -> Network:
    torch.manual_seed(0)
    return Network().double()


def loss(model: nn.Module, step: int) -> torch.Tensor:
    """A float64 loss on another batch at each step. Not NT-Xent, which computes in float32."""
    generator = torch.Generator().manual_seed(step)
    x = torch.rand(6, 3, 8, 8, dtype=torch.float64, generator=generator)
    return F.cross_entropy(model(x), torch.arange(6) % 5)


def left_alone(model: nn.Module) -> set[str]:
    """Names of the parameters that lars_optimizer.py excludes: those of batch norms, and all biases."""
    names = set()
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) or name == "bias":
                names.add(f"{module_name}.{name}")
    return names


def published_step(weights, gradients, buffers, excluded, lr, momentum, weight_decay, eta):
    """One step of google-research/simclr's LARS on dictionaries of float64 arrays, in place."""
    for name, w in weights.items():
        g = gradients[name]
        trust = 1.0
        if name not in excluded:
            g = g + weight_decay * w
            w_norm, g_norm = math.sqrt((w * w).sum()), math.sqrt((g * g).sum())
            if w_norm > 0 and g_norm > 0:
                trust = eta * w_norm / g_norm
        buffers[name] = momentum * buffers[name] + lr * trust * g
        weights[name] = w - buffers[name]


@functools.cache
def published_run(weight_decay: float) -> tuple[dict, dict]:
    """Weights before and after STEPS steps of warm-up and cosine."""
    model = network()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    excluded = left_alone(model)
    weights = {name: p.detach().numpy().copy() for name, p in trained.items()}
    start = dict(weights)
    buffers = {name: np.zeros_like(w) for name, w in weights.items()}
    for step in range(STEPS):
        gradients = torch.autograd.grad(loss(model, step), list(trained.values()))
        gradients = {name: g.numpy() for name, g in zip(trained, gradients, strict=True)}
        share = step / WARMUP if step < WARMUP else math.cos(math.pi / 2 * (step - WARMUP) / (STEPS - WARMUP)) ** 2
        published_step(weights, gradients, buffers, excluded, PEAK * share, 0.9, weight_decay, 0.001)
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(torch.from_numpy(weights[name]))
    return start, weights


def train(model: nn.Module, optimizer: LARS, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = PEAK * warmup_cosine(step, WARMUP, STEPS)
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [pytest.param(0.0, marks=pytest.mark.slow), 1e-4])
def test_fifty_steps_of_warm_up_and_cosine_are_those_of_the_published_algorithm(weight_decay):
    model = network()
    train(model, LARS(lars_groups(model, weight_decay), lr=PEAK), range(STEPS))
    start, expected = published_run(weight_decay)
    ours = {name: p.detach().numpy() for name, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == expected.keys()
    for name, w in expected.items():
        assert np.linalg.norm(w - start[name]) > 1e-3 * np.linalg.norm(w), f"{name} did not train"
        assert np.linalg.norm(ours[name] - w) < 1e-6 * np.linalg.norm(w), name


@pytest.mark.slow
def test_weight_decay_makes_a_difference_that_this_tolerance_sees():
    _, without = published_run(0.0)
    _, with_decay = published_run(1e-4)
    kernels = [name for name, w in without.items() if w.ndim > 1]
    for name in kernels:
        assert np.linalg.norm(with_decay[name] - without[name]) > 1e-5 * np.linalg.norm(without[name]), name


def test_batch_norms_and_biases_neither_adapt_nor_decay():
    model = network()
    names = {id(p): name for name, p in model.named_parameters()}
    adapted, plain = lars_groups(model, 1e-4)
    assert adapted["adapt"] is True
    assert adapted["weight_decay"] == 1e-4
    assert plain["adapt"] is False
    assert plain["weight_decay"] == 0
    frozen = {"projector.4.bias"}
    assert {names[id(p)] for p in plain["params"]} == left_alone(model) - frozen
    assert {names[id(p)] for p in adapted["params"]} == set(names.values()) - left_alone(model)


def test_the_shortcuts_and_the_heads_batch_norms_are_among_them():
    model = network()
    plain = {id(p) for p in lars_groups(model, 1e-4)[1]["params"]}
    for module in (model.encoder.layer2[0].downsample[1], model.projector[1]):
        assert {id(module.weight), id(module.bias)} <= plain
    assert id(model.projector[4].weight) in plain
    assert id(model.readout.bias) in plain


def test_a_frozen_parameter_is_in_no_group():
    model = network()
    assert not model.projector[4].bias.requires_grad
    assert all(p is not model.projector[4].bias for group in lars_groups(model, 0.0) for p in group["params"])


def one_step(w, g, **settings):
    weight = nn.Parameter(torch.tensor(w, dtype=torch.float64))
    weight.grad = torch.tensor(g, dtype=torch.float64)
    LARS([weight], **settings).step()
    return weight.detach().tolist()


def test_a_step_by_hand():
    # |w| = 5, g + 0.1 w = (0.3, 1.4 - 1) = (0.3, 0.4) of norm 0.5, trust = 0.01 * 5 / 0.5 = 0.1, v = 0.2 (0.3, 0.4)
    stepped = one_step([3.0, 4.0], [0.0, 0.0], lr=2.0, weight_decay=0.1, trust=0.01)
    assert stepped == pytest.approx([3 - 0.06, 4 - 0.08], rel=1e-12)
    stepped = one_step([3.0, 4.0], [0.6, -0.8], lr=2.0, weight_decay=0.0, trust=0.01)
    assert stepped == pytest.approx([3 - 0.06, 4 + 0.08], rel=1e-12)


def test_adaptation_does_not_need_weight_decay():
    small = one_step([3.0, 4.0], [6e-5, -8e-5], lr=1.0, weight_decay=0.0)
    large = one_step([3.0, 4.0], [6e5, -8e5], lr=1.0, weight_decay=0.0)
    assert small == pytest.approx(large, rel=1e-12)


def test_weights_that_are_all_zero_move_by_plain_sgd():
    assert one_step([0.0, 0.0], [1.0, -2.0], lr=0.1, weight_decay=1e-4) == pytest.approx([-0.1, 0.2], rel=1e-12)


def test_a_gradient_that_is_all_zero_moves_nothing():
    assert one_step([3.0, 4.0], [0.0, 0.0], lr=0.1, weight_decay=0.0) == [3.0, 4.0]
    assert one_step([0.0, 0.0], [0.0, 0.0], lr=0.1, weight_decay=1e-4) == [0.0, 0.0]


def test_the_learning_rate_stays_in_the_buffer_when_it_changes():
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = LARS([{"params": [weight], "adapt": False}], lr=0.5, momentum=0.9, weight_decay=0.0)
    weight.grad = torch.tensor([1.0], dtype=torch.float64)
    optimizer.step()  # v = 0.5
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()  # v = 0.45: with the rate outside the buffer nothing would move
    assert weight.item() == pytest.approx(1 - 0.5 - 0.45, rel=1e-12)


def test_the_callers_gradients_stay_as_they_are():
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    weight.grad = torch.tensor([1.0, 2.0])
    LARS([weight], lr=1.0, weight_decay=0.1).step()
    assert weight.grad.tolist() == [1.0, 2.0]


def test_a_parameter_without_a_gradient_is_left_alone():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    used.grad = torch.ones(2)
    optimizer = LARS([used, unused], lr=1.0, weight_decay=0.1)
    optimizer.step()
    assert unused.tolist() == [1.0, 1.0]
    assert unused not in optimizer.state
    assert used[0] < 1


def test_a_closure_is_run_with_gradients_and_its_loss_returned():
    weight = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = LARS([weight], lr=1.0, weight_decay=0.0, trust=0.1)

    def closure():
        optimizer.zero_grad()
        value = (weight**2).sum()
        value.backward()
        return value

    with torch.no_grad():
        assert optimizer.step(closure).item() == 25
    assert weight.tolist() == pytest.approx([3 * 0.9, 4 * 0.9], rel=1e-12)  # |update| = 0.1 |w|, along w


def test_without_a_closure_a_step_returns_nothing():
    weight = nn.Parameter(torch.ones(2))
    assert LARS([weight], lr=1.0).step() is None


@pytest.mark.slow
def test_a_saved_optimizer_continues_to_the_bit():
    model = network()
    optimizer = LARS(lars_groups(model, 1e-4), lr=PEAK)
    train(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    restored = LARS(lars_groups(other, 0.0), lr=9.0, momentum=0.1, trust=9.0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    train(model, optimizer, range(4, 8))
    train(other, restored, range(4, 8))
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_saved_optimizer_that_is_not_loaded_would_have_differed():
    model = network()
    train(model, LARS(lars_groups(model, 1e-4), lr=PEAK), range(4))
    other = copy.deepcopy(model)
    optimizer = LARS(lars_groups(other, 1e-4), lr=PEAK)
    assert not optimizer.state  # the momentum is what the round trip carries
    train(other, optimizer, range(4, 5))
    assert all("momentum" in optimizer.state[p] for g in optimizer.param_groups for p in g["params"])


@pytest.mark.parametrize(
    "setting",
    [
        {"lr": -0.1},
        {"lr": math.nan},
        {"momentum": -0.1},
        {"momentum": 1.0},
        {"momentum": math.nan},
        {"weight_decay": -1e-4},
        {"weight_decay": math.nan},
        {"trust": 0.0},
        {"trust": -1.0},
        {"trust": math.nan},
    ],
    ids=str,
)
def test_an_argument_out_of_range_is_rejected_by_name_and_value(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"^{name} must be .*, not {value}$"):
        LARS([nn.Parameter(torch.ones(2))], **{"lr": 0.1, **setting})
