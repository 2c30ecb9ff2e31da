"""A generated picture set with known factors, on which it can be measured what an encoder keeps and discards.

Ten classes differ by outline only. Colour, orientation, scale, position, texture and background are drawn
independently of the class, so none of them helps to distinguish the classes.

    train/<class>/00000.png ...   test/<class>/00000.png ...   factors.csv

factors.csv has one row per picture:

    split, name, class        train or test; path below the folder, '/'-separated; the outline
    hue, saturation, value    of the object, each in [0, 1]
    orientation_deg           [0, 360) counter-clockwise; meaningless for disc and ring
    scale                     diameter of the circle around the outline, relative to the side of the picture
    x, y                      centre of that circle from the left and from the top, relative to the side
    texture                   of the object: plain, stripes, dots, checks
    background                plain, gradient, noise
    background_hue, background_saturation, background_value
"""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

SCALE = (0.55, 0.9)
"""Range of the uniform scale of the object."""
MARGIN = 0.02
"""Least distance of the circle around the outline from the border, relative to the side; positions are uniform."""
ORIENTATION_DEG = (0.0, 360.0)
OBJECT_SATURATION = (0.35, 0.9)
OBJECT_VALUE = (0.3, 1.0)
BACKGROUND_SATURATION = (0.08, 0.6)
BACKGROUND_VALUE = (0.2, 1.0)
LEAST_CONTRAST = 0.22
"""Least difference in luma (0 to 1) between object and background, so that outlines are visible in grey too."""
TEXTURES = ("plain", "stripes", "dots", "checks")
TEXTURE_CONTRAST = (0.12, 0.3)
"""Share by which a texture darkens the object's colour."""
TEXTURE_PERIOD = (0.3, 0.6)
"""Relative to the object's radius."""
BACKGROUNDS = ("plain", "gradient", "noise")
GRADIENT_CONTRAST = 0.25
"""The brightness at the ends of a gradient is 1 plus and minus this."""
NOISE_CONTRAST = 0.09
"""Standard deviation of the noise's brightness."""
NOISE_CELLS = 9
"""Cells of the smooth noise along each side."""

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
NUMBERS = ("hue", "saturation", "value", "orientation_deg", "scale", "x", "y")
NUMBERS += ("background_hue", "background_saturation", "background_value")
COLUMNS = ("split", "name", "class", *NUMBERS[:7], "texture", "background", *NUMBERS[7:])
BATCH = 50  # pictures drawn at once, so that the arrays fit into the processor's cache


Plane = np.ndarray  # float32 (N, S, S), one value per pixel

# Outlines: signed distance at points (x, y) with y up, negative inside; each fills a circle of radius 1.


def _box(x: Plane, y: Plane, half_width: float, half_height: float) -> Plane:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _folded(x: Plane, y: Plane, sectors: int) -> tuple[Plane, Plane]:
    """Points folded into one of `sectors` equal sectors, which is mirror-symmetric about the axis y = 0, x > 0."""
    half = np.float32(np.pi / sectors)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    angle = np.abs((angle + half) % (2 * half) - half)
    return radius * np.cos(angle), radius * np.sin(angle)


def _disc(x: Plane, y: Plane) -> Plane:
    return np.hypot(x, y) - 0.95


def _ring(x: Plane, y: Plane) -> Plane:
    return np.abs(np.hypot(x, y) - 0.76) - 0.22


def _square(x: Plane, y: Plane) -> Plane:
    return _box(x, y, 0.74, 0.74)


def _triangle(x: Plane, y: Plane) -> Plane:
    across, _ = _folded(-x, y, 3)  # one side crosses the axis of each sector
    return across - 0.5


def _star(x: Plane, y: Plane) -> Plane:
    along, aside = _folded(x, y, 5)
    inner = 0.42 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)], np.float32)  # an edge runs from (1, 0) to here
    normal = np.array([inner[1], 1 - inner[0]], np.float32)
    normal /= np.hypot(*normal)
    return (along - 1) * normal[0] + aside * normal[1]


def _cross(x: Plane, y: Plane) -> Plane:
    return np.minimum(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95))


def _crescent(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.hypot(x, y) - 0.98, 0.8 - np.hypot(x - 0.45, y))


def _heart(x: Plane, y: Plane) -> Plane:
    side = 0.55  # half the side of a square standing on a corner, with a disc on each upper side
    y = y + 0.17
    diagonal = _box((x + y) / np.sqrt(2, dtype=np.float32), (x - y) / np.sqrt(2, dtype=np.float32), side, side)
    lobe = np.hypot(np.abs(x) - side / np.sqrt(2), y - side / np.sqrt(2)) - side
    return np.minimum(diagonal, lobe)


