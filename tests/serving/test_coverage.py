import csv

import numpy as np
import pytest

from serving.client import ServiceError
from serving.collection.index import Index, Item, unit
from serving.curation import coverage as module
from serving.curation.coverage import coverage
from serving.curation.coverage_items import uncovered_items
from serving.curation.items import read_items

D = 8


def covered_by(a: np.ndarray, by: np.ndarray) -> bool:
    """An independent reference: distances, in plain loops."""
    for row, b in enumerate(by):
        others = sorted(float(np.linalg.norm(b - other)) for i, other in enumerate(by) if i != row)
        if np.linalg.norm(a - b) <= others[2]:
            return True
    return False


@pytest.mark.parametrize(("rows", "columns"), [(1024, 4096), (7, 10)])
def test_a_picture_is_covered_if_it_is_as_near_as_a_third_neighbour(monkeypatch, rows, columns):
    monkeypatch.setattr(module, "ROWS", rows)
    monkeypatch.setattr(module, "COLUMNS", columns)
    rng = np.random.default_rng(0)
    by = unit(rng.standard_normal((40, D)) * np.arange(1, D + 1) ** -1.0)
    asked = unit(rng.standard_normal((60, D)) * np.arange(1, D + 1) ** -0.7)
    found = coverage(asked, by)
    expected = [covered_by(np.float64(a), np.float64(by)) for a in asked]
    assert 15 < sum(expected) < 55
    assert found.covered.tolist() == expected
    cosines = asked.astype(np.float64) @ by.T
    assert found.nearest.tolist() == cosines.argmax(axis=1).tolist()
    np.testing.assert_allclose(found.cosine, cosines.max(axis=1), atol=1e-6)
    without = [covered_by(np.float64(b), np.float64(np.delete(by, row, axis=0))) for row, b in enumerate(by)]
    assert 0.5 < found.usual < 1
    assert found.usual == pytest.approx(np.mean(without))


def test_pictures_of_the_same_kind_are_covered_as_usual_and_others_are_not():
    rng = np.random.default_rng(1)
    both = unit(np.eye(D)[0] + 0.2 * rng.standard_normal((2000, D)))
    found = coverage(both[:1000], both[1000:])
    assert found.covered.mean() == pytest.approx(found.usual, abs=0.03)
    others = coverage(unit(np.eye(D)[1] + 0.2 * rng.standard_normal((100, D))), both)
    assert others.covered.mean() < 0.05


def test_a_copy_is_covered_where_pictures_have_many_copies():
    rng = np.random.default_rng(2)
    many = np.repeat(unit(rng.standard_normal((50, D))), 6, axis=0)
    again = unit(many[::6].astype(np.float64) * rng.uniform(1, 2, (50, 1)))  # rounded in another way
    assert coverage(again, many).covered.all()


# The command ----------------------------------------------------------------------------------------------------------


