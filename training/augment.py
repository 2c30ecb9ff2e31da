r"""SimCLR's augmentation of a batch, each image with its own draws (Chen et al. 2020, arXiv:2002.05709, App. A).

`draw` makes all random numbers, `render` is a pure function of images and these numbers, `augment` does both.

    crop    resample the crop [start, start + length) to size_px with an antialiased bicubic filter. Per axis this is
            a matrix, so a batch of different crops is two batched matrix products, on any device.
    flip    part of the same matrix, as are flips upside down; a quarter turn is a flip and a transposition
    rotate  by any angle, bilinear, borders reflected
    gamma   intensities to a power
    jitter  brightness, contrast, saturation, hue in random order, clipped to [0, 1] after each
    grey    three equal channels
    blur    Gaussian, borders reflected; also a matrix per axis

The operations are torchvision's (contrast blends with the mean grey, saturation with the pixel's grey: the PyTorch
listing of App. A), brightness multiplies (v2). No mean/std normalisation: the encoder's input is in [0, 1]. Flips
upside down, rotations and gamma are not the paper's; they are for pictures without an upright position, such as aerial
ones, and for the intensities of scans and microscopes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CROP_ATTEMPTS = 10
TENSORFLOW_LEAST_AREA = 0.1  # its min_object_covered, which limits crop_area too
BLUR_SIGMA = (0.1, 2.0)
GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision rounds them
BICUBIC = -0.5  # Keys' a, as in Pillow and in torch's antialiased resize


@dataclass(frozen=True)
class AugmentSettings:
    """Random changes that make a view of a picture. The defaults are those of the paper for photographs."""

    crop_area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the picture's area in a crop."""
    crop_sampling: Literal["torchvision", "tensorflow"] = "torchvision"
    """How crops are drawn. torchvision: area uniformly and aspect ratio log-uniformly; tensorflow (as in
    google-research/simclr): height and aspect ratio uniformly, which gives larger crops."""
    crop_aspect: float = 4 / 3
    """Largest ratio of the sides of a crop, one way or the other; 1: square crops, which change the scale alone."""
    flip: float = 0.5
    """Probability of a left-right flip. Use 0 where mirror images have different meanings."""
    vertical_flip: float = 0.0
    """Probability of an upside-down flip, for pictures without an upright position."""
    quarter_turns: float = 0.0
    """Probability of a turn by 90, 180 or 270 degrees; 0.75 makes all four positions equally frequent."""
    rotation: float = 0.0
    """Largest angle of a free rotation, in degrees; 180 for any. Borders are reflected."""
    gamma: float = 0.0
    """Intensities from 0 to 1 are raised to a power between 1 / (1 + gamma) and 1 + gamma."""
    jitter: float = 0.8
    """Probability of colour jitter."""
    strength: float = 1.0
    """Strength s of the jitter: brightness, contrast and saturation vary by 0.8 s, hue by 0.2 s of its circle."""
    grey: float = 0.2
    """Probability of conversion to grey."""
    blur: float = 0.5
    """Probability of a Gaussian blur of sigma 0.1 to 2 pixels, with an odd kernel of about a tenth of the side."""

    def __post_init__(self):
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_area must satisfy 0 < smallest <= largest <= 1, not {self.crop_area}")
        if self.crop_sampling not in ("torchvision", "tensorflow"):
            raise ValueError(f"crop_sampling must be torchvision or tensorflow, not {self.crop_sampling!r}")
        for name in ("flip", "vertical_flip", "quarter_turns", "jitter", "grey", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability in [0, 1], not {getattr(self, name)}")
        if not 0 <= self.strength <= 2.5:
            raise ValueError(f"strength must be in [0, 2.5], not {self.strength}")  # hue: at most half a circle
        if not 1 <= self.crop_aspect <= 10:
            raise ValueError(f"crop_aspect must be in [1, 10], not {self.crop_aspect}")
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation is an angle in [0, 180] degrees, not {self.rotation}")
        if not 0 <= self.gamma <= 10:
            raise ValueError(f"gamma must be in [0, 10], not {self.gamma}")


class Draws(NamedTuple):
    """The random numbers of N views, all on one device."""

    top: Tensor  # (N,) crop box in pixels, whole numbers
    left: Tensor  # (N,)
    height: Tensor  # (N,)
    width: Tensor  # (N,)
    flip: Tensor  # (N,) bool
    brightness: Tensor  # (N,) factors; 1 leaves the image as it is
    contrast: Tensor  # (N,)
    saturation: Tensor  # (N,)
    hue: Tensor  # (N,) shift in turns; 0 leaves the image as it is
    blend_order: Tensor  # (N, 3) permutation of brightness 0, contrast 1, saturation 2
    hue_place: Tensor  # (N,) how many of the three come before hue: 0 to 3
    grey: Tensor  # (N,) bool
    sigma: Tensor  # (N,) of the blur in pixels; 0 for none
    vertical_flip: Tensor | None = None  # (N,) bool; None, like the following: for no view
    transpose: Tensor | None = None  # (N,) bool, after the flips
    angle: Tensor | None = None  # (N,) of the free rotation, anticlockwise, in radians
    power: Tensor | None = None  # (N,) of the intensities

    def map(self, function: Callable[[Tensor], Tensor]) -> "Draws":
        """function of each tensor."""
        return self._replace(**{name: function(value) for name, value in self._asdict().items() if value is not None})


def generator_at(device: torch.device | str, seed: int, step: int, process: int = 0) -> torch.Generator:
    """The random numbers of a training step of a process: three whole numbers from 0, in 64 mixed bits.

    Mixed, since a CPU's generator keeps the low 32 bits of a seed only.
    """
    (mixed,) = np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(mixed))


