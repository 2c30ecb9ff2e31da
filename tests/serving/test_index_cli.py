"""`twinview index ...`, on a folder."""

import json
import re
import sys

import pytest

from serving.collection.index import Index, Item, collections, content_id

DIMENSION = 48


@pytest.fixture
def place(tmp_path):
    return tmp_path / "index"


@pytest.fixture
def index(bundle, place) -> Index:
    return Index(place, bundle.card.id, DIMENSION)


@pytest.fixture
def command(twinview, place, capsys):
    """command(word, ...) -> what `twinview index` prints about the index."""

    def call(*words) -> str:
        capsys.readouterr()
        twinview("index", words[0], "--index", place, *words[1:])
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(command):
    """refused(word, ...) -> the sentence that ends it."""

    def call(*words) -> str:
        with pytest.raises(SystemExit) as ended:
            command(*words)
        assert isinstance(ended.value.code, str) and "\n" not in ended.value.code
        return ended.value.code

    return call


@pytest.fixture
def at_terminal(monkeypatch):
    """at_terminal(answer): someone sits there and types it."""

    def sit(answer: str) -> None:
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", lambda question: print(question) or answer)

    return sit


def test_pictures_are_added_and_added_again(command, picture, bundle, tmp_path, index):
    (tmp_path / "pictures").mkdir()
    for i in range(5):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(picture(i))
    options = ("--data", tmp_path / "pictures", "--encoder", bundle.folder)
    assert "indexed 5, already there 0" in command("add", *options)
    assert "indexed 0, already there 5" in command("add", *options)
    assert index.count() == 5


def test_a_collection_is_reembedded_with_another_encoder(command, picture, bundle, make_bundle, tmp_path, place):
    (tmp_path / "pictures").mkdir()
    for i in range(5):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(picture(i))
    command("add", "--data", tmp_path / "pictures", "--encoder", bundle.folder)
    other = make_bundle(tmp_path / "runs" / "other" / "encoder", scale=1 / 128)
    command("reembed", "--encoder", other.folder)
    assert {(facts.encoder, facts.count) for facts in collections(place)} == {(bundle.card.id, 5), (other.card.id, 5)}


def test_a_picture_finds_itself_first(command, fill, picture, bundle, tmp_path):
    fill(8)
    (tmp_path / "query.png").write_bytes(picture(3))
    heads, *rows = command("search", tmp_path / "query.png", "--k", 4, "--encoder", bundle.folder).splitlines()
    assert heads.split() == ["cosine", "id", "name", "path"] and len(rows) == 4
    assert rows[0].split() == ["1.0000", content_id(picture(3)), "b/3.png", "/pictures/3.png"]


def test_a_search_by_item_needs_no_encoder(command, fill, picture, no_store, tmp_path, monkeypatch):
    fill(8)
    monkeypatch.chdir(tmp_path)
    found = json.loads(command("search", content_id(picture(3)), "--json", "--where", "label=a"))
    assert {item["name"] for item in found} == {"a/0.png", "a/2.png", "a/4.png", "a/6.png"}
    assert found[0].keys() == {"similarity", "closer_than", *Item.__dataclass_fields__}
    least = found[1]["similarity"]
    words = ("search", content_id(picture(3)), "--where", '{"label": "a"}', "--threshold", least - 1e-4)
    assert len(command(*words).splitlines()) == 1 + 2
    assert "nothing found in pictures" in command("search", content_id(picture(3)), "--threshold", 1)


def test_an_impossible_search_is_explained(refused, command, fill, picture, bundle, make_bundle, tmp_path):
    assert "holds no collection" in refused("search", "x.png", "--encoder", bundle.folder)
    fill(2)
    named = ("--encoder", bundle.folder)
    (tmp_path / "text.png").write_text("text")
    assert "error: x.png is neither a file nor an item of pictures" in refused("search", "x.png", *named)
    assert "text.png is not an image" in refused("search", tmp_path / "text.png", *named)
    assert "holds no collection parts; it has pictures" in refused("search", "x", "--collection", "parts", *named)
    assert "error: --k 0: must be at least 1" in refused("search", "x", "--k", 0)
    assert "label is not a condition" in refused("search", "x", "--where", "label")
    (tmp_path / "query.png").write_bytes(picture(0))
    other = make_bundle(tmp_path / "other", scale=1 / 128)
    sentence = refused("search", tmp_path / "query.png", "--encoder", other.folder)
    assert f"pictures holds vectors of {bundle.card.id}, and this is {other.card.id}" in sentence


def test_items_are_removed_after_a_question(command, refused, fill, index, at_terminal):
    items = fill(6)
    at_terminal("n")
    assert refused("remove", items[0].id) == "nothing was changed" and index.count() == 6
    at_terminal("y")
    output = command("remove", items[0].id, items[1].id, "0" * 32)
    assert f"not in pictures: 1 of the ids ({'0' * 32})" in output
    assert "Remove 2 of 6 items from pictures in " in output and "removed 2; pictures holds 4" in output
    assert index.ids() == {item.id for item in items[2:]}


