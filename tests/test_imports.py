"""The table "Who imports whom" of docs/architecture.md holds in the code."""

import re
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("training", "export", "serving", "ui")


def read_rules() -> dict[tuple[str, ...], tuple[str, ...]]:
    """The rows of the table, in its order: packages -> the packages that they may import."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = re.search(r"^## Who imports whom$(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| (`.+?) \| (.+?) \|$", section[1], re.MULTILINE)
    return {tuple(re.findall(r"`([\w.]+)`", left)): tuple(re.findall(r"`([\w.]+)`", right)) for left, right in rows}


RULES = read_rules()
ROWS = {package: row for row in RULES for package in row}


def inside(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def row_of(module: str) -> tuple[str, ...]:
    """The row of the longest package that contains the module; () if there is none."""
    return ROWS.get(max((package for package in ROWS if inside(module, package)), key=len, default=""), ())


def permission(module: str, imported: str) -> str | None:
    """The entry of the module's row that permits the import."""
    for package in RULES.get(row_of(module), ()):
        if inside(imported, package) or (package in ROWS and row_of(imported) == ROWS[package]):
            return package
    return None


@pytest.fixture(scope="module")
def imports() -> set[tuple[str, str]]:
    """(module, imported module) of this project; imports inside functions too, those for type checkers not."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None, exclude_type_checking_imports=True)
    return {(module, other) for module in graph.modules for other in graph.find_modules_directly_imported_by(module)}


def test_every_module_is_in_a_row_of_the_table(imports):
    modules = {module for pair in imports for module in pair}
    assert len(modules) > 100
    assert {module for module in modules if not row_of(module)} == set()


def test_every_import_is_permitted_by_the_table(imports):
    across = {(module, other) for module, other in imports if row_of(module) != row_of(other)}
    assert len(across) > 100
    assert {(module, other) for module, other in across if permission(module, other) is None} == set()


def test_every_permission_in_the_table_is_needed(imports):
    needed = {(row_of(module), permission(module, other)) for module, other in imports}
    assert {(row, package) for row in RULES for package in RULES[row]} - needed == set()


def test_a_row_permits_only_rows_above_it():
    above: set[tuple[str, ...]] = set()
    for row, permitted in RULES.items():
        assert {row_of(package) for package in permitted} <= above, row
        above.add(row)


def test_no_modules_import_each_other_in_a_circle(imports):
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for module, other in imports:
        sorter.add(module, other)
    sorter.prepare()  # raises CycleError, which names them