def put(folder, encoder: str, dimension: int) -> Index:
    """`pictures`: 12 around one direction in 2020, 6 in 2021, two of which point elsewhere; `others`: 8 as in 2020."""
    rng = np.random.default_rng(0)
    near = unit(np.eye(D)[0] + 0.1 * rng.standard_normal((24, D)))
    near[4] = near[12]  # 4 in 2020 is like 12 in 2021
    vectors = near[:18].copy()
    vectors[14] = unit(np.eye(D)[:1] + np.eye(D)[1:2])[0]
    vectors[16] = np.eye(D)[2]
    near, vectors = (np.pad(one, ((0, 0), (0, dimension - D))) for one in (near, vectors))
    index = Index(folder, encoder, dimension)
    items = [Item(f"{i:032x}", f"{i}.png", None, f"/p/{i}.png", metadata={"year": 2020 + i // 12}) for i in range(18)]
    index.upsert(items[::-1], vectors[::-1])
    others = Index(folder, encoder, dimension, "others")
    others.upsert([Item(f"{12 + i:032x}", f"other-{i}.png", "hat", None) for i in range(8)], near[10:18])
    return index


@pytest.fixture
def collections(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return put(tmp_path / "index", "means-1", D)


def listed(path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_command_lists_what_another_part_does_not_cover_the_farthest_first(collections, tmp_path, twinview, capsys):
    twinview("coverage", "--where", "year=2021", "--by-where", "year=2020")
    said = capsys.readouterr().out
    rows = listed(tmp_path / "uncovered.csv")
    assert [row["name"] for row in rows][:2] == ["16.png", "14.png"]
    assert "12.png" not in [row["name"] for row in rows]  # the same as 4
    covered = (6 - len(rows)) / 6
    assert (
        f"{covered:.1%} of 6 pictures of pictures with year=2021 are covered by 12 of pictures with year=2020" in said
    )
    assert f"the {len(rows)} that are not are listed in {tmp_path}/uncovered.csv\n" in said
    assert "in both" not in said
    assert list(rows[0]) == ["id", "name", "path", "label", "cosine", "nearest_id", "nearest_name", "nearest_path"]
    _, vectors = zip(*(collections.get(f"{i:032x}") for i in range(18)), strict=True)
    cosines = np.stack(vectors[:12]) @ vectors[16]
    nearest = int(cosines.argmax())
    assert (rows[0]["id"], rows[0]["path"]) == (f"{16:032x}", "/p/16.png")
    assert (rows[0]["nearest_name"], rows[0]["nearest_path"]) == (f"{nearest}.png", f"/p/{nearest}.png")
    assert rows[0]["nearest_id"] == f"{nearest:032x}"
    assert float(rows[0]["cosine"]) == pytest.approx(float(cosines.max()), abs=1e-4)


def test_another_collection_covers_what_is_in_both(collections, tmp_path, twinview, capsys):
    twinview("coverage", "--by", "others", "--output", "out/others.csv")
    said = capsys.readouterr().out
    assert "of 18 pictures of pictures are covered by 8 of others, of which the others cover " in said
    assert "6 pictures are in both, and so covered.\n" in said
    assert {"16.png", "14.png"} <= {row["name"] for row in listed(tmp_path / "out" / "others.csv")}
    twinview(
        "coverage", "--collection", "others", "--by", "pictures", "--by-where", "year=2020", "--output", "back.csv"
    )
    assert "of 8 pictures of others are covered by 12 of pictures with year=2020" in capsys.readouterr().out
    assert all(row["label"] == "hat" and row["path"] == "" for row in listed(tmp_path / "back.csv"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pictures is compared with itself; give --by another collection, or --where and --by-where"),
        (["--by", "pictures"], "pictures is compared with itself"),
        (["--by", "nothing"], "there is no collection nothing in"),
        (["--by", "foreign"], "foreign holds vectors of other-1, but none of means-1"),
        (["--by", "others", "--where", "year=1990"], "pictures with year=1990 has no pictures"),
        (["--by", "others", "--where", "colour=red"], "No item has the metadata colour|.*colour"),
        (["--by-where", "name=3.png"], "pictures with name=3.png has 1 of the 4 pictures that are needed"),
        (["--by", "others", "--output", "taken.csv"], "--output: .*taken.csv exists; name another file"),
        (["--by", "others", "--output", "taken.csv/a.csv"], "--output: .*taken.csv/a.csv cannot be written"),
    ],
)
def test_bad_input_is_named(collections, tmp_path, twinview, arguments, message):
    Index(tmp_path / "index", "other-1", D, "foreign").upsert([Item("a", "a.png", None, None)], np.ones((1, D)))
    (tmp_path / "taken.csv").write_text("mine")
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        twinview("coverage", *arguments)
    assert (tmp_path / "taken.csv").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "taken.csv"]


def test_pictures_that_are_equally_far_are_listed_by_their_ids(collections, tmp_path):
    collections.upsert([Item(id, f"{id}.png", None, None) for id in ("b", "a")], np.eye(D)[[3, 3]])
    rows = uncovered_items(collections, Index(tmp_path / "index", "means-1", D, "others"), None, None).rows
    assert [item.id for item, _, _ in rows if item.id in ("a", "b")] == ["a", "b"]


# The route ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(bundle, tmp_path, monkeypatch, connect, http):
    """A client of a service with these collections, in whose folder `twinview` runs."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "index", bundle.card.id, bundle.card.dimension)
    return connect(http)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["--where", "year=2021", "--by-where", "year=2020"], {"filter": {"year": 2021}, "by_filter": {"year": 2020}}),
        (["--by", "others"], {"by": "others"}),
        (["--collection", "others", "--by", "pictures"], {"collection": "others", "by": "pictures"}),
    ],
)
def test_the_route_answers_what_the_command_lists(served, tmp_path, twinview, capsys, arguments, asked):
    twinview("coverage", *arguments)
    said, rows = capsys.readouterr().out, listed(tmp_path / "uncovered.csv")
    answer = served.coverage(**asked)
    found = [
        (item.id, item.name, f"{item.similarity:.4f}", item.nearest.id, item.nearest.name) for item in answer.items
    ]
    columns = ("id", "name", "cosine", "nearest_id", "nearest_name")
    assert found == [tuple(row[column] for column in columns) for row in rows]
    assert answer.uncovered == len(rows)
    assert f"{answer.share:.1%} of {answer.compared} pictures of " in said
    assert f" are covered by {answer.by} of " in said and f"the others cover {answer.usual:.1%};" in said
    assert (f"{answer.both} pictures are in both" in said) == (answer.both > 0)


@pytest.mark.slow
def test_the_route_lists_at_most_k_and_changes_nothing(served, http):
    before = [collection.version for collection in served.collections()]
    every = served.coverage("others")
    first = served.coverage("others", 1)
    assert (len(first.items), first.uncovered) == (1, every.uncovered) and every.uncovered > 1
    assert first.items == every.items[:1] and first.items[0].metadata["year"] == 2021
    assert [collection.version for collection in served.collections()] == before
    served.set_alias("alias", "others")
    assert served.coverage("alias") == every


@pytest.mark.slow
def test_vectors_of_two_encoders_are_not_compared(bundle, make_bundle, serve, tmp_path):
    other = make_bundle(tmp_path / "other" / "encoder", scale=1 / 128)
    put(tmp_path / "index", bundle.card.id, bundle.card.dimension)
    put(tmp_path / "its", other.card.id, other.card.dimension)
    items, vectors = read_items(Index(tmp_path / "its", other.card.id, other.card.dimension, "others"))
    Index(tmp_path / "index", other.card.id, other.card.dimension, "its").upsert(items, vectors)
    http = serve(encoder=f"{bundle.folder},{other.folder}")
    answer = http.post("/collections/pictures/coverage", json={"by": "its"})
    assert answer.status_code == 409
    assert answer.json()["error"]["message"].startswith(f"by: its holds vectors of {other.card.id}, and this is ")


@pytest.mark.slow
def test_the_route_names_bad_input(served, http, tmp_path):
    Index(tmp_path / "index", "other-1", D, "foreign").upsert([Item("a", "a.png", None, None)], np.ones((1, D)))
    for asked, status, param, message in (
        ({}, 400, "by", "by: pictures is compared with itself; name another collection, or give filter and by_filter"),
        ({"by": "pictures"}, 400, "by", "by: pictures is compared with itself"),
        ({"by": "nothing"}, 404, "by", "by: there is no collection nothing; there are "),
        ({"by": "../others"}, 400, "by", "by: "),
        (
            {"by": "foreign"},
            409,
            "by",
            "by: foreign holds vectors of other-1, and this is means-.*Name another collection",
        ),
        ({"by": "others", "collection": "nothing"}, 404, "name", "there is no collection nothing"),
        ({"by": "others", "filter": {"year": 1990}}, 400, "filter", "filter: no item of pictures matches"),
        ({"by": "others", "filter": {"colour": "red"}}, 400, "filter", "filter: .*colour"),
        ({"by": "others", "by_filter": {"colour": "red"}}, 400, "by_filter", "by_filter: .*colour"),
        ({"by": "others", "by_filter": {"label": {"like": 1}}}, 400, "by_filter", "by_filter: "),
        ({"by_filter": {"name": "3.png"}}, 400, "by", "by: pictures with by_filter has 1 of the 4 pictures that are n"),
        ({"by": "others", "k": 0}, 400, "k", "k: 0 is given, at least 1 is needed"),
    ):
        with pytest.raises(ServiceError, match=f"^{message}") as refused:
            served.coverage(**asked)
        assert (refused.value.status, refused.value.param) == (status, param)
    with http.app.state.engine.comparisons.gate.admit(1):
        assert http.post("/collections/pictures/coverage", json={"by": "others"}).status_code == 429
