"""Runs the notebooks in docs/notebooks as they stand, and stores what they show in them.

python docs/site/notebooks.py               all of them
python docs/site/notebooks.py lite0         one
"""

import hashlib
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "docs" / "notebooks"


def executed(path: Path, folder: Path, parameters: str | None = None) -> nbformat.NotebookNode:
    """The notebook with its outputs, after running in a folder. Progress bars and warnings are left out.

    parameters  lines instead of those of the cell with the tag `parameters`
    raises      nbclient's CellExecutionError, which names the cell
    """
    notebook = nbformat.read(path, 4)
    if parameters is not None:
        (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
        cell.source = parameters
    there = {"metadata": {"path": folder}}
    NotebookClient(notebook, resources=there, timeout=None, startup_timeout=600, coalesce_streams=True).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [kept(output, folder) for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata["language_info"] = {"name": "python"}  # without its version
    notebook.metadata["outputs_of"] = fingerprint(notebook)
    return notebook


def fingerprint(notebook: nbformat.NotebookNode) -> str:
    """Differs for other lines, so that a test sees outputs that are out of date."""
    lines = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def kept(output: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Without what differs between machines: paths, numbers of executions."""
    if "text" in output:
        output.text = output.text.replace(f"{folder}/", "").replace(f"{ROOT}/", "")
    if "data" in output:
        pictures = {kind: data for kind, data in output.data.items() if kind.startswith("image/")}
        output.data = pictures or output.data
        output.metadata = {}
    if "execution_count" in output:
        output.execution_count = None
    return output


def main() -> None:
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if path.stem in (sys.argv[1:] or path.stem):
            with tempfile.TemporaryDirectory() as folder:
                nbformat.write(executed(path, Path(folder)), path)
            print(path)


if __name__ == "__main__":
    main()
