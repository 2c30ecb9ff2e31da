"""Labels from CSV files."""

from pathlib import Path

import pytest
from PIL import Image

from export.spreadsheet import read_rows, write_rows
from training.data.label_files import relabel
from training.data.sources import DataError, Source, open_source


@pytest.fixture
def source(tmp_path) -> Source:
    """Four training pictures, two of them in the folder `inbox`, and test pictures of hats, shirts and shoes."""
    for name in ("train/inbox/a.png", "train/inbox/b.png", "train/c.png", "train/=e.png"):
        _picture(tmp_path / "mine" / name)
    for label in ("hat", "shirt", "shoe"):
        _picture(tmp_path / "mine" / "test" / label / "x.png")
    return open_source(str(tmp_path / "mine"))


def _picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


@pytest.fixture
def table(tmp_path):
    """table(text, ...) -> paths of files with these texts"""

    def write(*texts: str) -> list[str]:
        files = [tmp_path / f"{number}.csv" for number in range(len(texts))]
        for file, text in zip(files, texts, strict=True):
            file.write_text(text, encoding="utf-8")
        return [str(file) for file in files]

    return write


def labels(source: Source) -> dict[str, str | None]:
    return {picture.name: picture.label for picture in source.pictures}


def test_only_the_labels_of_the_files_are_used(source, table, capsys):
    path = next(picture.path for picture in source.pictures if picture.name == "train/c.png")
    files = table(
        f"id,name,path,label\n1,a,/elsewhere/a.png,\n2,train/=e.png,{path},hat\n",
        "label,name\n shirt ,train/inbox/b.png\nhat,train/c.png\n",
    )
    assert labels(relabel(source, files)) == {
        "train/inbox/a.png": None,  # not labelled inbox
        "train/inbox/b.png": "shirt",
        "train/c.png": "hat",
        "train/=e.png": None,
        "test/hat/x.png": "hat",
        "test/shirt/x.png": "shirt",
        "test/shoe/x.png": None,
    }
    assert capsys.readouterr().out == "note: the test pictures of shoe are left out, since no label is called so\n"


def test_files_that_a_spreadsheet_saved_are_read(source, table):
    for separator in (";", "\t"):
        lines = ["name,label", "train/c.png,hat", "train/=e.png,'-shirt"]
        found = labels(relabel(source, table("\ufeff" + "\r\n".join(lines).replace(",", separator))))
        assert (found["train/c.png"], found["train/=e.png"]) == ("hat", "-shirt")


def test_names_that_are_not_utf_8_are_found_as_tables_write_them(table, tmp_path):
    for name in ("\udcffa.png", "b\udcfe.png", "c\udcfd.png", "c\udcfc.png", "d.png"):
        _picture(tmp_path / "mine" / name)
    source = open_source(str(tmp_path / "mine"))
    files = table("name,label\n\ufffda.png,hat\nb\\udcfe.png,shirt\nd.png,hat\n")
    found = {name: label for name, label in labels(relabel(source, files)).items() if label}
    assert found == {"\udcffa.png": "hat", "b\udcfe.png": "shirt", "d.png": "hat"}
    with pytest.raises(DataError, match=r"mine has no picture c\ufffd.png \(line 2"):  # it may be either of two
        relabel(source, table("name,label\nc\ufffd.png,hat\nd.png,shirt\n"))


def test_files_in_the_home_folder_are_found(source, table, tmp_path, monkeypatch):
    table("name,label\ntrain/c.png,hat\ntrain/=e.png,shirt\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert labels(relabel(source, ["~/0.csv"]))["train/c.png"] == "hat"


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [("name", "label"), ("=1+1", "a,b"), ("'quoted", 'two\nlines "x"'), ("-", "")]
    with open(tmp_path / "table.csv", "w", newline="", encoding="utf-8") as file:
        write_rows(file, rows)
    read = read_rows((tmp_path / "table.csv").read_bytes().decode())
    assert [tuple(cells.values()) for _, cells in read] == rows[1:]
    assert [line for line, _ in read] == [2, 4, 5]
    assert (tmp_path / "table.csv").read_text(encoding="utf-8").splitlines()[1] == '\'=1+1,"a,b"'


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (["name,label\nno.png,hat\n"], r"mine has no picture no.png \(line 2 of .*0.csv\)$"),
        (["name,label\n" + "".join(f"{i}.png,hat\n" for i in range(5))], "2.png .line 4 of .*, and 2 more$"),
        (["name,label\n,hat\n"], r"mine has no picture '' \(line 2"),
        (["name,label\ntrain/c.png,hat\ntrain/c.png,shirt\n"], "c.png is hat in line 2 of .*0.csv and shirt in line 3"),
        (["name,label\ntrain/c.png,hat\n", "name,label\ntrain/c.png,shoe\n"], "hat in line 2 of .*0.csv and shoe in"),
        (["name,label\ntrain/c.png,\n"], "0.csv has no label; two or more are needed"),
        (["name,label\ntrain/c.png,hat\n"], "0.csv has only the label hat; two or more are needed"),
        (["name,class\ntrain/c.png,hat\n"], "0.csv needs the columns label, and path or name"),
        (["label\nhat\n"], "0.csv needs the columns label, and path or name"),
        (["name,label\n"], "0.csv needs .* a row for each picture"),
        ([""], "0.csv needs the columns"),
    ],
)
def test_files_that_cannot_be_used_are_named(source, table, texts, problem):
    with pytest.raises(DataError, match=problem):
        relabel(source, table(*texts))


def test_files_that_cannot_be_read_are_named(source, tmp_path):
    with pytest.raises(DataError, match=r"--labels: no.csv cannot be read: No such file"):
        relabel(source, ["no.csv"])
    (tmp_path / "odd.csv").write_bytes(b"name,label\ntrain/c.png,\xff\n")
    with pytest.raises(DataError, match=r"odd.csv is not a CSV file in UTF-8"):
        relabel(source, [str(tmp_path / "odd.csv")])
