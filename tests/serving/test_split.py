import csv
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from serving.client import ServiceError
from serving.collection.index import Index, Item, unit
from serving.curation.split import divide, links_of, sets
from serving.curation.split_items import split_items

D = 16


def alone(count: int) -> np.ndarray:
    return np.arange(count)


def test_pictures_stay_together_with_what_they_are_linked_to_through_others():
    links = [(np.array([0, 1]), np.array([1, 2])), links_of(["a", None, "b", None, "b", "c"])]
    of = sets(6, links)
    assert of[0] == of[1] == of[2] == of[4]
    assert len(set(of.tolist())) == 3
    assert sets(3, []).tolist() == [0, 1, 2]


@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.1), (0.5, 0.3, 0.2), (0.72, 0.28)])
def test_single_pictures_are_divided_by_sainte_lague(shares):
    for n in (17, 100):
        parts = divide(alone(n), [None] * n, shares)
        seats = [0] * len(shares)
        for _ in range(n):
            quotients = [share / (2 * count + 1) for share, count in zip(shares, seats, strict=True)]
            best = max(quotients)
            seats[next(i for i, quotient in enumerate(quotients) if quotient > best - 1e-9)] += 1
        assert sorted(np.bincount(parts, minlength=len(shares))) == sorted(seats)


