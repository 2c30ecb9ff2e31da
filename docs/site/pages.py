"""The pages of the site: the repository's Markdown files and notebooks, at the places where they are.

The site has the folders of the repository, so a link from one file to another is right in both.
"""

import json
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = ("*.md", "docs/**/*.md", "*/RECORDS.md", "docs/notebooks/*.ipynb", "docs/site/*.css")
LINK = re.compile(r"\[([^]]*)\]\(([^)\s#:]+)[^)]*\)")


def on_files(files: Files, config) -> Files:
    """All pages, the files that they link to, and what the theme brings."""
    site = Files([file for file in files if file.generated_by or file.src_dir != config.docs_dir])
    pages = sorted(path for pattern in PAGES for path in ROOT.glob(pattern))
    linked = set()
    for path in pages:
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".ipynb":
            text = to_markdown(path)
            site.append(File.generated(config, name.replace(".ipynb", ".md"), content=text))
        else:
            text = path.read_text()
            site.append(File.generated(config, name, abs_src_path=str(path)))
        linked |= {(path.parent / target).resolve() for _, target in LINK.findall(text)}
    for path in sorted(linked):
        if path.is_file() and path.is_relative_to(ROOT) and path.suffix != ".md":
            site.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return site


def on_page_markdown(markdown: str, page, **_) -> str:
    """Links to folders, which the site does not show, become plain text. Links to other notebooks show their pages."""
    here = ROOT / page.file.src_uri

    def change(link: re.Match) -> str:
        if (here.parent / link[2]).is_dir():
            return link[1]
        return link[0] if here.stem in link[2] else link[0].replace(".ipynb", ".md")

    return LINK.sub(change, markdown)


def to_markdown(path: Path) -> str:
    """A notebook's cells and their stored outputs, text and pictures, and below the title a link to the file."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if kind := next((kind for kind in data if kind.startswith("image/")), None):
                picture = "".join(data[kind]).replace("\n", "")
                parts.append(f"![What the lines above show](data:{kind};base64,{picture})")
            else:
                text = "".join(output.get("text") or data.get("text/plain", ""))
                parts.append(f"```text\n{text.rstrip()}\n```")
    title, _, rest = "\n\n".join(parts).partition("\n")
    return f"{title}\n\n[This page is a notebook]({path.name}), with the outputs of one run.\n{rest}\n"
