"""How much of the gap between a student's start and its teacher is closed, in the purity of the ten nearest.

The last rows are the first student and its teacher as they are served: exported, and quantised to int8.

python benchmarks/distil.py --data clothing.zip --minutes 20
python benchmarks/distil.py --data clothing.zip --minutes 20 --width 2                   # a larger student
python benchmarks/distil.py --data clothing.zip --epochs 4 --init lite0 --size-px 128    # lite0, taught by itself
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import tyro

from benchmarks.result import publish
from benchmarks.vectors import averaged, found_by, quality, workplace
from export.compare import images_per_s
from export.quantize import QuantizeSettings, quantize
from export.to_onnx import ExportSettings, export
from training import checkpoint, zoo
from training.distil import DistilSettings, distil
from training.evaluation.features import open_encoder
from training.initial import load_initial


@dataclass(frozen=True)
class Options:
    data: str = "shapes"
    """Labelled pictures with a test split."""
    teacher: str = "lite0"
    encoder: str = "tiny"
    """The student, from random weights."""
    width: int = 1
    """Of the student."""
    init: str = ""
    """An encoder of others from whose weights the student starts, instead."""
    size_px: int = 64
    """Of the student's input."""
    minutes: float = 20.0
    """Of each training."""
    epochs: int | None = None
    """Of each training, instead of --minutes."""
    seeds: int = 3
    quick: bool = False
    """A few pictures and one epoch, to show that it runs."""


def main(options: Options) -> None:
    found: dict[str, list[dict]] = {"start": [], "distilled": [], "teacher": []}
    length = {"epochs": options.epochs} if options.epochs else {"minutes": options.minutes}
    weights = {"init": options.init} if options.init else {"encoder": options.encoder, "width": options.width}
    with workplace(options.data, options.quick) as data:
        settings = DistilSettings(teacher=options.teacher, data=data, size_px=options.size_px, **weights)
        settings = replace(settings, **({"epochs": 1} if options.quick else length))
        teacher = zoo.load(options.teacher)
        found["teacher"].append(quality("teacher", teacher.encoder, teacher.preprocessing, data))
        for seed in range(1 if options.quick else options.seeds):
            run = distil(replace(settings, seed=seed, name=f"student-{seed}"))
            saved = checkpoint.load(checkpoint.find(run))
            seen = checkpoint.settings_of(saved).preprocessing
            start = load_initial(settings.init, settings.encoder, settings.width, settings.size_px, seed).encoder
            found["start"].append(quality("start", start, seen, data))
            found["distilled"].append(quality("distilled", checkpoint.encoder_of(saved, result=True), seen, data))
        rows = [{"encoder": name} | averaged(results) for name, results in found.items()]
        rows += [*served("student-0", Path("runs/student-0"), data), *served("teacher", options.teacher, data)]
    low, reached, high = (mean(r["purity"] for r in found[name]) for name in ("start", "distilled", "teacher"))
    publish("distil", rows, {"gap_closed": (reached - low) / (high - low)})


def served(name: str, source: str | Path, data: str) -> Iterator[dict]:
    """Size, speed and quality of an encoder's exported graph, in float32 and in int8."""
    folder = Path(f"{name}-fp32")
    bundles = [export(ExportSettings(str(source), out=folder))[0], quantize(QuantizeSettings(folder, data=data))]
    graphs = {bundle.card.precision: bundle.graph.read_bytes() for bundle in bundles}
    rates = images_per_s(graphs, bundles[0].card.preprocessing.size_px)
    for bundle in bundles:
        precision = bundle.card.precision
        found = found_by(open_encoder(str(bundle.folder)), data)
        figures = {measure: f"{value:.1%}" for measure, value in found.items()}
        size = {"MB": len(graphs[precision]) / 1e6, "images/s": round(rates[precision])}
        yield {"encoder": f"{name}, {precision}"} | figures | size


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
