"""Names of collections: renaming and aliases, in a folder, in an object store, over HTTP and on the command line."""

import json
import logging
import threading

import numpy as np
import pytest

from serving.collection import names
from serving.collection.index import Index, IndexProblem, Item, collections
from serving.collection.names import delete_alias, names_of
from serving.collection.problems import BadName, NothingToUndo
from serving.collection.undo import undo
from serving.derived.task import Derived
from serving.indexing import transfer

D = 8


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def place(request, tmp_path) -> str:
    return str(tmp_path / "index") if request.param == "folder" else request.getfixturevalue("s3")


def put(place, name: str, *ids: str, encoder: str = "enc") -> Index:
    """The collection with items of these ids, whose files name the collection."""
    index = Index(place, encoder, D, name)
    items = [Item(id, id, None, None, 4, 3, len(name)) for id in ids]
    files = {id: name.encode() for id in ids}
    index.upsert(items, np.eye(D)[: len(ids)], files, True, files)
    return index


def held(place, name: str) -> tuple[set[str], set[bytes | None]]:
    """Ids of a collection, and what its files say."""
    index = Index(place, "enc", D, name)
    return index.ids(), {index.read_original(id) for id in index.ids()}


def listed(place) -> list[str]:
    return sorted(facts.name for facts in collections(place))


def test_a_renamed_collection_has_everything_and_its_old_name_is_free(place):
    old = put(place, "old", "a", "b")
    put(place, "old", "a", encoder="other")
    old.delete(["b"])
    Index(place, "enc", D, "old").add_folders(["/pictures"])
    Index(place, "enc", D, "old").rename("new")
    assert listed(place) == ["new", "new"]
    assert held(place, "new") == ({"a"}, {b"old"})
    new = Index(place, "enc", D, "new")
    assert (new.folders(), new.verify(), new.facts().others) == (["/pictures"], [], ["other"])
    undo(new)
    Index(place, "enc", D, "old").create()
    with pytest.raises(NothingToUndo, match=r"^old cannot be undone: no change"):  # not its name in paths
        undo(Index(place, "enc", D, "old"))
    assert held(place, "new") == ({"a", "b"}, {b"old"})
    assert held(place, "old") == (set(), set())
    put(place, "old", "z")
    assert listed(place) == ["new", "new", "old"]
    assert (held(place, "old"), held(place, "new")) == (({"z"}, {b"old"}), ({"a", "b"}, {b"old"}))


def test_names_can_go_round_in_a_circle(place):
    put(place, "one", "a")
    put(place, "two", "b")
    for old, new in (("one", "three"), ("two", "one"), ("three", "two")):
        Index(place, "enc", D, old).rename(new)
    assert (held(place, "one"), held(place, "two")) == (({"b"}, {b"two"}), ({"a"}, {b"one"}))
    Index(place, "enc", D, "one").drop()
    put(place, "one", "c")
    assert (held(place, "one")[0], held(place, "two")[0]) == ({"c"}, {"a"})
    assert listed(place) == ["one", "two"]


def test_who_writes_while_a_collection_is_renamed_writes_to_it(place):
    index = put(place, "old", "a")
    Index(place, "enc", D, "old").rename("new")
    index.upsert([Item("late", "late", None, None)], np.ones((1, D)))
    assert held(place, "new")[0] == {"a", "late"}


def test_what_was_begun_under_a_name_that_another_collection_gets_is_refused(place):
    begun = Index(place, "enc", D, "new")
    put(place, "old", "a").rename("new")
    with pytest.raises(IndexProblem, match="has been renamed to new just now; try again"):
        begun.upsert([Item("b", "b", None, None)], np.ones((1, D)))
    assert (listed(place), held(place, "new")[0]) == (["new"], {"a"})
    put(place, "new", "b")
    assert held(place, "new")[0] == {"a", "b"}


def test_an_alias_stands_for_one_collection_after_the_other(place):
    put(place, "v1", "a")
    put(place, "v2", "b")
    Index(place, "enc", D, "v1").set_alias("live")
    assert Index(place, "enc", D, "live").name == "v1"
    assert held(place, "live") == held(place, "v1")
    Index(place, "enc", D, "v2").set_alias("live")
    assert held(place, "live") == held(place, "v2")
    assert {facts.name: facts.aliases for facts in collections(place)} == {"v1": [], "v2": ["live"]}
    Index(place, "enc", D, "v2").rename("v3")
    assert Index(place, "enc", D, "live").name == "v3"
    delete_alias(Index(place, "enc", D).store, "live")
    assert held(place, "live") == (set(), set())


