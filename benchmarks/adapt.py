"""What adapting an encoder of others gains: kNN accuracy after it minus before, at the size of training and at another.

python benchmarks/adapt.py --data clothing.zip --minutes 30
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass, replace
from statistics import mean

import tyro

from benchmarks.result import publish
from benchmarks.vectors import averaged, quality, workplace
from export.artifact import Preprocessing
from training import checkpoint, zoo
from training.config import PRESETS
from training.pretrain import pretrain


@dataclass(frozen=True)
class Options:
    data: str = "shapes"
    """Labelled pictures with a test split."""
    init: str = "lite0"
    """The encoder that is adapted."""
    minutes: float = 30.0
    """Of each training."""
    sizes_px: tuple[int, ...] = (128, 224)
    """Sizes at which the pictures are seen; the first is that of training."""
    seeds: int = 3
    quick: bool = False
    """A few pictures at 64 px and two steps, to show that it runs."""


def main(options: Options) -> None:
    sizes = (64,) if options.quick else options.sizes_px
    trial = {"max_steps": 2, "head_first": 1, "epochs": 1} if options.quick else {"minutes": options.minutes}
    found: dict[tuple[str, int], list[dict]] = {}
    with workplace(options.data, options.quick) as data:
        for px in sizes:
            start = zoo.load(options.init, px)
            found["start", px] = [quality("start", start.encoder, start.preprocessing, data)]
        for seed in range(1 if options.quick else options.seeds):
            preset = replace(PRESETS["adapt"][1], init=options.init, data=data, size_px=sizes[0], **trial)
            run = pretrain(replace(preset, seed=seed, name=f"adapted-{seed}"))
            encoder = checkpoint.encoder_of(checkpoint.load(checkpoint.find(run)))
            for px in sizes:
                crop = zoo.load(options.init, px).preprocessing.crop
                row = quality("adapted", encoder, Preprocessing(px, crop), data)
                found.setdefault(("adapted", px), []).append(row)
    rows = [{"encoder": name, "size_px": px} | averaged(results) for (name, px), results in found.items()]
    gains = {}
    for px in sizes:
        start, adapted = (mean(r["knn"] for r in found[name, px]) for name in ("start", "adapted"))
        gains[px] = 100 * (adapted - start)
    figures = {f"adapted_minus_start_points_{px}_px": gain for px, gain in gains.items()}
    publish("adapt", rows, figures | {"adapted_minus_start_points": gains[sizes[0]]})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
