"""`twinview index ...`, on a folder."""

import json
import os
import re
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving.collection.index import Index, Item, collections, content_id
from serving.collection.reembedding import Reembedding

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


@pytest.fixture
def uploaded(index, picture):
    """uploaded(n) -> the ids of n items whose originals are kept, and of one without, all with ids of their own"""

    def put(n: int) -> list[str]:
        files = {f"id-{i}": picture(i) for i in range(n)}
        items = [Item(id, f"{id}.png", None, None, 40, 30, len(data)) for id, data in files.items()]
        bare = Item("bare", "bare", None, None)
        index.upsert([*items, bare], np.eye(n + 1, DIMENSION), files, originals=files)
        return [*files, "bare"]

    return put


def test_uploads_are_reembedded_from_their_originals_and_the_rest_is_named(
    command, uploaded, make_bundle, tmp_path, place
):
    ids = uploaded(5)
    assert re.search(r"\d (kB|B) +none$", command("list").splitlines()[1])
    other = make_bundle(tmp_path / "runs" / "other" / "encoder", scale=1 / 128)
    new = Index(place, other.card.id, DIMENSION)
    said = command("reembed", "--encoder", other.folder)
    assert "indexed 5, already there 0, skipped 1" in said and "--without-skipped" in said
    assert new.ids() == set(ids) - {"bare"}
    assert "bare,is not a file of its own" in (place / "skipped.csv").read_text()
    assert Reembedding(new).progress().state == "incomplete"
    said = command("reembed", "--encoder", other.folder, "--without-skipped")
    assert "indexed 0, already there 5, skipped 1" in said and "--without-skipped" not in said
    assert Reembedding(new).progress().state == "done"