def test_yes_removes_filtered_items_without_a_question(command, fill, index):
    fill(6)
    assert "removed 3; pictures holds 3" in command("remove", "--where", "label=a", "--yes")
    assert {item.label for item in index.page(10)} == {"b"}
    assert "nothing to remove from pictures" in command("remove", "--where", "label=a")


def test_without_a_terminal_nothing_is_removed_unless_yes_is_given(refused, fill, index):
    items = fill(3)
    assert "to confirm, add --yes" in refused("remove", items[0].id)
    assert "to confirm, add --yes" in refused("undo")
    assert "give the ids of the items to remove, or --where" in refused("remove", "--yes")
    assert "give the ids" in refused("remove", items[0].id, "--where", "label=a", "--yes")
    assert index.count() == 3


def test_an_item_is_removed_from_the_tables_of_all_encoders(command, fill, index, place):
    items = fill(3)
    _, vector = index.get(items[0].id)
    other = Index(place, "enc-b", DIMENSION)
    other.upsert(items[:1], vector[None], allow_other_encoder=True)
    command("remove", items[0].id, "--yes")
    assert items[0].id not in index.ids() | other.ids()
    assert index.read_thumbnail(items[0].id) is None


def test_collections_are_listed(command, fill, index, place):
    assert "index holds no collection" in command("list")
    items = fill(3)
    Index(place, "enc-b", DIMENSION, "parts").upsert(items[:1], index.get(items[0].id)[1][None])
    heads, *rows = command("list").splitlines()
    assert heads.split() == ["collection", "encoder", "items", "size", "index"]
    assert [row.split()[:3] for row in rows] == [["parts", "enc-b", "1"], ["pictures", index.encoder_id, "3"]]
    assert re.search(r"\d (kB|B|MB)  none$", rows[0])
    assert json.loads(command("list", "--json"))[1]["count"] == 3


def test_verify_reports_damage_and_exits_with_1(command, fill, index, capsys):
    items = fill(3)
    assert command("verify") == f"pictures of {index.encoder_id}: 3 items, no damage\n"
    index.store.delete([index.thumbnail_path(items[0].id)])
    with pytest.raises(SystemExit) as ended:
        command("verify", "--collection", "pictures")
    output = capsys.readouterr().out.splitlines()
    assert ended.value.code == 1 and output[0].endswith("3 items, damaged")
    assert len(output) == 2 and items[0].name in output[1]


def test_the_last_change_is_undone_after_a_question(command, refused, fill, index, at_terminal):
    items = fill(3)
    index.delete([items[0].id])
    at_terminal("")
    assert refused("undo") == "nothing was changed"
    at_terminal("yes")
    output = command("undo")
    versions = [line.split() for line in output.splitlines() if re.match(r"\d", line)]
    assert [row[-1] for row in versions][-2:] == ["3", "2"] and re.match(r"\d{4}-\d\d-\d\d", versions[0][1])
    assert re.search(r"version \d+ of pictures holds 3 items", output)
    assert index.count() == 3


@pytest.mark.slow
def test_a_collection_is_exported_and_imported(command, refused, fill, index, tmp_path, place):
    fill(4)
    file = tmp_path / "out" / "v.parquet"
    assert f"4 items of pictures in {file}" in command("export", file)
    assert "2 items of pictures" in command("export", tmp_path / "a.parquet", "--where", "label=a")
    assert "v.csv must end in .parquet" in refused("export", tmp_path / "v.csv")
    command("remove", "--where", "label=a", "--yes")
    assert "2 sent, 2 already there; pictures holds 4" in command("import", file)
    assert "4 sent, 0 already there; parts holds 4" in command("import", file, "--collection", "parts")
    assert "nowhere.parquet cannot be read" in refused("import", tmp_path / "nowhere.parquet")


def test_with_several_encoders_one_must_be_chosen(command, refused, fill, index, place, tmp_path):
    items = fill(3)
    Index(place, "enc-b", 2).upsert(items[:1], [[1.0, 2.0]], allow_other_encoder=True)
    sentence = refused("export", tmp_path / "v.parquet")
    assert "enc-b" in sentence and index.encoder_id in sentence and "choose one with --encoder" in sentence
    assert "1 items of pictures" in command("export", tmp_path / "v.parquet", "--encoder", "enc-b")
    assert "but none of enc-c" in refused("undo", "--encoder", "enc-c")


@pytest.mark.slow
def test_an_index_is_copied_and_copied_again(twinview, fill, place, tmp_path, bundle, capsys):
    fill(3)
    for counts in ("3 sent, 0 already there", "0 sent, 3 already there"):
        twinview("index", "copy", place, tmp_path / "other")
        assert f"pictures of {bundle.card.id}: {counts}; compared and equal" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: .*nowhere holds no collection"):
        twinview("index", "copy", tmp_path / "nowhere", tmp_path / "other")
