"""How soon it is noticed that a camera has changed, and how often a false alarm is given, by serving/curation/drift.py.

    python benchmarks/drift.py --data clothing.zip --encoder lite0

The pictures are divided at random, each time in another way, into a collection and what comes; no picture is in both.
Others are changed as a camera may change: in colour, blurred, or cropped. A comparison is made after every 100
pictures, as the service does.
`detected_within` is the largest number of changed pictures until the alarm, over all changes and repeats;
`false_alarm_share` is the share of weeks of 5,000 unchanged pictures with an alarm.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import tyro
from PIL import Image, ImageFilter

from benchmarks.result import publish
from benchmarks.vectors import workplace
from export.artifact import preprocess, read_image
from serving.collection.items import unit
from serving.curation.drift import ALARM, REFERENCE, WINDOW, Reference
from serving.drift import EVERY
from training.data import shapes
from training.data.sources import SourcePicture, open_source
from training.evaluation.features import open_encoder

WEEK = 5_000  # pictures
ENDS = range(WINDOW, WEEK + 1, EVERY)  # pictures that have come at each comparison
SAME = "same"
QUICK_ENCODER, QUICK_PX, QUICK_PICTURES = "resnet18:random", 48, 2_500


def colour(image: Image.Image) -> Image.Image:
    """A tenth more red, 15 % less blue."""
    cast = np.asarray(image, np.float32) * np.array([1.1, 1, 0.85], np.float32)
    return Image.fromarray(cast.clip(0, 255).astype(np.uint8))


def blur(image: Image.Image) -> Image.Image:
    """Gaussian, sigma 1 % of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(min(image.size) / 100))


def crop(image: Image.Image) -> Image.Image:
    """The middle 80 % of each side."""
    width, height = image.size
    return image.crop((round(0.1 * width), round(0.1 * height), round(0.9 * width), round(0.9 * height)))


CAMERAS: dict[str, Callable[[Image.Image], Image.Image]] = {
    SAME: lambda image: image,
    "colour": colour,
    "blur": blur,
    "crop": crop,
}


@dataclass(frozen=True)
class Options:
    data: str = "shapes"
    """Pictures, as pretrain.py reads them."""
    encoder: str = "lite0"
    """Encoder, as evaluate.py takes it."""
    most: int = 10_000
    """Most pictures; 500 of them are changed."""
    weeks: int = 200
    collections: int = 20
    """Divisions of the pictures; each collection is sent one stream of each change, and an equal share of the weeks."""
    quick: bool = False
    """Shapes instead of the data, and an untrained encoder."""


def main(options: Options) -> None:
    h, cameras = vectors(options)
    rng = np.random.default_rng(0)
    count = min(options.collections, 5) if options.quick else options.collections
    divided = [np.array_split(rng.permutation(len(h)), 2) for _ in range(count)]
    references = [Reference(h[there][:REFERENCE], seed) for seed, (there, _) in enumerate(divided)]
    coming = [h[rows] for _, rows in divided]
    rows, slowest = [], 0.0
    for camera, changed in cameras.items():
        streams = [noticed(reference, new, changed, rng) for reference, new in zip(references, coming, strict=True)]
        counts = sorted(count for count, _ in streams)
        row = {"camera": camera, "noticed": f"{np.isfinite(counts).sum()} of {len(counts)}"}
        row |= {"after pictures": median(counts), "at most": counts[-1]}
        rows.append(row | {"distance of 500": median(distance for _, distance in streams)})
        if camera != SAME:
            slowest = max(slowest, counts[-1])
    features = [reference.features(new).astype(np.float64) for reference, new in zip(references, coming, strict=True)]
    weeks = [week(references[i % count], features[i % count], rng) for i in range(options.weeks)]
    p_values = np.array(weeks)  # (weeks, comparisons)
    alarms = (p_values < ALARM).any(axis=1)
    shares = {f"p_below_{level:g}": float((p_values < level).mean()) for level in (0.1, 0.01, 0.001)}
    figures = {"least_p": float(p_values.min()), **shares}
    publish("drift", rows, figures | {"detected_within": slowest, "false_alarm_share": float(alarms.mean())})


def vectors(options: Options) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns h of unchanged pictures (n, d), and by camera h of WINDOW other pictures (500, d); rows of length 1."""
    extractor = open_encoder(QUICK_ENCODER, QUICK_PX) if options.quick else open_encoder(options.encoder)
    with workplace(options.data, options.quick) as data:
        if options.quick:
            data = "many"
            shapes.make(Path(data), train=QUICK_PICTURES, test=1, size_px=QUICK_PX)
        pictures = open_source(data).pictures
        most = min(options.most, QUICK_PICTURES if options.quick else len(pictures))
        if most < 3 * WINDOW:  # changed, the collection, what comes
            raise SystemExit(f"error: {data} has {most:,} pictures, and at least {3 * WINDOW:,} are needed")
        chosen = [pictures[row] for row in np.random.default_rng(0).permutation(len(pictures))[:most]]

        def encoded(chosen: list[SourcePicture], change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
            pixels = [preprocess(change(read_image(picture.read())), extractor.preprocessing) for picture in chosen]
            return unit(extractor(np.stack(pixels)).numpy())

        new = {camera: encoded(chosen[:WINDOW], change) for camera, change in CAMERAS.items()}
        return encoded(chosen[WINDOW:], CAMERAS[SAME]), new


def noticed(
    reference: Reference, new: np.ndarray, changed: np.ndarray, rng: np.random.Generator
) -> tuple[float, float]:
    """Returns after how many changed pictures the alarm is given, infinite for never, and the distance of all.

    The change comes between two comparisons, when WINDOW unchanged pictures have come.
    """
    since = rng.integers(EVERY)  # unchanged pictures since the last comparison
    stream = np.concatenate([rng.permutation(new)[:WINDOW], rng.permutation(changed)])
    last = reference.compare(changed).distance
    for count in range(EVERY - since, WINDOW + 1, EVERY):
        if reference.compare(stream[count : WINDOW + count]).differs:
            return float(count), last
    return float("inf"), last


def week(reference: Reference, features: np.ndarray, rng: np.random.Generator) -> list[float]:
    """Returns the p-values of a week of pictures: those with these features (n, D), in another order in each round."""
    rounds = [rng.permutation(len(features)) for _ in range(-(-WEEK // len(features)))]
    sums = features[np.concatenate(rounds)[:WEEK]].cumsum(axis=0)
    means = [(sums[end - 1] - (sums[end - WINDOW - 1] if end > WINDOW else 0)) / WINDOW for end in ENDS]
    return [reference.compare_mean(mean, WINDOW).p_value for mean in means]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