@pytest.mark.slow
def test_in_an_object_store_a_process_sees_its_own_changes_of_names_at_once(s3, monkeypatch):
    monkeypatch.setenv("TWINVIEW_CONSISTENCY_S", "3600")
    put(s3, "old", "a").rename("new")
    assert (held(s3, "new")[0], held(s3, "old")[0]) == ({"a"}, set())
    Index(s3, "enc", D, "new").set_alias("live")
    assert Index(s3, "enc", D, "live").name == "new"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda index: index.rename("taken"), "There is a collection taken already"),
        (lambda index: index.rename("live"), "There is an alias live already"),
        (lambda index: index.rename("a/b"), "is not a collection's name"),
        (lambda index: index.set_alias("taken"), "There is a collection taken already"),
        (lambda index: index.set_alias("../x"), "is not a collection's name"),
        (lambda index: index.drop(), "taken has the alias live; delete that first"),
        (lambda index: delete_alias(index.store, "other"), "There is no alias other"),
    ],
)
def test_names_that_are_taken_or_not_allowed_are_refused_by_name(tmp_path, call, message):
    index = put(tmp_path, "taken", "a")
    index.set_alias("live")
    with pytest.raises(BadName, match=message):
        call(index)
    assert (held(tmp_path, "live")[0], listed(tmp_path)) == ({"a"}, ["taken"])


