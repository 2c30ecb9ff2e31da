r"""Linear classification of cached features: how much of the labels h holds for whoever may draw straight borders.

fit    multinomial logistic regression by L-BFGS on standardised features, to the optimum of
       mean cross-entropy + decay / 2 |W|^2          (scikit-learn's C is 1 / (N decay); the bias is free)
sweep  `decay` by the accuracy on a held-out part, then fit to all
sgd    the published recipe (arXiv:2002.05709, App. B.9): Nesterov SGD on h as it is, 0.1 batch / 256, cosine,
       100 epochs, batch 512, no decay, from zero. Without its crops and flips, which would want features anew in
       every epoch: `finetune.py --preset linear` has those.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.schedule import scaled_lr, warmup_cosine

DECAYS = tuple(10.0**power for power in range(1, -7, -1))  # from strong to weak
ITERATIONS = 300
AXES_MOST = 4096  # features: some ten seconds on two cores
SGD_LR, SGD_BATCH, SGD_EPOCHS = 0.1, 512, 100


@dataclass(frozen=True)
class Linear:
    """Logits of h (N, d): (h - mean) / scale @ weight + bias."""

    mean: Tensor  # (d,)
    scale: Tensor  # (d,)
    weight: Tensor  # (d, C)
    bias: Tensor  # (C,)

    def __call__(self, h: Tensor) -> Tensor:
        return ((h - self.mean) / self.scale) @ self.weight + self.bias

    def predict(self, h: Tensor) -> Tensor:
        """(N, d) -> (N,) int64."""
        return self(h).argmax(dim=1)


class Standardised:
    """Features with mean 0 and deviation 1, and the axes along which they vary: found once, for any labels and decay.

    h  (N, d) float32
    """

    def __init__(self, h: Tensor):
        self.mean, scale = h.mean(dim=0), h.std(dim=0, correction=0)
        self.scale = torch.where(scale > 1e-6 * scale.max(), scale, 1.0)  # a feature that never changes says nothing
        self.x = (h - self.mean) / self.scale
        self.variances, self.axes = principal_axes(self.x)

    def fit(self, labels: Tensor, decay: float) -> Linear:
        """labels (N,) int64 from 0 to C - 1, each of them there; decay > 0.

        L-BFGS takes five times as many steps, and often more than ITERATIONS, where directions differ in curvature as
        features do in variance. So it moves u, of weight = axes u / sqrt(curvature), in which all are about alike.
        """
        if not decay > 0:
            raise ValueError(f"decay must be above 0, not {decay}")
        classes = int(labels.max()) + 1
        curvature = (classes - 1) / classes**2 * self.variances + decay  # (d,) where all classes are equally likely
        u, bias = torch.zeros(len(curvature), classes, requires_grad=True), torch.zeros(classes, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [u, bias],
            max_iter=ITERATIONS,
            tolerance_grad=1e-6,
            tolerance_change=1e-9,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def weight() -> Tensor:
            along = u / curvature.sqrt()[:, None]
            return along if self.axes is None else self.axes @ along  # (d, C)

        def loss() -> Tensor:
            optimizer.zero_grad()
            w = weight()
            value = F.cross_entropy(self.x @ w + bias, labels) + decay / 2 * w.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return Linear(self.mean, self.scale, weight().detach(), bias.detach())


def principal_axes(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x (N, d) -> its variances (d,) along its axes, and these as columns (d, d).

    No axes, so that each feature is one, where d is above N or above AXES_MOST.
    """
    n, d = x.shape
    if d > min(n, AXES_MOST):
        return torch.ones(d), None
    variances, axes = torch.linalg.eigh(x.T @ x / n)
    return variances.clamp(min=0), axes


def fit(h: Tensor, labels: Tensor, decay: float) -> Linear:
    """h (N, d) float32; labels and decay as of `Standardised.fit`."""
    return Standardised(h).fit(labels, decay)


def sweep(
    h: Tensor, labels: Tensor, kept: Tensor, held: Tensor, decays: tuple[float, ...] = DECAYS
) -> tuple[Linear, float, dict[float, float]]:
    """kept, held  places in h that are fitted and asked about; of equal accuracies the strongest decay wins.

    returns  what is fitted to all of h, its decay, and the accuracy of each
    """
    accuracies, known = {}, Standardised(h[kept])
    for decay in decays:
        fitted = known.fit(labels[kept], decay)
        accuracies[decay] = (fitted.predict(h[held]) == labels[held]).float().mean().item()
    best = max(accuracies, key=accuracies.get)
    return fit(h, labels, best), best, accuracies


def sgd(h: Tensor, labels: Tensor, seed: int = 0) -> Linear:
    """The published recipe. h and labels as of `fit`."""
    n, classes = len(h), int(labels.max()) + 1
    weight, bias = torch.zeros(h.shape[1], classes, requires_grad=True), torch.zeros(classes, requires_grad=True)
    batch = min(SGD_BATCH, n)
    lr = scaled_lr(SGD_LR, batch, "linear")
    optimizer = torch.optim.SGD([weight, bias], lr=lr, momentum=0.9, nesterov=True)
    total = SGD_EPOCHS * (n // batch)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, 0, total))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(SGD_EPOCHS):
        for rows in torch.randperm(n, generator=generator)[: n // batch * batch].split(batch):
            F.cross_entropy(h[rows] @ weight + bias, labels[rows]).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return Linear(torch.zeros(h.shape[1]), torch.ones(h.shape[1]), weight.detach(), bias.detach())
