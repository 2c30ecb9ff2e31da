import asyncio
import csv
import io

from serving.client import Item
from ui.search import selection
from ui.search.query import SearchSettings
from ui.search.selection import as_csv, as_paths, selected_rows, write

SHIRT = Item("a", "x/shirt, blue.jpg", "shirt", "/data/x/shirt, blue.jpg", metadata={"price": 3.5, "path": "p"})
USUAL = SearchSettings()
HAT = Item("b", "hat.jpg", None, None, metadata={"sold": True})


def rows_of(client, chosen: dict, settings: SearchSettings = USUAL) -> tuple[list, list]:
    reports = []
    rows = asyncio.run(selected_rows(client, chosen, settings, lambda *report: reports.append(report)))
    return [(item.id, similarity) for item, similarity in rows], reports


def test_what_was_selected_keeps_its_order_and_similarity(fake):
    chosen = {"all": False, "chosen": [["id7", "0.912345"], ["id2", None], ["gone", "0.5"]]}
    assert rows_of(fake(), chosen)[0] == [("id7", 0.912345), ("id2", None)]


def test_thousands_are_looked_up_in_conditions_that_an_address_holds(fake):
    client = fake(count=450)
    chosen = {"all": False, "chosen": [[f"id{i}", None] for i in range(450)]}
    rows, reports = rows_of(client, chosen)
    assert len(rows) == 450 and reports == [(200, 450), (400, 450), (450, 450)]


def test_all_includes_pictures_on_other_pages_but_not_those_taken_out(fake):
    client = fake(count=2300)
    settings = SearchSettings(where=("price>=3",), collection="pets", encoder="tiny")
    rows, reports = rows_of(client, {"all": True, "chosen": [["id1500", None]]}, settings)
    assert len(rows) == 2299 and ("id2299", None) in rows and ("id1500", None) not in rows
    assert client.asked == [("items", 1000, at, {"price": {"gte": 3}}, "pets", "tiny") for at in (0, 1000, 2000)]
    assert reports[-1] == (2300, 2300)


def test_a_table_has_a_column_for_each_fact():
    table = list(csv.DictReader(io.StringIO(as_csv([(SHIRT, 0.25), (HAT, None)]))))
    assert list(table[0]) == ["id", "name", "label", "similarity", "path", "metadata.path", "price", "sold"]
    assert list(table[0].values()) == [
        *("a", "x/shirt, blue.jpg", "shirt", "0.25", "/data/x/shirt, blue.jpg", "p", "3.5", "")
    ]
    assert list(table[1].values()) == ["b", "hat.jpg", "", "", "", "", "", "True"]


def test_no_text_is_run_as_a_formula_by_a_spreadsheet():
    table = as_csv([(Item("a", "=HYPERLINK(1)", "@sum", "-x"), -0.5)])
    assert table.splitlines()[1] == "a,'=HYPERLINK(1),'@sum,-0.5,'-x"


def test_paths_are_one_a_line_and_names_replace_missing_paths():
    assert as_paths([SHIRT, HAT, Item("c", "a\nb", None, None)]) == ("/data/x/shirt, blue.jpg\nhat.jpg\na b\n")


def test_the_file_is_in_the_folder_that_the_page_serves_from(uploads):
    path = write([(SHIRT, 1)], "paths")
    assert path.is_relative_to(uploads) and path.name == "twinview-paths.txt"
    assert path.read_text() == "/data/x/shirt, blue.jpg\n"
    assert f'href="gradio_api/file={path}" download="twinview-paths.txt"' in selection.download_html(path)
