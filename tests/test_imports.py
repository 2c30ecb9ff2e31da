"""The table "Who imports whom" of docs/architecture.md holds in the code."""

import re
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("training", "export", "serving", "ui")


def read_rules() -> dict[str, tuple[str, ...]]:
    """Package -> the packages it may import besides itself, in the order of the table."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = re.search(r"^## Who imports whom$(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| (`.+?) \| (.+?) \|", section[1], re.MULTILINE)
    rules = {}
    for packages, imports in rows:
        for package in re.findall(r"`([\w.]+)`", packages):
            rules[package] = tuple(re.findall(r"`([\w.]+)`", imports))
    return rules


RULES = read_rules()


def row_of(module: str) -> str | None:
    """The longest package of the table that contains the module."""
    return max((p for p in RULES if f"{module}.".startswith(f"{p}.")), key=len, default=None)


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph(*PACKAGES, cache_dir=None)


def test_every_module_is_in_a_row_of_the_table(graph):
    modules = {m for m in graph.modules if "." in m or m == "ui"}
    assert len(modules) > 100
    assert {m for m in modules if row_of(m) is None and any(graph.find_modules_directly_imported_by(m))} == set()


def test_every_import_is_allowed_by_the_table(graph):
    forbidden = []
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            own, other = row_of(module), row_of(imported)
            if own != other and not any(f"{imported}.".startswith(f"{p}.") for p in RULES[own]):
                forbidden.append(f"{module} imports {imported}")
    assert forbidden == []


def test_a_row_of_the_table_names_only_rows_above_it():
    """So no two packages import each other, directly or through others."""
    above: set[str] = set()
    for package, imports in RULES.items():
        assert set(map(row_of, imports)) <= above, package
        above.add(package)


def test_every_permission_in_the_table_is_used(graph):
    """A permission that nothing needs any more is removed from the page."""
    used = {
        (row_of(module), permitted)
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
        for permitted in RULES.get(row_of(module), ())
        if f"{imported}.".startswith(f"{permitted}.")
    }
    assert {(package, permitted) for package in RULES for permitted in RULES[package]} == used
