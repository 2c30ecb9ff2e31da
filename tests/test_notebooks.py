"""The notebooks run from the first cell to the last, here on few pictures, and store what their lines have shown."""

import importlib.util
from pathlib import Path

import nbformat
import pytest

from training.data import shapes

ROOT = Path(__file__).parents[1]
SMALL = {
    "own-pictures": 'LENGTH = ["--epochs", "1", "--size-px", "16", "--batch-size", "32"]',
    "lite0": 'ENCODER = "timm:test_resnet:random"\nLENGTH = ["--max-steps", "1", "--size-px", "32"]',
}
pytestmark = pytest.mark.filterwarnings("ignore:::jupyter_client", "ignore:::zmq", "ignore:::nbclient")


def load(file: str):
    spec = importlib.util.spec_from_file_location(Path(file).stem, ROOT / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


notebooks = load("docs/site/notebooks.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs_to_its_end(name, tmp_path):
    shapes.make(tmp_path / "small", train=64, test=24, size_px=32)
    path = notebooks.NOTEBOOKS / f"{name}.ipynb"
    ran = notebooks.executed(path, tmp_path, f'PICTURES = "small"\n{SMALL[name]}')
    stored = nbformat.read(path, 4)
    assert [shown(cell) for cell in ran.cells] == [shown(cell) for cell in stored.cells]
    assert {name for kinds in map(shown, ran.cells) for name in kinds} == {"text", "image/jpeg"}


def shown(cell) -> list[str]:
    """The kinds of a cell's outputs."""
    return [kind for output in cell.get("outputs", ()) for kind in output.get("data", ["text"])]


@pytest.mark.parametrize("name", SMALL)
def test_the_stored_outputs_are_those_of_the_stored_lines(name):
    notebook = nbformat.read(notebooks.NOTEBOOKS / f"{name}.ipynb", 4)
    assert notebook.metadata["outputs_of"] == notebooks.fingerprint(notebook)
    assert {path.stem for path in notebooks.NOTEBOOKS.glob("*.ipynb")} == {*SMALL}
