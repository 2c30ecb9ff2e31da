import asyncio
from contextvars import copy_context

import pytest

from serving.access import MAY_WRITE, READ_ONLY
from serving.client import Change, Changed, Copied, Deleted, Put, PutItem, ServiceError, Undone
from ui.search import acts
from ui.search.acts import AT_ONCE
from ui.search.picture import UploadFailed

MANY = [str(i) for i in range(AT_ONCE + 5)]


def change(id: str, items: int) -> Change:
    return Change(id, "deleted some", "2026-11-29", 0, 0, items, False, True)


@pytest.fixture
def client(fake):
    """Numbers its changes; the item "gone" does not exist, and files that begin with "no" are no images."""

    class Changing(fake):
        refuse_after = 10
        made = 0

        def _change(self, *what, items: int) -> list[str]:
            self.asked.append(what)
            if len(self.asked) > self.refuse_after:
                raise ServiceError("the disk is full", 507, "full")
            self.made += 1
            return [f"c{self.made}"] if items else []

        async def delete_items(self, ids, *, collection="pictures"):
            there = [id for id in ids if id != "gone"]
            return Deleted(there, self._change("delete", len(ids), collection, items=len(there)))

        async def change_items(self, changes, *, collection="pictures"):
            made = self._change("change", changes[0], collection, items=len(changes))
            return Changed([change["id"] for change in changes], made)

        async def copy_items(self, ids, source, *, collection):
            return Copied(ids, self._change("copy", len(ids), source, collection, items=len(ids)))

        async def put_items(self, images, facts, *, collection="pictures"):
            data = [path.read_bytes() for path in images]
            bad = [i for i, one in enumerate(data) if one.startswith(b"no")]
            if bad:
                name = f"images[{bad[0]}] (x.png)"
                raise ServiceError(f"{name} is not an image this service can read", 415, "bad", name)
            made = self._change("put", facts, collection, items=len(data))
            return Put("fake", [PutItem(str(one), True) for one in data], made)

        async def undo(self, id=None, *, collection="pictures"):
            self.asked.append(("undo", id, collection))
            return Undone(change(id, 1), "u", 12)

    return Changing()


def test_removing_says_how_many_and_can_be_undone(client):
    answer = asyncio.run(acts.remove(client, ["a", "gone"], "shop"))
    assert answer == {
        "message": "1 picture removed; files were not touched.",
        "ids": ["a", "gone"],
        "undo": {"collection": "shop", "changes": ["c1"]},
    }
    said = asyncio.run(acts.undo(client, answer["undo"]))
    assert said["message"] == "Undone: the collection shop has 12 pictures now."
    assert client.asked == [("delete", 2, "shop"), ("undo", "c1", "shop")]


def test_what_took_several_requests_is_undone_whole_the_last_first(client):
    answer = asyncio.run(acts.remove(client, MANY, "shop"))
    assert answer["message"].startswith(f"{AT_ONCE + 5:,} pictures removed")
    asyncio.run(acts.undo(client, answer["undo"]))
    assert client.asked[:2] == [("delete", AT_ONCE, "shop"), ("delete", 5, "shop")]
    assert client.asked[2:] == [("undo", "c2", "shop"), ("undo", "c1", "shop")]


def test_nothing_is_offered_to_be_undone_where_nothing_was_changed(client):
    assert asyncio.run(acts.remove(client, ["gone"], "shop"))["undo"] is None


def test_what_was_not_removed_stays_selected(client):
    client.refuse_after = 1
    answer = asyncio.run(acts.remove(client, MANY, "shop"))
    assert answer["ids"] == MANY[:AT_ONCE]
    assert answer["message"] == "1,000 pictures removed; files were not touched. Then an error: the disk is full"


def test_a_visitor_with_a_key_for_reading_changes_nothing(client, uploads):
    asked = copy_context()
    asked.run(MAY_WRITE.set, False)
    for work in (
        acts.remove(client, ["a"], "shop"),
        acts.label(client, ["a"], "x", "shop"),
        acts.copy(client, ["a"], "shop", "other"),
        acts.add(client, [], "shop"),
        acts.undo(client, {"collection": "shop", "changes": ["c1"]}),
    ):
        answer = asked.run(asyncio.run, work)
        assert (answer["message"], answer["undo"], client.asked) == (READ_ONLY, None, [])


def test_labels_are_set_and_removed(client):
    assert (
        asyncio.run(acts.label(client, ["a", "b"], " coat {1} ", "shop"))["message"] == "2 pictures labelled coat {1}."
    )
    assert asyncio.run(acts.label(client, ["a"], " ", "shop"))["message"] == "The labels of 1 picture were removed."
    assert [one[1]["label"] for one in client.asked] == ["coat {1}", None]


def test_pictures_are_put_into_another_collection_whose_change_is_undone(client):
    answer = asyncio.run(acts.copy(client, ["a"], "shop", " coats "))
    assert (answer["message"], answer["undo"]["collection"]) == ("1 picture put into the collection coats.", "coats")
    assert client.asked == [("copy", 1, "shop", "coats")]
    refused = asyncio.run(acts.copy(client, ["a"], "shop", "my coats"))
    assert "'my coats' cannot be the name of a collection" in refused["message"] and len(client.asked) == 1


def test_files_are_added_but_those_that_are_no_images_which_are_named(client, uploads):
    for name, content in (("a", b"yes"), ("b", b"no"), ("c", b"yes too")):
        (uploads / name).write_bytes(content)
    files = [{"path": str(uploads / name), "name": f"red/{name}.png", "label": "red"} for name in "abc"]
    answer = asyncio.run(acts.add(client, files, "shop"))
    assert answer["failed"] == ["red/b.png: is not an image this service can read"]
    assert [one["name"] for what in client.asked for one in what[1]] == ["red/a.png", "red/c.png"]
    assert answer["undo"] == {"collection": "shop", "changes": ["c2", "c1"]}
    assert list(uploads.iterdir()) == [], "uploads are not kept"


def test_adding_ends_with_the_first_error_that_is_not_about_a_picture(client, uploads):
    client.refuse_after = 0
    for name in "ab":
        (uploads / name).write_bytes(b"yes")
    files = [{"path": str(uploads / name), "name": f"{name}.png"} for name in "ab"]
    answer = asyncio.run(acts.add(client, files, "shop"))
    assert (answer["message"], answer["failed"], len(client.asked)) == ("the disk is full", [], 1)
    assert list(uploads.iterdir()) == []


def test_no_file_of_this_machine_is_added_but_uploads(client, uploads, tmp_path):
    (tmp_path / "secret").write_bytes(b"yes")
    with pytest.raises(UploadFailed):
        asyncio.run(acts.add(client, [{"path": str(tmp_path / "secret"), "name": "x"}], "shop"))
    assert (tmp_path / "secret").exists() and client.asked == []


def test_all_but_some_of_what_is_shown_are_chosen(fake):
    client = fake(count=5)
    chosen = {"all": True, "chosen": [["id1", None]], "where": ["price>=3"], "encoder": "tiny", "collection": "shop"}
    assert asyncio.run(acts.chosen_ids(client, chosen)) == ["id0", "id2", "id3", "id4"]
    assert client.asked[0][3:] == ({"price": {"gte": 3}}, "shop", "tiny")
    assert asyncio.run(acts.chosen_ids(client, {"all": False, "chosen": [["id1", "0.9"]]})) == ["id1"]
    assert asyncio.run(acts.chosen_ids(client, {"ids": ["x"]})) == ["x"]