def _arrow(x: Plane, y: Plane) -> Plane:
    shaft = _box(x + 0.42, y, 0.55, 0.2)
    slope = np.float32(np.hypot(0.78, 1.0))
    head = np.maximum(0.0 - x, (np.abs(y) + 0.78 * (x - 1)) / slope)
    return np.minimum(shaft, head)


def _gear(x: Plane, y: Plane) -> Plane:
    radius = np.hypot(x, y)
    along, aside = _folded(x, y, 8)
    tooth = np.maximum(along - 0.98, aside - 0.15)
    return np.maximum(np.minimum(radius - 0.74, tooth), 0.3 - radius)


OUTLINES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "arrow": _arrow,
    "crescent": _crescent,
    "cross": _cross,
    "disc": _disc,
    "gear": _gear,
    "heart": _heart,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}


def make(folder: Path, train: int = 6000, test: int = 1000, size_px: int = 64, seed: int = 0) -> None:
    """Draw the set into `folder`: `train` and `test` pictures of size_px x size_px, the classes in equal shares.

    The same arguments give the same pictures. raises OSError when they cannot be written
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        open(folder / "factors.csv", "w", newline="", encoding="utf-8") as table,
        tqdm(total=train + test, desc="drawing shapes", unit="img") as bar,
    ):
        rows = csv.writer(table)
        rows.writerow(COLUMNS)
        for number, (split, count) in enumerate((("train", train), ("test", test))):
            rng = np.random.default_rng([seed, number])
            drawn = _draw_factors(rng, split, count)
            rows.writerows(zip(*(drawn[column].tolist() for column in COLUMNS), strict=True))
            for kind in OUTLINES:
                (folder / split / kind).mkdir(parents=True, exist_ok=True)
                members = np.flatnonzero(drawn["class"] == kind)
                for batch in np.split(members, range(BATCH, len(members), BATCH)):
                    values = {column: column_values[batch] for column, column_values in drawn.items()}
                    for name, pixels in zip(values["name"], _render(rng, kind, values, size_px), strict=True):
                        Image.fromarray(pixels).save(folder / name, compress_level=1)
                    bar.update(len(batch))


def factors(folder: Path) -> dict[str, np.ndarray]:
    """The columns of factors.csv, each with one entry per picture: float64 for numbers, otherwise str."""
    with open(Path(folder) / "factors.csv", newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    return {
        column: np.array([row[column] for row in rows], dtype=np.float64 if column in NUMBERS else np.str_)
        for column in COLUMNS
    }


def _draw_factors(rng: np.random.Generator, split: str, count: int) -> dict[str, np.ndarray]:
    """Every column of factors.csv for `count` pictures, each (count,)."""
    kinds = np.array(list(OUTLINES))[np.arange(count) % len(OUTLINES)]
    scale = rng.uniform(*SCALE, count)
    room = np.maximum(1 - scale - 2 * MARGIN, 0)
    drawn = {
        "split": np.full(count, split),
        "name": np.array([f"{split}/{kind}/{i:05d}.png" for i, kind in enumerate(kinds)], dtype=np.str_),
        "class": kinds,
        "orientation_deg": rng.uniform(*ORIENTATION_DEG, count),
        "scale": scale,
        "x": 0.5 + room * rng.uniform(-0.5, 0.5, count),
        "y": 0.5 + room * rng.uniform(-0.5, 0.5, count),
        "texture": rng.choice(TEXTURES, count),
        "background": rng.choice(BACKGROUNDS, count),
    }
    colours = np.empty((count, 6))
    missing = np.arange(count)
    while len(missing):  # draw both colours again until their contrast is large enough
        n = len(missing)
        ranges = ((0, 1), OBJECT_SATURATION, OBJECT_VALUE, (0, 1), BACKGROUND_SATURATION, BACKGROUND_VALUE)
        colours[missing] = np.stack([rng.uniform(low, high, n) for low, high in ranges], axis=1)
        object_luma, background_luma = (_rgb(*colours[missing, at : at + 3].T) @ LUMA for at in (0, 3))
        missing = missing[np.abs(object_luma - background_luma) < LEAST_CONTRAST]
    columns = ("hue", "saturation", "value", "background_hue", "background_saturation", "background_value")
    return drawn | dict(zip(columns, colours.T, strict=True))


def _render(rng: np.random.Generator, kind: str, drawn: dict[str, np.ndarray], size_px: int) -> np.ndarray:
    """uint8 (N, S, S, 3) of N pictures of one class."""

    def column(values: np.ndarray) -> np.ndarray:
        return np.asarray(values, np.float32)[:, None, None]  # (N, 1, 1)

    n = len(drawn["name"])
    centre = (np.arange(size_px, dtype=np.float32) + 0.5) / size_px
    right = (centre[None, None, :] - column(drawn["x"])) * 2 / column(drawn["scale"])
    up = (column(drawn["y"]) - centre[None, :, None]) * 2 / column(drawn["scale"])
    x, y = _turned(right, up, column(np.deg2rad(drawn["orientation_deg"])))  # (N, S, S), object coordinates in radii
    pixel = 2 / (column(drawn["scale"]) * size_px)
    inside = np.clip(0.5 - OUTLINES[kind](x, y) / pixel, 0, 1)  # share of the pixel that the object covers

    turn, period = column(rng.uniform(0, np.pi, n)), column(rng.uniform(*TEXTURE_PERIOD, n))
    u, v = _turned(x, y, turn)
    ink = _texture(drawn["texture"], u / period, v / period, pixel / period)
    shade = 1 - ink * column(rng.uniform(*TEXTURE_CONTRAST, n))  # (N, S, S)

    light = 1 + _unevenness(rng, drawn["background"], centre)  # (N, S, S)
    object_colour = _rgb(drawn["hue"], drawn["saturation"], drawn["value"])[:, None, None, :]
    background = _rgb(drawn["background_hue"], drawn["background_saturation"], drawn["background_value"])
    background = np.clip(light[..., None] * background[:, None, None, :], 0, 1)
    inside = inside[..., None]
    picture = inside * (shade[..., None] * object_colour) + (1 - inside) * background
    return (picture * 255 + 0.5).astype(np.uint8)


def _turned(x: Plane, y: Plane, angle: Plane) -> tuple[Plane, Plane]:
    """Coordinates of the same points in a frame turned counter-clockwise by `angle` (radians)."""
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _texture(kinds: np.ndarray, u: Plane, v: Plane, pixel: Plane) -> Plane:
    """Amount of ink in [0, 1] at (u, v), given in periods; `pixel`: width of a pixel in periods. (N, S, S)"""
    ink = np.zeros(np.broadcast_shapes(u.shape, v.shape), np.float32)
    for kind in ("stripes", "dots", "checks"):
        selected = kinds == kind
        a, b = (
            np.abs((plane[selected] % 1) - 0.5) - 0.25 for plane in (u, v)
        )  # distance from the edge of a stripe, negative inside
        width = pixel[selected]
        if kind == "dots":
            a = np.hypot(a + 0.25, b + 0.25) - 0.32
        stripe_a, stripe_b = (np.clip(0.5 - plane / width, 0, 1) for plane in (a, b))
        ink[selected] = stripe_a + stripe_b - 2 * stripe_a * stripe_b if kind == "checks" else stripe_a
    return ink


def _unevenness(rng: np.random.Generator, kinds: np.ndarray, centre: np.ndarray) -> Plane:
    """Relative brightness added to the background by gradients and noise. (N, S, S)"""
    light = np.zeros((len(kinds), len(centre), len(centre)), np.float32)
    selected = np.flatnonzero(kinds == "gradient")
    angle = rng.uniform(0, 2 * np.pi, len(selected)).astype(np.float32)[:, None, None]
    along = (centre[:, None] - 0.5) * np.sin(angle) + (centre[None, :] - 0.5) * np.cos(angle)
    light[selected] = along * np.float32(2 * GRADIENT_CONTRAST)

    selected = np.flatnonzero(kinds == "noise")
    cells = rng.normal(0, NOISE_CONTRAST, (len(selected), NOISE_CELLS, NOISE_CELLS)).astype(np.float32)
    away = centre[:, None] * NOISE_CELLS - 0.5 - np.arange(NOISE_CELLS)  # (S, cells), in cells
    weight = np.exp(-(away**2) / (2 * 0.6**2)).astype(np.float32)
    weight /= np.hypot.reduce(
        weight, axis=1, keepdims=True
    )  # with a sum of squares of 1 the standard deviation is kept
    light[selected] = weight @ cells @ weight.T
    return light


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """HSV to RGB, each (N,) in [0, 1] -> (N, 3) float32."""
    k = (np.array([5, 3, 1]) + np.asarray(hue)[:, None] * 6) % 6
    dip = np.clip(np.minimum(k, 4 - k), 0, 1)
    return (np.asarray(value)[:, None] * (1 - np.asarray(saturation)[:, None] * dip)).astype(np.float32)
