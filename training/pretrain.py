"""Pretrain an encoder with SimCLR (Chen et al. 2020, arXiv:2002.05709) into runs/NAME.

    python training/pretrain.py --data ~/Pictures --minutes 15

The step itself is in training/simclr.py. This file opens the pictures, prepares or resumes the run, and trains.

    runs/NAME/  config.json  metrics.csv  report.png  skipped.csv  checkpoints/last.ckpt  and what --logger writes
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataclasses
import json
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from export.suggest import command
from training import budget, checkpoint, memory, report, zoo
from training.augment import AugmentSettings
from training.budget import Budget, process_began
from training.checkpoint import AtomicCheckpointIO, CheckpointError, EveryEpoch
from training.config import PRESETS, RUNS, PretrainSettings, parse
from training.data import stream
from training.data.mixture import open_mixture
from training.data.sources import DataError, Source, with_test_split
from training.data.store import PixelStore
from training.data.stream import Stream
from training.device import bfloat16_pays, prepare, training_device
from training.evaluation import judge, knn, words
from training.evaluation.features import sampled_sizes, size_note
from training.initial import InitialWeights, load_initial
from training.progress import RunBar
from training.run_folder import CONFIG, other_setting, write_folder
from training.simclr import SimCLR
from training.trackers import check_tracker, trackers
from training.watch import RunProblem, Watch
from training.zoo import check_architecture

ADAPTING_STEPS = 28  # of f by the preset adapt, at least: two epochs of 3,409 pictures after --head-first (RECORDS.md)
LEAST_STEPS, LEAST_BATCH = 10, 32  # of an epoch; smallest batch that is made for it
COMPILE_FROM_STEPS, COMPILE_FROM_MIN = 2000, 5.0  # shortest run compiled on a CPU, where compiling takes half a minute
HOW_TO_RESUME = "Run the same command with --resume to continue."


class Stopped(Exception):
    """The user stopped the run. The message says how to resume it."""


def pretrain(settings: PretrainSettings, began: float | None = None) -> Path:
    """Train or resume a run and write its report. Returns the run's folder.

    began   when the time of --minutes began, on budget.clock; by default now
    raises  DataError, CheckpointError, ValueError; Stopped after Ctrl-C
    """
    began = budget.clock() if began is None else began
    prepare()
    check_tracker(settings.logger)
    devices, nodes = processes(settings)
    source, mixture = open_mixture(settings.data, settings.also)
    if source.layout:
        print(f"{settings.data}: {source.layout}")
    settings = dataclasses.replace(settings, name=settings.name or f"{source.name}-{settings.preset}")
    run = RUNS / settings.name
    settings, saved, start = resolve_settings(settings, run, source, devices * nodes)
    judged = bool(settings.init) and (saved is None or bool(saved.get("start")))  # older runs did not keep their start
    train, test = open_pictures(settings, source, judged)
    settings = check_batch(settings, mixture.images_per_epoch(train), devices * nodes)
    settings = enough_epochs(settings, mixture.images_per_epoch(train))
    if saved:
        if saved["facts"]["images"] != len(train.pixels):
            raise CheckpointError(
                f"{run} was trained on {saved['facts']['images']:,} images and {settings.data} now has "
                f"{len(train.pixels):,}: give another --name"
            )
        if saved["facts"].get("epochs") == settings.epochs or "stopped" in saved["facts"]:
            print(f"{run} is finished: {knn.sentence(saved['facts']['before'], saved['facts']['after'])}")
            return run
    elif not started_by_first():
        settings = widen_crops(settings, source)
        if settings.compile is None:
            compiles = compiling_pays(settings, mixture.images_per_epoch(train))
            settings = dataclasses.replace(settings, compile=compiles)
    module = SimCLR(settings, train, test, start, mixture)
    module.judged = judged
    module.budget = Budget(settings.minutes, began, saved and saved["facts"].get("budget"))
    write_folder(run, module)
    fit(module, run, bool(saved), devices, nodes)
    if module.global_rank == 0:
        report.write(run / report.NAME, module)
        print(f"{module.budget.outcome()}: {knn.sentence(module.facts['before'], module.facts['after'])}")
        for sentence in outcomes(module.facts):
            print(sentence)
        print(f"report with curves, pairs of views and nearest neighbours: {run.absolute() / report.NAME}")
        if is_better(module.facts):
            print(f"next: {command('export/to_onnx.py', run)}")
    return run


def outcomes(facts: dict[str, Any]) -> Iterator[str]:
    """What a user should know about how the run ended."""
    if "stopped" in facts:
        yield facts["stopped"]
    if average := facts.get("average"):
        kept = "the average of the weights" if average["better"] else "the weights of the last step"
        yield f"kept {kept}: the average measured {average['average']:.1%}, the last step {average['last']:.1%}"
    if "verdict" in facts:
        yield f"the result is {facts['verdict']['sentence']}"
    else:
        yield words.trained(facts["before"], facts["after"])[1]


def is_better(facts: dict[str, Any]) -> bool:
    """Whether training made the encoder better for certain, by the labels, or without any by its verdict."""
    if "verdict" in facts and "knn" not in facts["after"]:
        return facts["verdict"]["better"]
    return words.trained(facts["before"], facts["after"])[0]


def processes(settings: PretrainSettings) -> tuple[int, int]:
    """Processes on each machine, one for each GPU, and machines. torchrun decides if it started this process."""
    if by_torchrun():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    return settings.devices or max(1, torch.cuda.device_count()), 1


def by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def started_by_first() -> bool:
    """Whether the first process of this machine has started this one, with the same command line."""
    return int(os.environ.get("LOCAL_RANK", 0)) > 0 and not by_torchrun()


def resolve_settings(
    settings: PretrainSettings, run: Path, source: Source, world: int
) -> tuple[PretrainSettings, dict | None, InitialWeights | None]:
    """The run's settings; the checkpoint that it resumes from, or None; the weights of --init, or None.

    raises  CheckpointError: the run exists and --resume was not given, or it has other settings
    """
    if started_by_first():  # which has written its settings
        settings = PretrainSettings.from_dict(json.loads((run / CONFIG).read_text()) | {"resume": True})
    last = run / "checkpoints" / checkpoint.NAME
    if last.exists():
        if not settings.resume:
            raise CheckpointError(f"{run} already contains a run: continue it with --resume, or give another --name")
        saved = checkpoint.load(last)
        if "optimizer_states" not in saved:
            raise CheckpointError(f"{run} is not a pretraining run: start from it with --init {run} and another --name")
        facts = saved["facts"]
        batch_size = largest_batch(settings, facts.get("images_per_epoch", facts["images"]), world)
        settings = dataclasses.replace(settings, batch_size=batch_size)
        return resumed_settings(settings, checkpoint.settings_of(saved), run), saved, None
    settings, start = dataclasses.replace(settings, resume=False), None
    if settings.init:
        settings, start = starting_point(settings)
        if note := size_note(settings.init, settings.size_px, source.pictures):
            print(f"note: {note}")
    else:
        check_architecture(settings.encoder, settings.width)
    return settings, None, start


def resumed_settings(requested: PretrainSettings, saved: PretrainSettings, run: Path) -> PretrainSettings:
    """A resumed run's own settings. The requested ones must be equal to them or to the preset's defaults.

    raises  CheckpointError
    """
    defaults = PRESETS[requested.preset][1]
    may_differ = {"name", "resume", "max_steps", "devices"} | ({"epochs"} if saved.minutes else set())
    for field in dataclasses.fields(requested):
        name = field.name
        value, own = getattr(requested, name), getattr(saved, name)
        if name not in may_differ and value not in (own, getattr(defaults, name)):
            raise CheckpointError(other_setting(run, name, own, value))
    return dataclasses.replace(saved, max_steps=requested.max_steps, devices=requested.devices)


def starting_point(requested: PretrainSettings) -> tuple[PretrainSettings, InitialWeights]:
    """The settings with the architecture and size of --init, unless others than the preset's are given; its weights.

    raises  like load_initial
    """
    defaults, names = PRESETS[requested.preset][1], ("encoder", "width", "size_px")
    encoder, width, size_px = (
        None if (value := getattr(requested, name)) == getattr(defaults, name) else value for name in names
    )
    if defaults.init:  # a preset for weights of others has a size of its own
        size_px = requested.size_px
    start = load_initial(requested.init, encoder, width, size_px, requested.seed)
    names = (*names, "whiten") if requested.whiten == defaults.whiten else names
    settings = dataclasses.replace(requested, **{name: getattr(start.settings, name) for name in names})
    if settings != requested:
        whitened = f", whitened by {settings.whiten:g}" if settings.whiten else ""
        print(f"this run is {settings.architecture} at {settings.size_px} px{whitened}, like {requested.init}")
    return settings, start


def open_pictures(
    settings: PretrainSettings, source: Source, judged: bool
) -> tuple[PixelStore | Stream, PixelStore | Stream | None]:
    """The training split, and the test split or None. raises DataError.

    judged  hold out a test split, if there is none, for pictures by which the result is compared with its start
    """
    preprocessing, test = settings.preprocessing, None
    if judged:
        given, source = source, with_test_split(source, judge.PICTURES, settings.seed)
        if source is not given:
            held_out = sum(picture.split == "test" for picture in source.pictures)
            print(f"{held_out:,} of {len(source):,} pictures are held out, to compare the result with {settings.init}")
    train = stream.load(source, preprocessing, "train", stream=settings.stream)
    if any(picture.split == "test" for picture in source.pictures):
        test = stream.load(source, preprocessing, "test", stream=settings.stream)
    return train, test


def widen_crops(settings: PretrainSettings, source: Source) -> PretrainSettings:
    """Widen the default aspects of crops by the spread of the pictures' own, if these are squeezed into a square."""
    if settings.crop is not None or settings.augment.crop_aspect != AugmentSettings.crop_aspect:
        return settings
    aspects = np.array([width / height for width, height in sampled_sizes(source.pictures)] or [1.0])
    narrow, wide = np.quantile(aspects, [0.05, 0.95])
    aspect = round(min(AugmentSettings.crop_aspect * math.sqrt(wide / narrow), 10), 2)
    if aspect <= AugmentSettings.crop_aspect:
        return settings
    print(f"crops have sides of up to {aspect} to 1, as the squeezed pictures have sides of {narrow:.2f} to {wide:.2f}")
    return dataclasses.replace(settings, augment=dataclasses.replace(settings.augment, crop_aspect=aspect))


