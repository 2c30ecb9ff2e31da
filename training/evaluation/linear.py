r"""Linear classification of cached features: how well straight borders between the features h separate the classes.

fit    multinomial logistic regression by L-BFGS on standardised features, to the optimum of
       mean cross-entropy + decay / 2 |W|^2          (scikit-learn's C is 1 / (N decay); the bias is not decayed)
sweep  choose `decay` by the accuracy on a held-out part, then fit to all
sgd    the published recipe (arXiv:2002.05709, App. B.9): Nesterov SGD on h as it is, 0.1 batch / 256, cosine,
       100 epochs, batch 512, no decay, from zero; but without crops and flips, for which features would have to be
       computed in every epoch: `finetune.py --preset linear` has those.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.schedule import cosine_schedule, scaled_lr

DECAYS = tuple(10.0**power for power in range(1, -7, -1))  # strongest first
ITERATIONS = 300
AXES_MOST = 4096  # most features for principal axes, which then take about ten seconds on two cores
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
    """Features with mean 0 and standard deviation 1, and their principal axes: computed once, for any labels and decay.

    h  (N, d) float32
    """

    def __init__(self, h: Tensor) -> None:
        self.mean, scale = h.mean(dim=0), h.std(dim=0, correction=0)
        self.scale = torch.where(scale > 1e-6 * scale.max(), scale, 1.0)  # constant features are not scaled
        self.x = (h - self.mean) / self.scale
        self.variances, self.axes = principal_axes(self.x)

    def fit(self, labels: Tensor, decay: float) -> Linear:
        """labels (N,) int64 from 0 to C - 1, each present; decay > 0, otherwise raises ValueError.

        L-BFGS would take five times as many steps, often more than ITERATIONS, since the curvature differs between
        directions as much as the variance of features. So it optimises u with weight = axes u / sqrt(curvature), for
        which the curvature is about the same in all directions.
        """
        if not decay > 0:
            raise ValueError(f"decay must be above 0, not {decay}")
        classes = int(labels.max()) + 1
        curvature = (classes - 1) / classes**2 * self.variances + decay  # (d,) at equal probabilities
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
    """Variances (d,) of x (N, d) along its principal axes, and these axes as columns (d, d).

    With d above N or AXES_MOST: ones, and None for the axes, so that the features themselves are used.
    """
    n, d = x.shape
    if d > min(n, AXES_MOST):
        return torch.ones(d), None
    variances, axes = torch.linalg.eigh(x.T @ x / n)
    return variances.clamp(min=0), axes


def fit(h: Tensor, labels: Tensor, decay: float) -> Linear:
    """h (N, d) float32; labels and decay as in `Standardised.fit`."""
    return Standardised(h).fit(labels, decay)


def sweep(
    h: Tensor, labels: Tensor, kept: Tensor, held: Tensor, decays: tuple[float, ...] = DECAYS
) -> tuple[Linear, float, dict[float, float]]:
    """Choose the decay by accuracy, with ties going to the strongest, then fit all of h.

    kept, held  rows of h to fit, and rows to measure the accuracy on
    returns     the fit to all of h, its decay, and the accuracy of each decay
    """
    accuracies: dict[float, float] = {}
    features = Standardised(h[kept])
    for decay in decays:
        fitted = features.fit(labels[kept], decay)
        accuracies[decay] = (fitted.predict(h[held]) == labels[held]).float().mean().item()
    best = max(accuracies, key=accuracies.__getitem__)
    return fit(h, labels, best), best, accuracies


def sgd(h: Tensor, labels: Tensor, seed: int = 0) -> Linear:
    """The published recipe. h and labels as in `fit`."""
    n, classes = len(h), int(labels.max()) + 1
    weight, bias = torch.zeros(h.shape[1], classes, requires_grad=True), torch.zeros(classes, requires_grad=True)
    batch = min(SGD_BATCH, n)
    lr = scaled_lr(SGD_LR, batch, "linear")
    optimizer = torch.optim.SGD([weight, bias], lr=lr, momentum=0.9, nesterov=True)
    scheduler = cosine_schedule(optimizer, 0.0, SGD_EPOCHS * (n // batch))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(SGD_EPOCHS):
        for rows in torch.randperm(n, generator=generator)[: n // batch * batch].split(batch):
            F.cross_entropy(h[rows] @ weight + bias, labels[rows]).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return Linear(torch.zeros(h.shape[1]), torch.ones(h.shape[1]), weight.detach(), bias.detach())