def augment(images: Tensor, settings: AugmentSettings, generator: torch.Generator, size_px: int) -> Tensor:
    """One view of each image.

    images     (N, H, W, 3) uint8 RGB, on the generator's device
    generator  the only source of random numbers: same state, same views
    returns    (N, 3, size_px, size_px) float32 in [0, 1]
    """
    n, height, width, _ = images.shape
    return render(images, draw(n, height, width, settings, generator), size_px)


def draw(n: int, height: int, width: int, settings: AugmentSettings, generator: torch.Generator) -> Draws:
    """The random numbers for n views of images of height x width pixels."""

    def uniform(low: float = 0.0, high: float = 1.0, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator, device=generator.device)

    def happens(probability: float) -> Tensor:
        return uniform() < probability

    crop = _draw_crop(uniform, height, width, settings)
    flip = happens(settings.flip)
    jittered = happens(settings.jitter)
    delta = 0.8 * settings.strength
    brightness, contrast, saturation = (
        torch.where(jittered, uniform(max(0.0, 1 - delta), 1 + delta), 1.0) for _ in range(3)
    )
    hue = torch.where(jittered, uniform(-0.2 * settings.strength, 0.2 * settings.strength), 0.0)
    draws = Draws(
        *crop,
        flip,
        brightness,
        contrast,
        saturation,
        hue,
        blend_order=uniform(0, 1, 3).argsort(dim=1),
        hue_place=(4 * uniform()).long(),
        grey=happens(settings.grey),
        sigma=torch.where(happens(settings.blur), uniform(*BLUR_SIGMA), 0.0),
    )
    vertical_flip = happens(settings.vertical_flip) if settings.vertical_flip else torch.zeros_like(flip)
    if settings.quarter_turns:
        turns = torch.where(happens(settings.quarter_turns), 1 + (3 * uniform()).long(), 0)  # anticlockwise, 0 to 3
        transpose = turns % 2 == 1
        # Flips before a transposition: one of left and right makes it a turn to the left, of up and down to the right.
        draws = draws._replace(flip=flip ^ (turns == 1) ^ (turns == 2), transpose=transpose)
        vertical_flip = vertical_flip ^ (turns == 2) ^ (turns == 3)
    if settings.vertical_flip or settings.quarter_turns:
        draws = draws._replace(vertical_flip=vertical_flip)
    if settings.rotation:
        draws = draws._replace(angle=uniform(-math.radians(settings.rotation), math.radians(settings.rotation)))
    if settings.gamma:
        greatest = math.log(1 + settings.gamma)
        draws = draws._replace(power=uniform(-greatest, greatest).exp())
    return draws


def render(images: Tensor, draws: Draws, size_px: int) -> Tensor:
    """Apply the draws: images (N, H, W, 3) uint8 -> (N, 3, size_px, size_px) float32 in [0, 1], also under autocast."""
    with torch.autocast(images.device.type, enabled=False):
        return _render(images, draws, size_px)