def check_batch(settings: PretrainSettings, images: int, world: int) -> PretrainSettings:
    """Reduce the batch size to the number of images.

    raises  DataError for a single image, ValueError for a batch that the processes cannot share equally
    """
    if images < 2:
        raise DataError(
            f"{settings.data} has 1 picture that can be read; SimCLR compares pictures and needs at least 2"
        )
    if (most := largest_batch(settings, images, world)) < settings.batch_size:
        steps = "" if images < settings.batch_size else f", and an epoch should have at least {LEAST_STEPS} steps"
        print(f"batch size {settings.batch_size} -> {most}: {settings.data} has only {images:,} pictures{steps}")
        settings = dataclasses.replace(settings, batch_size=most)
    if settings.batch_size % world or settings.batch_size < 2 * world:
        raise ValueError(
            f"--batch-size {settings.batch_size} cannot be shared by {world} processes: give a multiple of {world}, "
            "with at least 2 images per process"
        )
    return settings


def enough_epochs(settings: PretrainSettings, images: int) -> PretrainSettings:
    """More epochs of the preset adapt for few images, so that f is trained for ADAPTING_STEPS after g has been."""
    preset = PRESETS["adapt"][1]
    if settings.preset != preset.preset or settings.epochs != preset.epochs or settings.minutes:
        return settings
    epochs = math.ceil((settings.head_first + ADAPTING_STEPS) / (images // settings.batch_size))
    return dataclasses.replace(settings, epochs=max(settings.epochs, epochs))


def largest_batch(settings: PretrainSettings, images: int, world: int) -> int:
    """The batch size, reduced for few images to the same number in every process: a preset's to a tenth of the images
    and at least LEAST_BATCH, another to all images."""
    size = settings.batch_size
    if size == PRESETS[settings.preset][1].batch_size:
        size = min(size, max(LEAST_BATCH, images // LEAST_STEPS))
    size = min(size, images)
    return size if size == settings.batch_size else size // world * world


def compiling_pays(settings: PretrainSettings, images: int) -> bool:
    if torch.cuda.is_available():
        return True
    if settings.minutes:
        return settings.minutes >= COMPILE_FROM_MIN
    return settings.epochs * (images // settings.batch_size) >= COMPILE_FROM_STEPS


def fit(module: SimCLR, run: Path, resume: bool, devices: int, nodes: int) -> None:
    """Train to the last epoch, or until the time is over; with `resume` from the run's checkpoint. raises Stopped."""
    settings, total_steps = module.settings, module.settings.epochs * module.steps_per_epoch
    length = f"{settings.epochs} epoch{'s' * (settings.epochs > 1)}, {total_steps:,} steps"
    if settings.minutes:
        length, total_steps = f"{settings.minutes:g} min in all, in steps", 0
    print(
        f"{'continuing' if resume else 'pretraining'} {settings.architecture} on {module.facts['images']:,} images at "
        f"{settings.size_px} px: {length} of {settings.batch_size} images, into "
        f"{run}"
    )
    gpu = torch.cuda.is_available()
    last = run / "checkpoints" / checkpoint.NAME
    if gpu and devices * nodes > 1:
        module.encoder = zoo.synchronised(module.encoder)
        module.projector = zoo.synchronised(module.projector)
    trainer = pl.Trainer(
        default_root_dir=run,
        accelerator="auto",
        devices=devices,
        num_nodes=nodes,
        # DDP would wait for the gradients of f, which has none while only g is trained
        strategy="ddp_find_unused_parameters_true" if settings.head_first and devices * nodes > 1 else "auto",
        precision="bf16-mixed" if bfloat16_pays(training_device(), module) else "32-true",
        max_epochs=-1 if settings.minutes else settings.epochs,
        max_steps=settings.max_steps or -1,
        logger=trackers(settings.logger, run, settings.to_dict()),
        log_every_n_steps=50,  # writing the loss waits for the device
        callbacks=[
            RunBar(total_steps, settings.batch_size),
            Watch(round(settings.warmup * total_steps)),
            EveryEpoch(last, settings.keep_every),
        ],
        plugins=[AtomicCheckpointIO()],
        enable_model_summary=False,
    )
    with memory.explained(module, settings.batch_size // (devices * nodes)):
        trainer.fit(module, ckpt_path=last if resume else None)
    epochs = len(module.history)
    if trainer.should_stop and epochs < module.settings.epochs and "stopped" not in module.facts:
        about = "about " if settings.minutes else ""
        raise Stopped(f"Stopped after {epochs} of {about}{module.settings.epochs} epochs. {HOW_TO_RESUME}")


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    sys.exit(f"error: stopped by SIGTERM, which launchers send when another process has ended. {HOW_TO_RESUME}")


def main() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # hides its tips and device listings
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # only the first process prints
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        pretrain(parse(), process_began())
    except (DataError, CheckpointError, RunProblem, ValueError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        sys.exit(f"error: another process of this run has ended. {HOW_TO_RESUME}")
    except Stopped as stopped:
        print(stopped)
        sys.exit(130)
    except KeyboardInterrupt:  # before the first epoch
        print("\nStopped. The decoded pictures are kept.")
        sys.exit(130)


if __name__ == "__main__":
    main()