def test_no_part_is_empty_if_there_are_enough_sets():
    assert sorted(np.bincount(divide(alone(3), [None] * 3, (0.8, 0.1, 0.1)))) == [1, 1, 1]
    four = np.repeat(range(4), [18, 18, 17, 17])
    assert np.bincount(divide(four, ["a", "b"] * 35, (0.8, 0.1, 0.1))).tolist() == [36, 17, 17]
    assert np.bincount(divide(four // 2, [None] * 70, (0.8, 0.1, 0.1))).tolist() == [36, 34]


def test_each_part_has_its_share_of_each_label():
    rng = np.random.default_rng(0)
    labels = [str(label) for label in rng.choice(8, 1000, p=np.arange(1, 9) / 36)]
    shares = (0.7, 0.2, 0.1)
    parts = divide(alone(1000), labels, shares)
    for label, count in Counter(labels).items():
        of = np.bincount(parts[np.array(labels) == label], minlength=3)
        np.testing.assert_allclose(of, np.array(shares) * count, atol=1.01)
    np.testing.assert_allclose(np.bincount(parts), np.array(shares) * 1000, atol=1.01)


def test_parts_have_the_size_asked_for_also_with_many_labels_of_two_pictures():
    labels = [str(i // 2) for i in range(600)]
    np.testing.assert_allclose(np.bincount(divide(alone(600), labels, (0.8, 0.1, 0.1))), [480, 60, 60], atol=3)


def test_sets_are_whole_and_labels_are_balanced_around_them():
    """A third of the pictures are in sets of up to 20."""
    rng = np.random.default_rng(1)
    together = np.repeat(np.arange(640), [20] * 10 + [4] * 30 + [1] * 600)
    together = rng.permutation(640)[together]
    labels = [str(label) for label in rng.choice(5, len(together))]
    parts = divide(together, labels, (0.8, 0.1, 0.1))
    assert all(len(set(parts[together == one].tolist())) == 1 for one in range(640))
    np.testing.assert_allclose(np.bincount(parts) / len(parts), [0.8, 0.1, 0.1], atol=0.005)
    for label in set(labels):
        of = parts[np.array(labels) == label]
        np.testing.assert_allclose(np.bincount(of) / len(of), [0.8, 0.1, 0.1], atol=0.015)


def test_a_seed_gives_one_split_and_another_seed_another():
    first = divide(alone(100), [None] * 100, (0.5, 0.5), seed=3)
    assert first.tolist() == divide(alone(100), [None] * 100, (0.5, 0.5), seed=3).tolist()
    assert first.tolist() != divide(alone(100), [None] * 100, (0.5, 0.5), seed=4).tolist()


# The command ----------------------------------------------------------------------------------------------------------


def items_and_vectors(n: int = 60) -> tuple[list[Item], np.ndarray]:
    """n different pictures, each of the first ten followed by a copy at the end, with three labels and four cameras."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((n, D))
    vectors = unit(np.concatenate([vectors, vectors[:10] + 0.01 * rng.standard_normal((10, D))]))
    of = [*range(n), *range(10)]
    items = [
        Item(
            f"{i:032x}",
            f"{i}.png",
            ("cat", "dog", "hat")[one % 3],
            f"/p/{i}.png",
            metadata={"camera": "abcd"[one % 4], "year": 2020 + i % 2},
        )
        for i, one in enumerate(of)
    ]
    return items, vectors


def put(folder, encoder: str, dimension: int) -> Index:
    items, vectors = items_and_vectors()
    index = Index(folder, encoder, dimension)
    index.upsert(items, np.pad(vectors, ((0, 0), (0, dimension - D))))
    return index


@pytest.fixture
def collection(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return put(tmp_path / "index", "means-1", D)


def listed(path) -> dict[str, str]:
    """Returns the part of each picture, by its number."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "name", "path", "label", "part"]
    assert all(row["name"] == f"{int(row['id'], 16)}.png" and row["path"] == f"/p/{row['name']}" for row in rows)
    assert all(row["label"] in ("cat", "dog", "hat") for row in rows)
    return {row["name"][:-4]: row["part"] for row in rows}


def test_the_command_lists_parts_with_the_near_duplicates_together(collection, tmp_path, twinview, capsys):
    twinview("split")
    said = capsys.readouterr().out
    parts = listed(tmp_path / "split.csv")
    assert len(parts) == 70
    assert all(parts[str(i)] == parts[str(60 + i)] for i in range(10))
    counts = Counter(parts.values())
    assert counts["train"] == 56 and counts["validation"] == counts["test"] == 7
    assert f"divided 70 pictures of pictures, listed in {tmp_path}/split.csv\n" in said
    assert "  train: 56 pictures, 80.0%\n  validation: 7 pictures, 10.0%\n  test: 7 pictures, 10.0%\n" in said
    assert "10 groups of near-duplicates" in said and "with 20 pictures: each in one part" in said
    assert "instead of" not in said and "No " not in said
    assert len(collection.ids()) == 70


def test_the_split_does_not_depend_on_the_order_in_which_pictures_were_added(collection, tmp_path, twinview):
    twinview("split", "--output", "one.csv")
    items, vectors = items_and_vectors()
    Index(tmp_path / "turned", "means-1", D).upsert(items[::-1], vectors[::-1])
    twinview("split", "--index", "turned", "--output", "turned.csv")
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "turned.csv").read_bytes()
    twinview("split", "--seed", "1", "--output", "other.csv")
    assert (tmp_path / "one.csv").read_bytes() != (tmp_path / "other.csv").read_bytes()


def test_the_settings_are_followed(collection, tmp_path, twinview, capsys):
    twinview("split", "--group-by", "camera", "--parts", "a=0.75", "b=0.25", "--output", "cameras.csv")
    parts = listed(tmp_path / "cameras.csv")
    for camera in range(4):
        assert len({parts[str(i)] for i in range(60) if i % 4 == camera}) == 1
    assert set(parts.values()) == {"a", "b"}
    twinview("split", "--where", "year=2020", "--output", "2020.csv")
    assert sorted(map(int, listed(tmp_path / "2020.csv"))) == list(range(0, 70, 2))
    capsys.readouterr()
    twinview("split", "--threshold", "1", "--output", "apart.csv")
    assert "No two pictures have a cosine of at least 1" in capsys.readouterr().out
    parts = listed(tmp_path / "apart.csv")
    assert any(parts[str(i)] != parts[str(60 + i)] for i in range(10))


def test_pictures_of_a_label_can_stay_together(collection, tmp_path, twinview, capsys):
    twinview("split", "--group-by", "label", "--parts", "a=0.7", "b=0.3", "--output", "labels.csv")
    parts = listed(tmp_path / "labels.csv")
    assert Counter(parts[str(i)] for i in range(60)) == {"a": 40, "b": 20}
    assert "No cat" not in capsys.readouterr().out


def test_a_part_that_is_far_from_its_size_is_named_with_the_reason(collection, twinview, capsys):
    twinview("split", "--group-by", "camera")
    said = capsys.readouterr().out
    largest = "the largest group that stays together has 18 pictures that are near-duplicates or have the same camera"
    assert f"train has 36 pictures instead of 56: {largest}.\n" in said
    assert f"test has 17 pictures instead of 7: {largest}.\n" in said
    four = ("--where", "name=10.png,12.png,14.png,16.png")
    twinview("split", *four, "--output", "four.csv")
    assert "train has 2 pictures instead of 3.2: there are too few pictures.\n" in capsys.readouterr().out
    twinview("split", *four, "--group-by", "year", "--output", "none.csv")
    said = capsys.readouterr().out
    assert "test has 0 pictures instead of 0.4: the largest group that stays together has 4 pictures that" in said
    twinview("split", "--threshold", "0.001", "--output", "one.csv")
    said = capsys.readouterr().out
    assert "test has 0 pictures instead of 7: the largest group that stays together has 70 pictures" in said


def test_a_label_that_is_not_in_each_part_is_named_with_the_reason(collection, twinview, capsys):
    rare = [Item(f"{1000 + i:032x}", "rare.png", "rare", None) for i in range(2)]
    copies = [Item(f"{2000 + i:032x}", "copy.png", "copied", None) for i in range(4)]
    rng = np.random.default_rng(5)
    one = rng.standard_normal((1, D))
    collection.upsert(rare, unit(rng.standard_normal((2, D))))
    once = [Item(f"{3000 + i:032x}", "once.png", f"x{i}", None) for i in range(10)]
    collection.upsert(once, unit(rng.standard_normal((10, D))))
    collection.upsert(copies, unit(one + 0.005 * rng.standard_normal((4, D))))
    twinview("split")
    said = capsys.readouterr().out
    assert "No copied in " in said and ": it is the label of 4 pictures, in 1 group.\n" in said
    assert "No rare in " in said and ": it is the label of 2 pictures, fewer than the parts.\n" in said
    assert "No x7" in said and "No x8" not in said and "And so for 2 more labels.\n" in said
    assert "No cat" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "a=0.5", "b=0.4"], "--parts a=0.5 b=0.4: the shares add up to 0.9, not to 1"),
        (["--parts", "a=1.1", "b=-0.1"], "--parts a=1.1: must be a name and a share between 0 and 1"),
        (["--parts", "a=0.6", "b=-0.4"], "--parts b=-0.4: must be a name and a share between 0 and 1"),
        (["--parts", "a=nan", "b=0.5"], "--parts a=nan: must be a name and a share between 0 and 1"),
        (["--parts", "train", "0.2"], "--parts train: must be a name and a share between 0 and 1, as train=0.8"),
        (["--parts", "a=0.5", "a=0.5"], "--parts a=0.5 a=0.5: a is there twice"),
        (["--parts", "a=0.999"], "--parts: needs two parts or more"),
        (["--where", "name=3.png"], "pictures has 1 picture with name=3.png, fewer than the 3 --parts"),
        (["--where", "year=1990"], "pictures has 0 pictures with year=1990, fewer than the 3 --parts"),
        (["--group-by", "colour"], "--group-by colour: no picture of pictures has a value of colour"),
        (["--threshold", "1.5"], "--threshold 1.5: must be above 0 and at most 1"),
        (["--seed", "-1"], "--seed -1: must be 0 or more"),
        (["--output", "taken.csv"], "--output: .*taken.csv exists; name another file"),
        (["--output", "taken.csv/a.csv"], "--output: .*taken.csv/a.csv cannot be written"),
    ],
)
def test_bad_input_is_named(collection, tmp_path, twinview, arguments, message):
    (tmp_path / "taken.csv").write_text("mine")
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        twinview("split", *arguments)
    assert (tmp_path / "taken.csv").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "taken.csv"]