def _render(images: Tensor, draws: Draws, size_px: int) -> Tensor:
    _, height, width, _ = images.shape
    rows = _resampling(draws.top, draws.height, height, size_px)  # (N, S, H)
    columns = _resampling(draws.left, draws.width, width, size_px)  # (N, S, W)
    columns = torch.where(draws.flip[:, None, None], columns.flip(1), columns)
    if draws.vertical_flip is not None:
        rows = torch.where(draws.vertical_flip[:, None, None], rows.flip(1), rows)
    x = images.permute(0, 3, 1, 2).float() / 255  # (N, 3, H, W)
    x = _both_axes(x, rows, columns).clamp_(0, 1)
    if draws.transpose is not None:
        x = torch.where(draws.transpose[:, None, None, None], x.mT, x)
    if draws.angle is not None:
        x = _rotated(x, draws.angle)
    if draws.power is not None:
        x = x ** draws.power[:, None, None, None]
    x = _jitter(x, draws)
    x = torch.where(draws.grey[:, None, None, None], _luminance(x), x)
    blur = _blurring(draws.sigma, size_px)  # (N, S, S)
    return _both_axes(x, blur, blur).clamp_(0, 1)  # a sum of rounded weights may exceed 1


def _both_axes(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply a matrix to each axis of each image: (N, 3, H, W), (N, S, H), (N, S, W) -> (N, 3, S, S)."""
    n, channels, height, width = x.shape
    x = (x.reshape(n, channels * height, width) @ columns.mT).view(n, channels, height, -1)  # (N, 3, H, S)
    x = rows @ x.transpose(1, 2).reshape(n, height, -1)  # (N, S, 3S)
    return x.view(n, x.shape[1], channels, -1).transpose(1, 2)


def _rotated(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate about the middle: (N, 3, S, S), angle (N,) in radians, anticlockwise -> (N, 3, S, S)."""
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    to_source = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(to_source, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def _draw_crop(
    uniform: Callable[..., Tensor], height: int, width: int, settings: AugmentSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """top, left, height, width (N,): the first of CROP_ATTEMPTS crops that fits, else the fallback of that library."""
    least, greatest = (share * height * width for share in settings.crop_area)
    narrowest, widest = 1 / settings.crop_aspect, settings.crop_aspect
    if settings.crop_sampling == "torchvision":
        area = uniform(least, greatest, CROP_ATTEMPTS)
        aspect = uniform(math.log(narrowest), math.log(widest), CROP_ATTEMPTS).exp()
        h, w = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
        fits = (h >= 1) & (w >= 1) & (h <= height) & (w <= width)
        # the largest central crop with an aspect ratio in range
        fallback = min(height, round(width / narrowest)), min(width, round(height * widest))
    else:
        aspect = uniform(narrowest, widest, CROP_ATTEMPTS)
        fitting = ((width + 0.5 - 1e-7) / aspect).floor()  # the greatest height whose rounded width fits
        tallest = (greatest / aspect).sqrt().round().minimum(fitting).clamp(max=height)
        shortest = (least / aspect).sqrt().round().minimum(tallest)
        h = shortest + (uniform(0, 1, CROP_ATTEMPTS) * (tallest - shortest + 1)).floor()
        area = h * (h * aspect).round()
        h = h + (area < least).float() - (area > greatest).float()  # where rounding moved the area out of its range
        w = (h * aspect).round()
        area = h * w
        covers = area >= TENSORFLOW_LEAST_AREA * height * width
        fits = (h <= height) & (w <= width) & (area >= least) & (area <= greatest) & covers
        fallback = height, width
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)  # (N, 1)
    any_fits = fits.any(dim=1)
    h = torch.where(any_fits, h.gather(1, first)[:, 0], fallback[0])
    w = torch.where(any_fits, w.gather(1, first)[:, 0], fallback[1])
    top = torch.where(any_fits, (uniform() * (height - h + 1)).floor(), (height - fallback[0]) // 2)
    left = torch.where(any_fits, (uniform() * (width - w + 1)).floor(), (width - fallback[1]) // 2)
    return top, left, h, w


def _resampling(start: Tensor, length: Tensor, old_px: int, new_px: int) -> Tensor:
    """Matrices (N, new_px, old_px) that resample [start, start + length) of an axis, antialiased bicubic."""
    old = torch.arange(old_px, device=start.device)[None, None]  # (1, 1, old)
    new = torch.arange(new_px, device=start.device)[None, :, None]  # (1, new, 1)
    start, length = start[:, None, None], length[:, None, None]
    scale = length / new_px
    t = (old + 0.5 - start - (new + 0.5) * scale) / scale.clamp(min=1)  # the filter widens when shrinking
    t = t.abs()
    near = ((BICUBIC + 2) * t - (BICUBIC + 3)) * t * t + 1
    far = BICUBIC * (((t - 5) * t + 8) * t - 4)
    weight = torch.where(t < 1, near, torch.where(t < 2, far, 0.0))
    weight = torch.where((old >= start) & (old < start + length), weight, 0.0)  # nothing from outside the crop
    return weight / weight.sum(dim=2, keepdim=True)


def _blurring(sigma: Tensor, size_px: int) -> Tensor:
    """Matrices (N, size_px, size_px) of a Gaussian blur with reflected borders; the identity where sigma is 0.

    Each is a weighted sum of the same matrices, which shift by -radius to radius pixels.
    """
    radius, last = (size_px // 10) // 2, size_px - 1
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    i = torch.arange(size_px, device=sigma.device)
    source = i + offset[:, None]  # (2r + 1, S)
    source = last - (last - source.abs()).abs()  # mirrored at the borders without repeating the border pixel
    shifts = (source[:, :, None] == i).float()  # (2r + 1, S, S)
    weights = torch.exp(-0.5 * (offset / sigma.clamp(min=1e-3)[:, None]) ** 2)  # (N, 2r + 1)
    weights = weights / weights.sum(dim=1, keepdim=True)
    return (weights @ shifts.flatten(1)).view(-1, size_px, size_px)


def _jitter(x: Tensor, draws: Draws) -> Tensor:
    """Blends before the hue shift, the hue shift, blends after it.

    No branch depends on the values drawn, so nothing waits for the device and everything compiles into few kernels.
    """
    factors = torch.stack([draws.brightness, draws.contrast, draws.saturation], dim=1)  # (N, 3)
    factors = factors.gather(1, draws.blend_order)
    for place in range(3):
        x = _blend(x, draws.blend_order[:, place], torch.where(place < draws.hue_place, factors[:, place], 1.0))
    x = shift_hue(x, draws.hue)
    for place in range(3):
        x = _blend(x, draws.blend_order[:, place], torch.where(place < draws.hue_place, 1.0, factors[:, place]))
    return x


def _blend(x: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from black (kind 0), the mean luminance (1) or the pixel's luminance (2) by (N,) factors."""
    kind, factor = (values[:, None, None, None] for values in (kind, factor))
    luminance = _luminance(x)
    mean = luminance.mean(dim=(2, 3), keepdim=True)
    other = torch.where(kind == 1, mean, torch.where(kind == 2, luminance, 0.0))  # (N, 1, H, W)
    return torch.lerp(other.expand_as(x), x, factor).clamp_(0, 1)


def _luminance(x: Tensor) -> Tensor:
    """(N, 3, H, W) RGB -> (N, 1, H, W)."""
    red, green, blue = GREY_WEIGHTS
    return (x[:, :1] * red).add_(x[:, 1:2], alpha=green).add_(x[:, 2:], alpha=blue)


def grey(x: Tensor) -> Tensor:
    """(N, 3, H, W) RGB -> the same shape with three equal channels."""
    return _luminance(x).expand_as(x)


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of (N, 3, H, W) RGB in [0, 1] by (N,) turns of the circle, in HSV."""
    r, g, b = x.unbind(dim=1)
    value, chroma = x.amax(dim=1), x.amax(dim=1) - x.amin(dim=1)
    hue = torch.where(value == r, g - b, torch.where(value == g, b - r, r - g)) / chroma.clamp(min=1e-12)
    hue = hue + torch.where(value == r, 0.0, torch.where(value == g, 2.0, 4.0)) + 6 * turns[:, None, None]
    hue = hue - 6 * (hue / 6).floor()  # in sixths of the circle, [0, 6)
    red = (hue - 3).abs_().sub_(1)
    green = (hue - 2).abs_().neg_().add_(2)
    blue = (hue - 4).abs_().neg_().add_(2)
    # Each channel's share of the chroma, 1 within a sixth of its own hue and 0 opposite.
    return torch.stack([value - chroma * (1 - share.clamp_(0, 1)) for share in (red, green, blue)], dim=1)
