"""What docs/page.md tells programs to call is called, as it stands there; what it names is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "page.md").read_text()

pytestmark = pytest.mark.browser


@pytest.fixture
def work(tmp_path, servers, reddish):
    """A folder with query.jpg; the service's runs/ holds one run."""
    (tmp_path / "query.jpg").write_bytes(reddish.read_bytes())
    run = servers.folder / "runs" / "cats"
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text('{"data": "cats", "epochs": 2, "batch_size": 4}')
    return tmp_path


def test_the_calls_of_programs_work_as_they_are_written(servers, work):
    program = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
    assert program.count("predict") >= 9
    program = program.replace("http://127.0.0.1:3000", servers.service)
    done = subprocess.run([sys.executable, "-c", program], cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.search(r"^0\.9\d* \S*red/\d\.png$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^3 \w+$", done.stdout, re.MULTILINE), "three are labelled red"
    states = "none|computing|done"  # small collections are computed by themselves
    assert re.search(rf"^({states}) ({states})$", done.stdout, re.MULTILINE), done.stdout
    assert lines[-1].startswith("cats ")


def test_a_refused_program_gets_the_services_message(servers, work):
    program = f'from gradio_client import Client; Client("{servers.service}/ui/").predict("dogs", api_name="/run")'
    done = subprocess.run([sys.executable, "-c", program], cwd=work, capture_output=True, text=True)
    assert "there is no run dogs; GET /runs lists the runs" in done.stderr


def test_the_document_has_every_call_of_the_page_and_no_other(page):
    offered = page.evaluate("fetch('gradio_api/info').then((answer) => answer.json())")["named_endpoints"]
    assert set(re.findall(r'api_name="(/\w+)"', TEXT)) | {"/run"} == set(offered)


def test_every_tab_is_described_under_its_name(page):
    assert re.findall(r"^\*\*(\w+)\*\*", TEXT, re.MULTILINE) == page.get_by_role("tab").all_inner_texts()


def test_the_pictures_are_there_and_small():
    shown = [ROOT / "docs" / path for path in re.findall(r"!\[[^\]]+\]\((\S+?)\)", TEXT)]
    assert len(shown) >= 6 and all(path.is_file() and path.stat().st_size < 250_000 for path in shown)