def test_shares_may_be_rounded(collection, tmp_path, twinview):
    twinview("split", "--parts", "a=0.333", "b=0.333", "c=0.333")
    assert max(Counter(listed(tmp_path / "split.csv").values()).values()) <= 24


# The route ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(bundle, tmp_path, monkeypatch, connect, http):
    """A client of a service with this collection, in whose folder `twinview` runs."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "index", bundle.card.id, bundle.card.dimension)
    return connect(http)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        ([], {}),
        (
            ["--parts", "a=0.75", "b=0.25", "--group-by", "camera"],
            {"parts": {"a": 0.75, "b": 0.25}, "group_by": "camera"},
        ),
        (["--where", "year=2020", "--seed", "3"], {"filter": {"year": 2020}, "seed": 3}),
        (["--threshold", "1", "--group-by", "label"], {"threshold": 1.0, "group_by": "label"}),
    ],
)
def test_the_route_answers_what_the_command_lists(served, tmp_path, twinview, capsys, arguments, asked):
    answer = served.split(**asked)
    twinview("split", *arguments)
    said = capsys.readouterr().out
    listed_parts = listed(tmp_path / "split.csv")
    assert {str(int(id, 16)): part for part, ids in answer.parts.items() for id in ids} == listed_parts
    assert [ids == sorted(ids) for ids in answer.parts.values()] == [True] * len(answer.parts)
    for part, ids in answer.parts.items():
        assert f"  {part}: {len(ids)} pictures" in said
    count = sum(map(len, answer.together))
    groups = (
        f"{len(answer.together)} groups of near-duplicates (cosine of at least {answer.threshold:g}) with {count} p"
    )
    assert (groups if count else f"No two pictures have a cosine of at least {answer.threshold:g}") in said
    assert said.endswith("".join(f"{note}\n" for note in answer.notes))
    assert bool(answer.notes) == ("instead of" in said or "No cat" in said)


@pytest.mark.slow
def test_the_route_keeps_near_duplicates_together_and_changes_nothing(served):
    before = served.collection()
    answer = served.split()
    assert sorted(map(sorted, answer.together)) == [[f"{i:032x}", f"{60 + i:032x}"] for i in range(10)]
    for pair in answer.together:
        assert sum(set(pair) <= set(ids) for ids in answer.parts.values()) == 1
    assert list(answer.parts) == ["train", "validation", "test"]
    after = served.collection()
    assert (after.version, after.count) == (before.version, before.count)
    assert served.split() == answer
    assert served.split(seed=1).parts != answer.parts
    sizes = [len(group) for group in served.split(threshold=0.6).together]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


def test_pictures_that_were_added_since_near_duplicates_were_looked_for_are_kept_together(collection):
    split_items(collection, {"a": 0.5, "b": 0.5})
    items, vectors = items_and_vectors()
    collection.upsert([replace(items[20], id="added")], vectors[[20]])
    pairs = [{item.id for item in group} for group in split_items(collection, {"a": 0.5, "b": 0.5}).copies]
    assert len(pairs) == 11 and {"added", items[20].id} in pairs


@pytest.mark.slow
def test_the_route_names_bad_input(served, http):
    for asked, status, param, message in (
        ({"parts": {"a": 0.5, "b": 0.4}}, 400, "parts", "parts: the shares add up to 0.9, not to 1"),
        ({"parts": {"a": 1.5, "b": 0.5}}, 400, "parts.a", "parts.a: 1.5 is given, "),
        ({"parts": {"a": 0.5}}, 400, "parts", "parts: "),
        (
            {"filter": {"name": "3.png"}},
            400,
            "parts",
            "parts: pictures has 1 item with this filter, fewer than the 3",
        ),
        ({"filter": {"colour": "red"}}, 400, "filter", "filter: .*colour"),
        ({"group_by": ""}, 400, "group_by", 'group_by: "" is not allowed'),
        ({"group_by": "colour"}, 400, "group_by", "group_by: no item of pictures has a value of colour"),
        ({"threshold": 1.5}, 400, "threshold", "threshold: 1.5 is given"),
        ({"seed": -1}, 400, "seed", "seed: -1 is given"),
        ({"collection": "nothing"}, 404, "name", "there is no collection nothing"),
    ):
        with pytest.raises(ServiceError, match=f"^{message}") as refused:
            served.split(**asked)
        assert (refused.value.status, refused.value.param) == (status, param)
    with http.app.state.engine.comparisons.gate.admit(1):
        assert http.post("/collections/pictures/split").status_code == 429
