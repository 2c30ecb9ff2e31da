"""How much of the gap between an untrained student and its teacher is closed, in the purity of the ten nearest.

python benchmarks/distil.py --data clothing.zip --minutes 20
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass
from statistics import mean

import tyro

from benchmarks.result import publish
from benchmarks.vectors import averaged, quality, workplace
from training import checkpoint, zoo
from training.distil import DistilSettings, distil


@dataclass(frozen=True)
class Options:
    data: str = "shapes"
    """Labelled pictures with a test split."""
    teacher: str = "lite0"
    encoder: str = "tiny"
    """The student."""
    size_px: int = 64
    """Of the student's input."""
    minutes: float = 20.0
    """Of each training."""
    seeds: int = 3
    quick: bool = False
    """A few pictures and one epoch, to show that it runs."""


def main(options: Options) -> None:
    found: dict[str, list[dict]] = {"untrained": [], "distilled": [], "teacher": []}
    trial = {"epochs": 1} if options.quick else {"minutes": options.minutes}
    with workplace(options.data, options.quick) as data:
        teacher = zoo.load(options.teacher)
        found["teacher"].append(quality("teacher", teacher.encoder, teacher.preprocessing, data))
        for seed in range(1 if options.quick else options.seeds):
            run = distil(
                DistilSettings(
                    teacher=options.teacher,
                    encoder=options.encoder,
                    size_px=options.size_px,
                    data=data,
                    seed=seed,
                    name=f"student-{seed}",
                    **trial,
                )
            )
            saved = checkpoint.load(checkpoint.find(run))
            settings = checkpoint.settings_of(saved)
            random = zoo.build(settings.encoder, settings.width, settings.size_px)
            found["untrained"].append(quality("untrained", random, settings.preprocessing, data))
            student = checkpoint.encoder_of(saved)
            found["distilled"].append(quality("distilled", student, settings.preprocessing, data))
    rows = [{"encoder": name} | averaged(results) for name, results in found.items()]
    low, reached, high = (mean(r["purity"] for r in found[name]) for name in ("untrained", "distilled", "teacher"))
    publish("distil", rows, {"gap_closed": (reached - low) / (high - low)})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
