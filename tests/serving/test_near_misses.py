"""A mistyped name gets the nearest known one as a suggestion."""

import pytest

from export.suggest import did_you_mean
from serving.inference.encoder import NoEncoder, locate


@pytest.mark.parametrize(
    ("given", "known", "suggestion"),
    [
        ("lite", ["lite0", "tiny"], "; did you mean lite0?"),
        ("Lable", ["width", "Label"], "; did you mean Label?"),
        ("zebra", ["label"], ""),
        ("x", [], ""),
    ],
)
def test_the_nearest_name_is_suggested_if_it_is_near(given, known, suggestion):
    assert did_you_mean(given, known) == suggestion


def test_a_mistyped_encoder(make_bundle, tmp_path, no_store):
    make_bundle(tmp_path / "runs" / "lite0" / "encoder")
    with pytest.raises(NoEncoder, match=r"lite is neither .* store; did you mean lite0\?"):
        locate("lite", tmp_path / "runs")
    with pytest.raises(NoEncoder, match=r"zebra is neither .* store\. Make one"):
        locate("zebra", tmp_path / "runs")


def test_a_mistyped_key_of_a_filter(http, fill, twinview, tmp_path):
    fill(3)
    with pytest.raises(
        SystemExit, match=r"No item has the key lable; did you mean label\? The keys are id, name, label,"
    ):
        twinview("index", "export", tmp_path / "v.parquet", "--index", tmp_path / "index", "--where", "lable=a")
    answer = http.get("/collections/pictures/items", params={"filter": '{"lable": "a"}'})
    assert answer.status_code == 400 and "did you mean label?" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (("index", "serch"), "there is no command twinview index serch; did you mean search?"),
        (("duplicate",), "there is no command twinview duplicate; did you mean duplicates?"),
        (("imbed", "a", "--output=x"), "did you mean embed?"),
        (("index", "zzz"), "there is no command twinview index zzz; `twinview --help` lists all"),
    ],
)
def test_a_mistyped_command(twinview, capsys, words, suggestion):
    with pytest.raises(SystemExit):
        twinview(*words)
    assert suggestion in capsys.readouterr().err


def test_the_icon_that_browsers_ask_for_is_there(http):
    assert http.get("/favicon.ico").headers["content-type"] == "image/png"
