"""What shortened vectors lose: kNN accuracy of the first half, quarter and eighth of h, with and without --matryoshka.

python benchmarks/matryoshka.py --data clothing.zip --epochs 100
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
from training import checkpoint
from training.config import PRESETS
from training.encoders import shortened
from training.pretrain import pretrain


@dataclass(frozen=True)
class Options:
    data: str = "shapes"
    """Labelled pictures with a test split."""
    epochs: int = 20
    """Of each training."""
    seeds: int = 3
    quick: bool = False
    """A few pictures and two steps, to show that it runs."""


def main(options: Options) -> None:
    trial = {"max_steps": 2, "epochs": 1} if options.quick else {"epochs": options.epochs}
    found: dict[tuple[bool, int], list[dict]] = {}
    with workplace(options.data, options.quick) as data:
        for seed in range(1 if options.quick else options.seeds):
            for nested in (False, True):
                settings = replace(PRESETS["tiny"][1], data=data, seed=seed, matryoshka=nested, **trial)
                run = pretrain(replace(settings, name=f"{'nested' if nested else 'plain'}-{seed}"))
                encoder = checkpoint.encoder_of(checkpoint.load(checkpoint.find(run)))
                for length in (encoder.dimension, *shortened(encoder.dimension)):
                    row = quality(run.name, encoder, settings.preprocessing, data, length)
                    found.setdefault((nested, length), []).append(row)
    rows = [
        {"matryoshka": "yes" if nested else "no", "length": length} | averaged(results)
        for (nested, length), results in found.items()
    ]
    knn = {key: 100 * mean(result["knn"] for result in results) for key, results in found.items()}
    lengths = sorted({length for _, length in found})
    lost = {nested: knn[nested, lengths[-1]] - knn[nested, lengths[0]] for nested in (False, True)}
    publish(
        "matryoshka", rows, {"points_lost_at_an_eighth_without": lost[False], "points_lost_at_an_eighth": lost[True]}
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