def test_an_interrupted_reembedding_keeps_what_it_has_and_no_service_goes_on(
    command, uploaded, make_bundle, tmp_path, place, monkeypatch, capsys
):
    ids = uploaded(40)
    other = make_bundle(tmp_path / "runs" / "other" / "encoder", scale=1 / 128)
    new = Index(place, other.card.id, DIMENSION)
    store, calls = Reembedding._store, []

    def interrupted(self, rows, skipped):
        store(self, rows, skipped)
        calls.append(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr("serving.collection.reembedding.ROWS_TOGETHER", 16)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(Reembedding, "_store", interrupted)
        command("reembed", "--encoder", other.folder)
    assert ended.value.code == 130
    assert re.search("interrupted: .* run the same command again", capsys.readouterr().out)
    assert new.count() == len(calls[0]) > 0
    assert Reembedding(new).progress().state == "stopped"
    command("reembed", "--encoder", other.folder)
    assert new.ids() == set(ids) - {"bare"}


def test_a_reembedding_that_another_process_works_on_is_left_to_it(refused, uploaded, make_bundle, tmp_path, place):
    uploaded(1)
    other = make_bundle(tmp_path / "runs" / "other" / "encoder", scale=1 / 128)
    with Reembedding(Index(place, other.card.id, DIMENSION)).lease():
        assert "is being embedded again already" in refused("reembed", "--encoder", other.folder)


def test_without_skipped_alone_is_refused(refused, bundle, tmp_path):
    assert "--without-skipped is for" in refused("add", "--data", tmp_path, "--without-skipped")


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
    fill(2)
    named = ("--encoder", bundle.folder)
    (tmp_path / "text.png").write_text("text")
    assert "error: x.png is neither a file nor an item of pictures" in refused("search", "x.png", *named)
    assert "text.png is not an image" in refused("search", tmp_path / "text.png", *named)
    assert "error: --k 0: must be at least 1" in refused("search", "x", "--k", 0)
    assert "label is not a condition" in refused("search", "x", "--where", "label")
    (tmp_path / "query.png").write_bytes(picture(0))
    other = make_bundle(tmp_path / "other", scale=1 / 128)
    sentence = refused("search", tmp_path / "query.png", "--encoder", other.folder)
    assert f"pictures holds vectors of {bundle.card.id}, and this is {other.card.id}" in sentence


def test_a_newer_export_does_not_replace_the_encoder_of_a_collection(
    command, bundle, make_bundle, picture, tmp_path, monkeypatch
):
    """For a search and for more pictures."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.png").write_bytes(picture(i))
    shutil.copytree(bundle.folder, tmp_path / "runs" / "first" / "encoder")
    command("add", "--data", folder)
    os.utime(tmp_path / "runs" / "first" / "encoder" / "model_card.json", (1, 1))
    newer = make_bundle(tmp_path / "runs" / "newer" / "encoder", scale=1 / 128)
    assert "0.png" in command("search", folder / "0.png")
    (folder / "2.png").write_bytes(picture(2))
    assert "pictures holds 3" in command("add", "--data", folder)
    assert newer.card.id in command("add", "--data", folder, "--reembed")


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
    for command in (("remove", items[0].id), ("undo",)):
        assert refused(*command).endswith("? Not a terminal: pass --yes to confirm.")
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
    items = fill(3)
    Index(place, "enc-b", DIMENSION, "parts").upsert(items[:1], index.get(items[0].id)[1][None])
    heads, *rows = command("list").splitlines()
    assert heads.split() == ["collection", "encoder", "items", "size", "originals", "index"]
    assert [row.split()[:3] for row in rows] == [["parts", "enc-b", "1"], ["pictures", index.encoder_id, "3"]]
    assert re.search(r"\d (kB|B|MB)  -          none$", rows[0])
    assert json.loads(command("list", "--json"))[1]["count"] == 3


def test_verify_reports_damage_and_exits_with_1(command, fill, index, capsys):
    items = fill(3)
    assert command("verify") == f"pictures of {index.encoder_id}: 3 items, no damage\n"
    index.store.delete([index.thumbnail_path(items[0].id)])
    assert command("verify").endswith(": 3 items, no damage, 1 without a thumbnail\n")
    (file,) = (path for path in index.store.list(f"pictures.{index.encoder_id}.lance/data"))
    index.store.delete([file])
    with pytest.raises(SystemExit) as ended:
        command("verify", "--collection", "pictures")
    output = capsys.readouterr().out.splitlines()
    assert ended.value.code == 1 and output[0].endswith("3 items, damaged")
    assert file in output[1]


def test_the_last_change_is_undone_after_a_question(command, refused, fill, index, at_terminal):
    items = fill(3)
    index.delete([items[0].id])
    at_terminal("")
    assert refused("undo") == "nothing was changed"
    heads, deleted, added = command("history").splitlines()
    assert heads.split() == ["began", "change", "what", "it", "did"]
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", deleted)
    assert deleted.endswith("  deleted 1 item (to be undone next)") and added.endswith("  added 3 items")
    at_terminal("yes")
    question, answer = command("undo").splitlines()
    assert re.match(r"Undo the change of [-\d]{10} [:\d]{8} in pictures: deleted 1 item\?", question)
    assert answer == "undone: deleted 1 item; pictures holds 3 items"
    assert index.count() == 3
    undo, deleted, added = json.loads(command("history", "--json"))
    assert (undo["text"], deleted["undone"], added["next"]) == ("undid: deleted 1 item", True, True)
    assert "pictures holds 2 items" in command("undo", undo["id"], "--yes")
    assert "No change 0 of pictures is known" in refused("undo", "0", "--yes")


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
    assert command("verify", "--collection", "parts").endswith(": 4 items, no damage, 4 without a thumbnail\n")
    assert "nowhere.parquet cannot be read" in refused("import", tmp_path / "nowhere.parquet")


def test_a_file_without_the_encoders_name_is_imported_for_the_collections_encoder(
    command, refused, fill, index, tmp_path
):
    fill(4)
    file = tmp_path / "v.parquet"
    command("export", file)
    pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
    command("remove", "--where", "label=a", "--yes")
    assert "2 sent, 2 already there; pictures holds 4" in command("import", file)
    command("alias", "live", "pictures")
    assert "0 sent, 4 already there; live holds 4" in command("import", file, "--collection", "live")
    assert "does not name the encoder of its vectors; name it with --encoder" in refused(
        "import", file, "--collection", "new"
    )
    words = refused("import", file, "--collection", "new", "--encoder", "../x")
    assert "--encoder ../x is no id of an encoder: letters, digits, _ and -" in words
    output = command("import", file, "--collection", "new", "--encoder", index.encoder_id)
    assert "4 sent, 0 already there; new holds 4" in output


def test_an_import_says_which_columns_it_renames_and_leaves_out(command, fill, tmp_path):
    fill(2)
    file = tmp_path / "v.parquet"
    command("export", file)
    pq.write_table(pq.read_table(file).append_column("a b", [[1, 2]]).append_column("c", [[[1], [2]]]), file)
    output = command("import", file)
    assert "columns stored under other names: a b as a_b\n" in output
    assert "columns left out: c (list<element: int64>)\n" in output


def test_a_list_whose_metadata_has_another_type_is_refused_before_anything_is_embedded(
    command, refused, picture, bundle, tmp_path, index
):
    def write(**columns) -> str:
        pq.write_table(pa.table({"path": ["1.png", "2.png"], **columns}), tmp_path / "list.parquet")
        return str(tmp_path / "list.parquet")

    for i in (1, 2):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    encoder = ("--encoder", str(bundle.folder))
    output = command("add", "--data", write(**{"unit price": [1, None]}, tags=[["a"], ["b"]]), *encoder)
    assert "columns stored under other names: unit price as unit_price\ncolumns left out: tags (list" in output
    assert sorted(str(item.metadata) for item in index.page(9)) == ["{'unit_price': 1}", "{}"]
    (tmp_path / "1.png").write_bytes(picture(3))
    sentence = refused("add", "--data", write(unit_price=["dear", "cheap"]), *encoder)
    assert "the column unit_price holds text, but the metadata unit_price of the items of pictures is whole" in sentence
    assert index.count() == 2
    command("add", "--data", write(unit_price=[1.5, float("nan")]), *encoder)  # more exact numbers are no other type
    assert index.count() == 3


def test_with_several_encoders_one_must_be_chosen(command, refused, fill, index, place, tmp_path):
    items = fill(3)
    Index(place, "enc-b", 2).upsert(items[:1], [[1.0, 2.0]], allow_other_encoder=True)
    sentence = refused("export", tmp_path / "v.parquet")
    assert "enc-b" in sentence and index.encoder_id in sentence and "choose one with --encoder" in sentence
    assert "1 item of pictures" in command("export", tmp_path / "v.parquet", "--encoder", "enc-b")
    assert "but none of enc-c" in refused("export", tmp_path / "v.parquet", "--encoder", "enc-c")


def test_a_collection_or_an_index_that_is_not_there_is_named_by_every_command(
    twinview, refused, command, fill, index, place, picture, bundle, tmp_path, monkeypatch
):
    (tmp_path / "query.png").write_bytes(picture(1))
    out, encoder = tmp_path / "out.parquet", ("--encoder", bundle.folder)
    reading = {
        "search": (tmp_path / "query.png", *encoder),
        "export": (out,),
        "verify": (),
        "history": (),
        "undo": ("--yes",),
        "remove": ("--where", "label=a", "--yes"),
        "reembed": encoder,
    }
    for word, rest in reading.items():
        assert refused(word, *rest) == f"error: there is no index at {place}"
    assert refused("list") == f"error: there is no index at {place}"
    assert refused("drop", "cloths", "--yes") == f"error: there is no index at {place}"
    assert not place.exists()
    place.mkdir()
    assert refused("search", "a") == f"error: {place} holds no collection, and so not pictures"
    assert command("list") == f"{place} holds no collection\n"
    items = fill(1)
    only = f"error: there is no collection cloths in {place}; there is only pictures"
    for word, rest in reading.items():
        assert refused(word, *rest, "--collection", "cloths") == only
    Index(place, index.encoder_id, DIMENSION, "shapes").upsert(items, np.ones((1, DIMENSION)))
    several = f"error: there is no collection cloths in {place}; there are pictures, shapes"
    for words in (("drop", "cloths", "--yes"), ("rename", "cloths", "hats"), ("alias", "live", "cloths")):
        assert refused(*words) == several
    for words in (("duplicates", "--index", place), ("index", "copy", place, tmp_path / "other")):
        with pytest.raises(SystemExit) as ended:
            twinview(*words, "--collection", "cloths")
        assert ended.value.code == several
    assert not out.exists() and not (tmp_path / "other").exists()


def test_adding_to_a_collection_of_another_encoder_offers_what_there_is_to_choose(
    refused, fill, place, make_bundle, tmp_path
):
    fill(2)
    (tmp_path / "mine").mkdir()
    other = make_bundle(tmp_path / "an other", 1 / 100)
    sentence = refused("add", "--data", tmp_path / "mine", "--encoder", other.folder)
    assert f"pictures in {place} has 2 items with vectors of means-" in sentence
    assert "Name another collection with --collection, or another index with --index" in sentence
    command = sentence.partition("before: ")[2]
    assert command == f"twinview index reembed --index {place} --collection pictures --encoder '{other.folder}'"


@pytest.mark.slow
def test_an_index_is_copied_and_copied_again(twinview, fill, place, tmp_path, bundle, capsys):
    fill(3)
    for counts in ("3 sent, 0 already there", "0 sent, 3 already there"):
        twinview("index", "copy", place, tmp_path / "other")
        assert f"pictures of {bundle.card.id}: {counts}; compared and equal" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: there is no index at .*nowhere$"):
        twinview("index", "copy", tmp_path / "nowhere", tmp_path / "other")


def test_a_copy_asks_before_it_deletes(twinview, fill, index, tmp_path):
    items = fill(3)
    twinview("index", "copy", tmp_path / "index", tmp_path / "other")
    index.delete([items[0].id])
    with pytest.raises(SystemExit, match=r"Delete 1 item from .*other that .*index does not have"):
        twinview("index", "copy", tmp_path / "index", tmp_path / "other")
    other = Index(tmp_path / "other", index.encoder_id, index.dimension)
    assert other.count() == 3
    twinview("index", "copy", tmp_path / "index", tmp_path / "other", "--yes")
    assert other.ids() == index.ids()
