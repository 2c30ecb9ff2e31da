"""SimCLR from random weights on a CPU in some minutes: kNN accuracy with the training split as the bank.

python benchmarks/from_nothing.py --data clothing.zip --minutes 15
python benchmarks/from_nothing.py --data clothing.zip --epochs 267      # does not depend on other work on the machine
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass, replace
from statistics import mean
from typing import Literal

import tyro

from benchmarks.result import publish
from benchmarks.vectors import averaged, quality, workplace
from training import checkpoint, zoo
from training.config import PRESETS
from training.pretrain import pretrain


@dataclass(frozen=True)
class Options:
    data: str = "shapes"
    """Labelled pictures with a test split."""
    minutes: float = 15.0
    """Of each training."""
    epochs: int | None = None
    """Of each training, instead of --minutes."""
    width: Literal[1, 2, 4] = 2
    """Of the encoder."""
    seeds: int = 3
    quick: bool = False
    """A few pictures and two steps, to show that it runs."""


def main(options: Options) -> None:
    length = {"epochs": options.epochs} if options.epochs else {"minutes": options.minutes}
    trial = {"max_steps": 2, "epochs": 1} if options.quick else length
    preset = replace(PRESETS["tiny"][1], width=options.width, **trial)
    untrained, trained = [], []
    with workplace(options.data, options.quick) as data:
        for seed in range(1 if options.quick else options.seeds):
            random = zoo.build(preset.encoder, preset.width, preset.size_px)
            untrained.append(quality("untrained", random, preset.preprocessing, data))
            run = pretrain(replace(preset, data=data, seed=seed, name=f"nothing-{seed}"))
            encoder = checkpoint.encoder_of(checkpoint.load(checkpoint.find(run)))
            trained.append(quality("trained", encoder, preset.preprocessing, data))
    rows = [
        {"encoder": name} | averaged(results) for name, results in (("untrained", untrained), ("from nothing", trained))
    ]
    publish("from_nothing", rows, {"clothing_knn": 100 * mean(r["knn"] for r in trained)})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
