"""`pip install twinview`: the wheel where there is no checkout."""

import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from serving.client import Client

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")
SERVICE_GB = 1.5  # of an installation without extras; the README says "about 1.3 GB"
# Runs `twinview` from the folder of the first argument, as if the checkout were not installed.
INSTALLED = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
sys.path = [sys.argv.pop(1), *(path for path in sys.path if path)]
from serving.cli.main import main
main()
"""

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for package in ("training", "export", "serving", "ui"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    build = [UV, "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", out, source]
    done = run(*build, cwd=source)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def service_alone(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel and what the service needs, of the versions in requirements.lock."""
    environment = tmp_path_factory.mktemp("environment")
    python = environment / "bin" / "python"
    done = run(UV, "venv", "--clear", "--python", sys.executable, environment, cwd=environment)
    assert done.returncode == 0, done.stderr
    install = (UV, "pip", "install", "--python", python, "-c", ROOT / "requirements.lock", wheel)
    for options in (("--offline",), ()):  # `make` has filled uv's cache, unless it was emptied since
        done = run(*install, *options, cwd=environment)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr
    return environment


@pytest.fixture(scope="module")
def everything(wheel, tmp_path_factory):
    """everything("pretrain", ...): `twinview` of the wheel with all packages; the finished process."""
    packages, cwd = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("work")
    shutil.unpack_archive(wheel, packages, "zip")

    def twinview(*arguments: str) -> subprocess.CompletedProcess:
        return run(sys.executable, "-c", INSTALLED, packages, *arguments, cwd=cwd)

    return twinview


def test_the_service_is_installed_without_torch_and_page(service_alone, launch, bundle, picture, tmp_path):
    site_packages = next((service_alone / "lib").glob("*/site-packages"))
    bytes_ = sum(file.lstat().st_size for file in site_packages.rglob("*") if file.is_file())
    assert 0.5e9 < bytes_ < SERVICE_GB * 1e9
    assert not {"torch", "gradio", "timm"} & {path.name for path in site_packages.iterdir()}
    program = (service_alone / "bin" / "twinview", "serve")
    running = launch(cwd=tmp_path, program=program, environment={"VIRTUAL_ENV": str(service_alone)})
    with Client(running.address) as client:
        assert client.embed([picture(0), picture(1)]).model == bundle.card.id
    assert httpx.get(f"{running.address}/").headers["location"] == "/docs"  # there is no page


@pytest.mark.parametrize(("program", "extra"), [("pretrain", "train"), ("export", "train"), ("ui", "page")])
def test_a_program_without_its_packages_names_the_extra_that_brings_them(service_alone, tmp_path, program, extra):
    done = run(service_alone / "bin" / "twinview", program, cwd=tmp_path)
    assert done.returncode == 1
    assert f"pip install 'twinview[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_programs_of_a_checkout_are_commands_of_the_wheel(everything):
    done = everything("export", "lite0")
    assert done.returncode == 0, done.stderr
    assert "next: twinview index add --data YOUR_IMAGES, then twinview serve" in done.stdout
    assert "train one with `twinview pretrain`" in everything("export", ".").stderr
    assert "usage: twinview pretrain" in everything("pretrain", "--help").stdout


def test_help_lists_the_programs(everything):
    listed = everything("--help").stdout
    for program in ("serve", "pretrain", "distil", "finetune", "evaluate", "ablate", "export", "quantize", "ui"):
        assert f"\n  {program} " in listed
    assert "did you mean pretrain?" in everything("pretrian").stderr
