"""The site of the documents: complete, the same as the files, and without a request to another machine."""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from markdown_it import MarkdownIt

from serving import client

ROOT = Path(__file__).parents[1]
COUNTED = ("h1", "h2", "h3", "p", "ul", "ol", "li", "table", "tr", "th", "td", "pre", "img", "em", "strong")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the built site. Warnings are errors; `--quiet` would leave them out before they are counted."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return folder


class Elements(HTMLParser):
    """Counts the elements of a page's text, and collects what all of the page loads."""

    def __init__(self, html: str):
        super().__init__()
        self.counts, self.loaded, self.ids, self._inside = Counter(), [], [], False
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        given = dict(attributes)
        self._inside |= tag == "article"
        if self._inside and tag in COUNTED:
            self.counts[tag] += 1
        self.ids.append(given.get("id"))
        self.loaded += [given[name] for name in ("src", "srcset", "data") if given.get(name)]
        if tag == "link" and given.get("rel") != "canonical":
            self.loaded.append(given["href"])

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag != "article"


def documents() -> list[str]:
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/studies/*.md"), *ROOT.glob("*/RECORDS.md")]
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


def page(site: Path, document: str) -> str:
    return (site / re.sub(r"\.\w+$", ".html", document).replace("README", "index")).read_text()


@pytest.mark.slow
def test_the_site_shows_every_document_as_its_viewers_do(site):
    names = documents()
    assert len(names) > 18
    for name in names:
        expected = Elements(f"<article>{MarkdownIt('gfm-like', {'linkify': False}).render((ROOT / name).read_text())}")
        assert Elements(page(site, name)).counts == expected.counts, name


@pytest.mark.slow
def test_a_page_loads_nothing_from_another_machine(site):
    pages = [*site.rglob("*.html")]
    loaded = {address for path in pages for address in Elements(path.read_text()).loaded}
    assert any(address.endswith(".js") for address in loaded)
    assert {address for address in loaded if re.match(r"(https?:)?//", address)} == set()
    for path in site.rglob("*.css"):
        assert re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^\"')]+", path.read_text()) == [], path


@pytest.mark.slow
def test_the_reference_has_every_method_and_every_answer_of_the_client(site):
    ids = Elements(page(site, "docs/reference/client.md")).ids
    methods = {name for name in vars(client.Client) if not name.startswith("_")}
    assert {f"serving.client.sync_client.Client.{name}" for name in methods} <= {*ids}
    answers = {name for name in client.__all__ if name not in ("COLLECTION", "Client", "AsyncClient")}
    prefix = "serving.protocol.replies."
    shown = {id.removeprefix(prefix) for id in ids if id and id.startswith(prefix) and id.count(".") == 3}
    assert shown == answers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own-pictures", "lite0"])
def test_the_page_of_a_notebook_has_its_pictures_and_the_notebook_itself(site, name):
    notebook = ROOT / "docs" / "notebooks" / f"{name}.ipynb"
    pictures = nbformat.read(notebook, 4).cells
    pictures = [out for cell in pictures for out in cell.get("outputs", ()) if "image/jpeg" in out.get("data", ())]
    html = page(site, f"docs/notebooks/{name}.ipynb")
    assert html.count("data:image/jpeg;base64,") == len(pictures) > 0
    assert f'href="{name}.ipynb"' in html
    assert (site / "docs" / "notebooks" / notebook.name).read_text() == notebook.read_text()


@pytest.mark.slow
def test_links_lead_to_pages_and_to_source_files_and_never_to_folders(site):
    assert 'href="notebooks/lite0.html"' in page(site, "docs/tutorial.md").partition("<article")[2]
    links = re.findall(r'href="([^":#]+)', page(site, "CONTRIBUTING.md"))
    assert {"docs/architecture.html", "training/loss.py"} < {*links}
    assert [link for link in links if not (site / link).is_file()] == []


def docstrings():
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "site" / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_of_a_docstring_become_a_list_and_indented_lines_stay():
    given = "Mean of *z*.\n\nz    (N, d), a row\n     for each <view>\ntau  > 0\n\n    z = 2 * x\n\nThe end of `a * b`."
    assert docstrings().to_markdown(given) == (
        "Mean of \\*z\\*.\n\n\n`z`\n:   (N, d), a row\n    for each \\<view\\>\n\n`tau`\n:   \\> 0\n\n"
        "    z = 2 * x\n\nThe end of `a * b`."
    )