def test_many_changes_of_names_at_once_are_all_kept(tmp_path):
    index = put(tmp_path, "one", "a")
    threads = [threading.Thread(target=index.set_alias, args=(f"alias-{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert index.facts().aliases == [f"alias-{i}" for i in range(8)]


def test_who_holds_the_names_for_long_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "WAIT_S", 0)
    index = put(tmp_path, "one", "a")
    with index.store.lease("names"), pytest.raises(IndexProblem, match="are being changed by another process"):
        index.set_alias("live")


def test_a_damaged_file_of_names_is_named(tmp_path):
    index = put(tmp_path, "one", "a")
    index.store.write(names.FILE, b"{")
    with pytest.raises(IndexProblem, match=r"names\.json is damaged"):
        names_of(index.store)


def test_a_copy_has_the_name_that_is_shown(tmp_path):
    put(tmp_path / "ours", "old", "a").rename("new")
    for pair in transfer.tables_to_copy(str(tmp_path / "ours"), str(tmp_path / "theirs")):
        transfer.copy(*pair)
    assert (listed(tmp_path / "theirs"), held(tmp_path / "theirs", "new")) == (["new"], ({"a"}, {b"old"}))


def test_results_stay_with_a_renamed_collection(tmp_path):
    index = put(tmp_path, "old", *"abcd")
    Derived(index, "duplicates").compute()
    index.rename("new")
    assert Derived(Index(tmp_path, "enc", D, "new"), "duplicates").result() is not None
    assert Derived(Index(tmp_path, "enc", D, "old"), "duplicates").result() is None


# Over HTTP ------------------------------------------------------------------------------------------------------------


def test_clients_rename_and_give_aliases(http, fill, connect):
    items, client = fill(3), connect(http)
    assert client.rename_collection("pictures", "photos").name == "photos"
    assert [facts.name for facts in client.collections()] == ["photos"]
    assert client.items(collection="photos").count == 3
    assert http.get("/collections/pictures").status_code == 404
    assert vars(client.set_alias("pictures", "photos")) == {"alias": "pictures", "collection": "photos"}
    assert [vars(alias) for alias in client.aliases()] == [{"alias": "pictures", "collection": "photos"}]
    assert client.collection("pictures").name == "photos"
    assert client.search(positive=[items[0].id], collection="pictures").results
    assert client.collection("photos").aliases == ["pictures"]
    assert client.delete_alias("pictures") == []
    assert http.get("/collections/pictures").status_code == 404


def test_pictures_that_are_put_under_the_old_name_make_another_collection(http, fill, picture):
    def put(number: int) -> None:
        headers = {"Content-Type": "image/png"}
        answer = http.put("/collections/pictures/items", content=picture(number), headers=headers)
        assert answer.status_code == 200, answer.text

    fill(1)
    put(8)
    http.patch("/collections/pictures", json={"name": "photos"})
    put(9)
    counts = {facts["name"]: facts["count"] for facts in http.get("/collections").json()["collections"]}
    assert counts == {"photos": 2, "pictures": 1}


def test_every_answer_about_a_collection_has_the_size_of_its_originals(http, picture):
    file = picture(1)
    http.put("/collections/pictures/items", content=file, headers={"Content-Type": "image/png"})
    answers = [
        http.put("/collections/pictures"),
        http.patch("/collections/pictures", json={"name": "photos"}),
    ]
    assert [answer.json()["originals"] for answer in answers] == [len(file), len(file)]


def test_requests_for_names_that_cannot_be_are_refused_in_words(http, fill):
    fill(1)
    http.put("/collections/other")
    http.put("/aliases/live", json={"collection": "pictures"})

    def refused(method: str, path: str, status: int, **options) -> str:
        answer = http.request(method, path, **options)
        assert answer.status_code == status, answer.text
        return answer.json()["error"]["message"]

    assert "a collection other already" in refused("PATCH", "/collections/pictures", 400, json={"name": "other"})
    assert "no collection none" in refused("PATCH", "/collections/none", 404, json={"name": "new"})
    assert "live is an alias of pictures" in refused("PATCH", "/collections/live", 400, json={"name": "new"})
    assert "live is an alias of pictures" in refused("DELETE", "/collections/live", 400)
    assert "pictures has the alias live" in refused("DELETE", "/collections/pictures", 400)
    assert "a collection other already" in refused("PUT", "/aliases/other", 400, json={"collection": "pictures"})
    message = refused("PUT", "/aliases/new", 404, json={"collection": "none"})
    assert message == "collection: there is no collection none; there are other, pictures"
    assert "no alias other" in refused("DELETE", "/aliases/other", 404)


# On the command line --------------------------------------------------------------------------------------------------


def test_commands_rename_alias_and_drop(twinview, fill, tmp_path, capsys):
    fill(3)

    def command(*words) -> str:
        capsys.readouterr()
        twinview("index", words[0], "--index", tmp_path / "index", *words[1:])
        return capsys.readouterr().out

    assert command("rename", "pictures", "photos") == "renamed pictures to photos\n"
    assert command("alias", "live", "photos") == "live stands for photos\n"
    assert command("list").splitlines()[-1] == "live is an alias of photos"
    assert json.loads(command("list", "--json"))[0]["aliases"] == ["live"]
    assert "photos of" in command("verify", "--collection", "live")
    for words, message in (
        (("drop", "photos"), "pass --yes to confirm"),
        (("drop", "live", "--yes"), "live is an alias of photos"),
        (("drop", "photos", "--yes"), "photos has the alias live"),
        (("drop", "none", "--yes"), "no collection none"),
        (("alias", "live"), "give the collection that live is to stand for, or --delete"),
        (("rename", "live", "new"), "live is an alias of photos"),
    ):
        with pytest.raises(SystemExit) as ended:
            command(*words)
        assert message in str(ended.value.code)
    assert command("alias", "live", "--delete") == "deleted the alias live\n"
    assert command("drop", "photos", "--yes") == "deleted photos with 3 items\n"
    assert "holds no collection" in command("list")


def test_the_log_says_how_many_pictures_of_how_many_collections_are_served(serve, bundle, place, caplog):
    def said() -> str:
        caplog.clear()
        serve(index=place)
        return next(message for message in caplog.messages if message.startswith("serving "))

    vectors = np.ones((3, bundle.card.dimension))
    items = [Item(id, id, None, None, 4, 3, 5) for id in "abc"]
    with caplog.at_level(logging.INFO, "twinview"):
        assert said().endswith(f"; 0 pictures in 0 collections of {place}")
        Index(place, bundle.card.id, bundle.card.dimension, "cloths").upsert(items, vectors)
        assert said().endswith(f"; 3 pictures in 1 collection of {place}")
        Index(place, bundle.card.id, bundle.card.dimension).upsert(items[:1], vectors[:1])
        assert said().endswith(f"; 4 pictures in 2 collections of {place}")
