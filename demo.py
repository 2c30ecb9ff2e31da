"""From a folder of images to a search page: runs the commands of the README one after the other.

    make demo DATA=~/Pictures

Results of earlier steps are reused, so that a second call opens the page at once.
"""

import contextlib
import hashlib
import io
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import tyro
from PIL import Image

from serving.client import Client, ServiceError
from training.data.sources import DataError, open_source

READY_S = 120


@dataclass(frozen=True)
class DemoSettings:
    """Pretrain on your images, export, index, and open a search page on them."""

    data: str = "shapes"
    """A folder of images, a .zip of one, 'shards/*.tar', a torchvision name such as cifar10, or shapes."""
    minutes: float = 2.0
    """Minutes of pretraining. The default is for a first look; longer training gives better results."""
    port: int = 3000
    """Port of the page, which is reachable from this machine only."""
    check: bool = False
    """Stop after one successful upload and search."""


def demo(settings: DemoSettings) -> None:
    refuse_used_port(settings.port)
    source = open_source(settings.data)
    say(f"1/4 Pretraining on {len(source.pictures):,} pictures of {source.name}, about {settings.minutes:g} min.")
    name = run_name(settings.data, source.name)
    run(
        *("training/pretrain.py", "--data", settings.data, "--name", name),
        *("--minutes", str(settings.minutes), "--resume"),
    )
    say("2/4 Exporting the encoder to ONNX, without the projection head.")
    run("export/to_onnx.py", f"runs/{name}")
    say("3/4 Embedding the pictures and indexing them.")
    encoder = Path("runs") / name / "encoder"
    run("serving/bulk.py", "--data", settings.data, "--encoder", str(encoder))
    say("4/4 Starting the service and the page.")
    serve(settings, encoder)


def run_name(data: str, name: str) -> str:
    """Name of the run, different for folders of equal names."""
    if not Path(data).expanduser().exists():
        return f"demo-{name}"
    return f"demo-{name}-{hashlib.sha256(str(Path(data).expanduser().resolve()).encode()).hexdigest()[:6]}"


def say(sentence: str) -> None:
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold}{sentence}{plain}", flush=True)


def run(*command: str) -> None:
    print("$ python", shlex.join(command), flush=True)
    process = subprocess.Popen([sys.executable, *command])
    while process.poll() is None:
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C reaches the command too, and ends it
            process.wait()
    if process.returncode:
        sys.exit(process.returncode)


def refuse_used_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            sys.exit(f"error: port {port} cannot be used ({error}); choose another: make demo PORT={port % 60000 + 1}")


def serve(settings: DemoSettings, encoder: Path) -> None:
    """Run `bentoml serve` until Ctrl-C, or until the check is done."""
    bentoml = shutil.which("bentoml", path=str(Path(sys.executable).parent)) or "bentoml"
    command = [bentoml, "serve", "--host", "127.0.0.1", "--port", str(settings.port)]
    print(f"$ TWINVIEW_ENCODER={encoder}", shlex.join(["bentoml", *command[1:]]), flush=True)
    environment = {**os.environ, "TWINVIEW_ENCODER": str(encoder), "BENTOML_DO_NOT_TRACK": "True"}
    address = f"http://127.0.0.1:{settings.port}"
    service = subprocess.Popen(command, env=environment)
    try:
        client = Client(address)
        wait_until_ready(client, service)
        say(f"Your search page: {address}/ui/   (Ctrl-C stops it)")
        if settings.check:
            check(client, address)
        else:
            service.wait()
    except KeyboardInterrupt:
        print("\nStopping.")
    finally:
        if service.poll() is None:
            service.send_signal(signal.SIGTERM)
        service.wait(timeout=30)


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


def check(client: Client, address: str) -> None:
    """Upload a picture, search for it, and open the page."""
    picture = Image.open(io.BytesIO(client.thumbnail(client.items(limit=1).items[0].id)))
    results = client.search(image=picture, k=5).results
    if not results:
        sys.exit("error: the search for an indexed picture returned no results")
    print(
        f"The search by an uploaded picture returned {len(results)} results, the best with {results[0].similarity:.3f}."
    )
    page = httpx.get(f"{address}/ui/", follow_redirects=True)
    if page.status_code != 200 or "gradio" not in page.text.lower():
        sys.exit(f"error: the page answered with status {page.status_code}")
    print("The page opens. Check passed.")


def main() -> None:
    settings = tyro.cli(DemoSettings)
    os.chdir(Path(__file__).resolve().parent)
    try:
        demo(settings)
    except DataError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped. Finished steps are kept; run the same command again to continue.")


if __name__ == "__main__":
    main()
