"""What adapting an encoder of others gains: kNN accuracy after it minus before, at the size of training and at another.

python benchmarks/adapt.py --data clothing.zip --minutes 30
python benchmarks/adapt.py --data clothing.zip --epochs 5      # does not depend on other work on the machine

The row `half-way` has the mean of the weights before and after (Wortsman et al. 2022, Robust fine-tuning of zero-shot
models).
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from copy import deepcopy
from dataclasses import dataclass, replace
from statistics import mean

import tyro
from torch import nn

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
    epochs: int | None = None
    """Of each training, instead of --minutes."""
    sizes_px: tuple[int, ...] = (128, 224)
    """Sizes at which the pictures are seen; the first is that of training."""
    seeds: int = 3
    quick: bool = False
    """A few pictures at 64 px and two steps, to show that it runs."""


def main(options: Options) -> None:
    sizes = (64,) if options.quick else options.sizes_px
    length = {"epochs": options.epochs} if options.epochs else {"minutes": options.minutes}
    trial = {"max_steps": 2, "head_first": 1, "epochs": 1} if options.quick else length
    found: dict[tuple[str, int], list[dict]] = {}
    with workplace(options.data, options.quick) as data:
        starts = {px: zoo.load(options.init, px) for px in sizes}
        for px, start in starts.items():
            found["start", px] = [quality("start", start.encoder, start.preprocessing, data)]
        for seed in range(1 if options.quick else options.seeds):
            preset = replace(PRESETS["adapt"][1], init=options.init, data=data, size_px=sizes[0], **trial)
            run = pretrain(replace(preset, seed=seed, name=f"adapted-{seed}"))
            adapted = checkpoint.encoder_of(checkpoint.load(checkpoint.find(run)), result=True)
            encoders = {"adapted": adapted, "half-way": half_way(starts[sizes[0]].encoder, adapted)}
            for px, start in starts.items():
                for name, encoder in encoders.items():
                    row = quality(name, encoder, Preprocessing(px, start.preprocessing.crop), data)
                    found.setdefault((name, px), []).append(row)
    rows = [{"encoder": name, "size_px": px} | averaged(results) for (name, px), results in found.items()]
    gains = {
        (name, px): 100 * (mean(r["knn"] for r in results) - found["start", px][0]["knn"])
        for (name, px), results in found.items()
        if name != "start"
    }
    figures = {f"{name}_minus_start_points_{px}_px".replace("-", "_"): gain for (name, px), gain in gains.items()}
    publish("adapt", rows, figures | {"adapted_minus_start_points": gains["adapted", sizes[0]]})


def half_way(start: nn.Module, end: nn.Module) -> nn.Module:
    """A copy of `end` with the mean of the weights of both."""
    between, weights = deepcopy(end), start.state_dict()
    mixed = {
        name: value.lerp(weights[name].to(value), 0.5) if value.is_floating_point() else value
        for name, value in end.state_dict().items()
    }
    between.load_state_dict(mixed)
    return between


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
