import csv
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from serving.collection.index import Index, Item, unit
from serving.curation import neighbours as compared
from serving.curation import odd
from serving.curation.broken import blur, brightest, contrast, defect, white_share
from serving.curation.neighbours import neighbours
from serving.curation.odd import LEAST, label_doubts, outlier_factors
from serving.curation.odd_items import FINDERS
from serving.protocol.filters import Filter

D = 16


def groups(sizes: list[int], spread: float | list[float] = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (n, D) in groups around D directions, and the group of each."""
    rng = np.random.default_rng(0)
    of = np.repeat(np.arange(len(sizes)), sizes)
    spreads = np.broadcast_to(spread, len(sizes))[of][:, None]
    return unit(np.eye(D)[of] + spreads * rng.standard_normal((len(of), D))), of


# Neighbours -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(2, 1), (5, 4), (50, 20), (700, 100), (1001, 7)])
def test_the_nearest_neighbours_are_those_of_comparing_each_pair(n, k, monkeypatch):
    monkeypatch.setattr(compared, "BLOCK", 7 * n)  # seven rows at once
    vectors = unit(np.random.default_rng(n).standard_normal((n, D)))
    rows, cosines = neighbours(vectors, k)
    every = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    for i in range(n):
        others = sorted((j for j in range(n) if j != i), key=lambda j: -every[i, j])[:k]
        assert set(rows[i]) == set(others)
        np.testing.assert_allclose(cosines[i], every[i, others], atol=1e-6)
        np.testing.assert_allclose(every[i, rows[i]], cosines[i], atol=1e-6)


@pytest.mark.parametrize("k", [0, 3, 4])
def test_there_are_neighbours_other_than_the_picture_itself(k):
    with pytest.raises(ValueError, match=f"k must be from 1 to 2, not {k}"):
        neighbours(np.eye(3, dtype=np.float32), k)


# Outliers -------------------------------------------------------------------------------------------------------------


def test_a_picture_far_from_all_is_the_first_outlier():
    vectors, _ = groups([60, 60])
    vectors[70] = np.eye(D)[9]
    factors = outlier_factors(vectors)
    assert factors.argmax() == 70 and factors[70] > 3
    assert np.median(factors) == pytest.approx(1, abs=0.1)


def test_a_picture_outside_a_dense_group_is_an_outlier_beside_a_loose_group():
    vectors, of = groups([150, 150], [0.01, 0.2])
    vectors[0] = unit(np.eye(D)[[0]] + 0.2 * np.random.default_rng(1).standard_normal((1, D)))[0]
    distance = np.sqrt(2 - 2 * neighbours(vectors, 37)[1]).mean(axis=1)
    assert distance[0] < distance[of == 1].min()  # all pictures of the loose group are farther from their neighbours
    assert outlier_factors(vectors).argmax() == 0


def test_aliens_that_resemble_each_other_are_outliers():
    vectors, of = groups([400, 60], 0.1)
    assert set(np.argsort(-outlier_factors(vectors))[:60]) == set(np.flatnonzero(of == 1))


def test_pictures_near_copies_are_no_outliers():
    vectors, _ = groups([200, 150], [0.1, 0])  # the second group is one picture, 150 times
    vectors[200] = unit(np.eye(D)[[1]] + 0.02 * np.random.default_rng(1).standard_normal((1, D)))[0]
    factors = outlier_factors(vectors)
    assert factors[200] < 2
    assert np.isfinite(outlier_factors(np.ones((LEAST, D), np.float32) / 4)).all()


# Labels ---------------------------------------------------------------------------------------------------------------


def test_wrong_labels_come_first_and_the_true_ones_are_suggested():
    vectors, of = groups([80, 60, 40], 0.2)
    given, wrong = of.copy(), [3, 50, 100, 170]
    given[wrong] = (of[wrong] + 1) % 3
    suggested, score = label_doubts(vectors, given)
    assert set(np.argsort(-score)[:4]) == set(wrong)
    np.testing.assert_array_equal(suggested, of)
    others = np.setdiff1d(np.arange(len(of)), wrong)
    np.testing.assert_array_equal(score[others], 1)
    assert score[wrong].min() > 10


def test_a_rare_label_is_not_suggested_for_pictures_near_its_only_one():
    vectors, of = groups([100, 100], 0.2)
    given = of.copy()
    given[0] = 2  # the only one of its kind, among pictures of another label
    assert 2 not in label_doubts(vectors, given).suggested[1:]


def test_a_label_among_a_commoner_one_counts_by_its_usual_share():
    """Half of the neighbours of label 1's pictures have label 0: a share of a half is much for label 1."""
    rng = np.random.default_rng(0)
    vectors = unit(np.concatenate([np.eye(D)[np.zeros(300, int)], np.eye(D)[np.ones(60, int)]]) + 0)
    vectors = unit(vectors + 0.15 * rng.standard_normal(vectors.shape))
    given = np.concatenate([np.zeros(300, int), rng.permutation(np.repeat([0, 1], [33, 27]))])
    suggested, _ = label_doubts(vectors, given)
    assert suggested[300:].mean() > 0.9 and suggested[:300].mean() == 0


def test_what_all_pictures_share_makes_no_difference():
    vectors, of = groups([60, 60], 0.2)
    given = np.where(np.arange(120) == 7, 1, of)
    alike = unit(vectors + 20 * np.eye(D)[15])
    assert (alike @ alike.T).min() > 0.99
    assert label_doubts(alike, given).score.argmax() == 7
    assert label_doubts(alike, given).score[7] > 10


def test_labels_of_many_pictures_are_compared_in_parts(monkeypatch):
    vectors, of = groups([30, 30], 0.3)
    whole = label_doubts(vectors, of)
    monkeypatch.setattr(odd, "SHARES", 14)
    for part, all_at_once in zip(label_doubts(vectors, of), whole, strict=True):
        np.testing.assert_array_equal(part, all_at_once)


# Broken ---------------------------------------------------------------------------------------------------------------


def scene(size: tuple[int, int] = (240, 180)) -> Image.Image:
    """Squares of many colours, as sharp as can be."""
    colours = np.random.default_rng(0).integers(20, 236, (9, 12, 3), np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)


def changed(factor: float = 1, plus: float = 0) -> Image.Image:
    return Image.fromarray((np.asarray(scene(), float) * factor + plus).clip(0, 255).astype(np.uint8))


def product() -> Image.Image:
    """Squares on a white background that is most of the picture."""
    picture = Image.new("RGB", (240, 180), "white")
    picture.paste(scene((110, 100)), (65, 40))
    return picture


BROKEN = {
    "dark": changed(0.2),
    "over_exposed": changed(3, 80),
    "empty": Image.fromarray(np.random.default_rng(0).normal(120, 4, (180, 240, 1)).repeat(3, 2).astype(np.uint8)),
    "blurred": scene().filter(ImageFilter.GaussianBlur(6)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_picture_is_named(name):
    found = defect(BROKEN[name])
    assert found is not None and found.name == name and 0 < found.severity <= 1


@pytest.mark.parametrize("picture", [scene(), product(), changed(0.5), changed(1.2), scene((24, 24))])
def test_an_ordinary_picture_has_no_defect(picture):
    assert defect(picture) is None


@pytest.mark.parametrize(("colour", "name"), [("black", "dark"), ("white", "over_exposed"), ("grey", "empty")])
def test_a_blank_picture_is_named_by_its_cause_in_any_size(colour, name):
    for size in ((1, 1), (3, 200), (256, 256)):
        assert defect(Image.new("RGB", size, colour)).name == name


def test_a_faint_and_blurred_picture_is_empty():
    waves = 128 + 10 * np.sin(np.arange(240) * np.pi / 30)
    picture = Image.fromarray(np.tile(waves, (180, 1)).round().astype(np.uint8)).convert("RGB")
    assert blur(picture) > 0.6 and defect(picture).name == "empty"


def test_the_measures_are_those_of_their_sentences():
    grey = np.zeros((100, 100), np.uint8)
    grey[:10] = 102
    assert brightest(Image.fromarray(grey).convert("RGB")) == pytest.approx(0.4)
    grey[4:] = 0
    assert brightest(Image.fromarray(grey).convert("RGB")) == 0
    assert contrast(Image.fromarray(grey).convert("RGB")) == pytest.approx(0.4 * np.sqrt(0.04 * 0.96))
    white = np.zeros((100, 100, 3), np.uint8)
    white[25:50, 25:75] = 250
    white[:20] = 255
    assert white_share(Image.fromarray(white)) == 0.5
    white[..., 2] = 249
    assert white_share(Image.fromarray(white)) == 0


def test_blur_is_that_of_the_paper():
    """Crété et al. 2007, Eq. 1 to 7, in loops."""
    grey = np.random.default_rng(0).integers(0, 256, (12, 15)).astype(float)

    def along_rows(grey: np.ndarray) -> float:
        height, width = grey.shape
        blurred = np.array(
            [[np.mean([grey[y, min(max(x + i, 0), width - 1)] for i in range(-4, 5)]) for x in range(width)]
             for y in range(height)]
        )  # fmt: skip
        own = stays = 0.0
        for y in range(height):
            for x in range(1, width):
                difference = abs(grey[y, x] - grey[y, x - 1])
                own += difference
                stays += difference - max(0, difference - abs(blurred[y, x] - blurred[y, x - 1]))
        return stays / own

    picture = Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    assert blur(picture) == pytest.approx(max(along_rows(grey), along_rows(grey.T)))


# The command ----------------------------------------------------------------------------------------------------------


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


@pytest.fixture
def collection(tmp_path, monkeypatch):
    """An index of 60 pictures in two groups, cats of 2020 and dogs of 2021. 0.png is more like a dog, and 59.png, which
    has no label, like neither. Pictures 1 to 4 are broken, 5 has no thumbnail, and that of 6 cannot be read."""
    monkeypatch.chdir(tmp_path)
    vectors, of = groups([30, 30])
    vectors[[0, 59]] = unit([0.6 * np.eye(D)[0] + np.eye(D)[1], np.eye(D)[9]])
    items = [
        Item(f"{i:032x}", f"{i}.png", ("cat", "dog")[of[i]], f"/p/{i}.png", metadata={"year": 2020 + int(of[i])})
        for i in range(60)
    ]
    items[59] = replace(items[59], label=None)
    pictures = dict(enumerate(BROKEN.values(), 1))
    thumbnails = {item.id: jpeg(pictures.get(i, scene())) for i, item in enumerate(items) if i != 5}
    thumbnails[items[6].id] = b"no picture"
    index = Index(tmp_path / "index", "means-1", D)
    index.upsert(items, vectors, thumbnails)
    return index


def listed(path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_outliers_are_listed_with_their_factor(collection, tmp_path, twinview, capsys):
    twinview("odd", "--k", "2")
    said = capsys.readouterr()
    assert said.err == "looking at 60 pictures of pictures\n"
    ranked = "60 of 60 pictures of pictures are ranked by how unlike the others they are"
    assert said.out == f"{ranked}; the first 2 are listed in {tmp_path}/odd.csv\n"
    rows = listed(tmp_path / "odd.csv")
    assert len(rows) == 2 and list(rows[0]) == ["id", "name", "path", "label", "outlier_factor"]
    first = {"id": f"{59:032x}", "name": "59.png", "path": "/p/59.png", "label": ""}
    assert rows[0] == first | {"outlier_factor": rows[0]["outlier_factor"]}
    assert rows[1]["name"] == "0.png"
    assert float(rows[0]["outlier_factor"]) > float(rows[1]["outlier_factor"]) > 2


def test_doubtful_labels_are_listed_with_the_suggested_one(collection, tmp_path, twinview, capsys):
    twinview("odd", "--kind", "labels", "--output", "out/labels.csv")
    assert capsys.readouterr().out == (
        "1 of 59 pictures of pictures have neighbours of another label; they are listed in "
        f"{tmp_path}/out/labels.csv; 1 picture without a label left out\n"
    )
    (row,) = listed(tmp_path / "out" / "labels.csv")
    assert list(row)[4:] == ["suggested_label", "score"] and float(row["score"]) > 2
    assert (row["name"], row["label"], row["suggested_label"]) == ("0.png", "cat", "dog")


def test_the_most_doubtful_labels_come_first_and_no_more_than_asked_for(collection, tmp_path, twinview):
    collection.change({f"{i:032x}": {"label": "cat"} for i in (40, 41)})
    twinview("odd", "--kind", "labels", "--output", "all.csv")
    rows = listed(tmp_path / "all.csv")
    assert sorted(row["name"] for row in rows) == ["0.png", "40.png", "41.png"]
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True) and rows[-1]["name"] == "0.png"
    twinview("odd", "--kind", "labels", "--k", "2", "--output", "two.csv")
    assert listed(tmp_path / "two.csv") == rows[:2]


def test_broken_pictures_are_listed_with_what_is_wrong(collection, tmp_path, twinview, capsys):
    twinview("odd", "--kind", "broken")
    assert capsys.readouterr().out == (
        "4 of 58 pictures of pictures are dark, over-exposed, empty or blurred; they are listed in "
        f"{tmp_path}/odd.csv; 2 pictures without a readable thumbnail left out\n"
    )
    rows = listed(tmp_path / "odd.csv")
    assert list(rows[0])[4:] == ["problem", "value"]
    assert {row["name"]: row["problem"] for row in rows} == {f"{i}.png": name for i, name in enumerate(BROKEN, 1)}
    assert [row["problem"] for row in rows] == ["blurred", "empty", "dark", "over_exposed"]  # by severity
    for row, value in zip(rows, (float(row["value"]) for row in rows), strict=True):
        assert value < 0.3 if row["problem"] in ("dark", "empty") else value > 0.25
    twinview("odd", "--kind", "broken", "--k", "2", "--output", "two.csv")
    assert listed(tmp_path / "two.csv") == rows[:2]


def test_only_pictures_that_match_are_compared(collection, tmp_path, twinview):
    twinview("odd", "--where", "year=2020", "--output", "old.csv")
    rows = listed(tmp_path / "old.csv")
    assert len(rows) == 30 and rows[0]["name"] == "0.png"  # a dog among cats
    twinview("odd", "--kind", "broken", "--where", "year=2021", "--output", "new.csv")
    assert (tmp_path / "new.csv").read_text() == "id,name,path,label,problem,value\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "0"], "--k 0: must be 1 or more"),
        (["--where", "year=1990"], "pictures with year=1990 has no pictures"),
        (
            ["--where", "name=1.png"],
            "pictures with name=1.png has 1 of the 20 pictures that are needed",
        ),
        (
            ["--kind", "labels", "--where", "label=null"],
            "pictures with label=null has 0 of the 20 pictures with",
        ),
        (
            ["--kind", "labels", "--where", "label=cat"],
            "pictures with label=cat has no label but cat, and",
        ),
        (["--kind", "broken", "--where", "name=5.png"], "pictures with name=5.png has no thumbnail that can be read"),
        (["--collection", "none"], "there is no collection none"),
        (["--output", "taken.csv"], "--output: .*taken.csv exists; name another file"),
        (["--output", "taken.csv/a.csv"], "--output: .*taken.csv/a.csv cannot be written"),
    ],
)
def test_bad_input_is_named(collection, tmp_path, twinview, arguments, message):
    (tmp_path / "taken.csv").write_text("id,label\n1,cat\n")
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        twinview("odd", *arguments)
    assert (tmp_path / "taken.csv").read_text() == "id,label\n1,cat\n"
    assert not (tmp_path / "odd.csv").exists()


def test_an_empty_collection_is_named(collection, twinview):
    collection.delete(sorted(collection.ids()))
    with pytest.raises(SystemExit, match="error: pictures has no pictures"):
        twinview("odd")


# Over HTTP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["outliers", "labels", "broken"])
def test_the_route_lists_what_the_command_lists(connect, http, fill, bundle, tmp_path, kind):
    items = fill(25)
    index = Index(tmp_path / "index", bundle.card.id, bundle.card.dimension)
    index.change({items[i].id: {"label": None} for i in range(5)})
    dark = jpeg(BROKEN["dark"])
    index.upsert([items[3]], index.get(items[3].id)[1][None], {items[3].id: dark})
    where = {"name": {"contains": "."}}
    expected = FINDERS[kind](index, 3, Filter.parse(where))
    found = connect(http).odd(kind, 3, where)
    assert [(item.id, *filter(None, [item.reason]), item.value) for item in found.items] == [
        (item.id, *facts) for item, facts in expected.rows
    ]
    assert (found.odd, found.compared, found.left_out) == (expected.odd, expected.compared, expected.left_out)
    assert len(found.items) == min(3, found.odd) > 0


def test_a_wrong_request_for_odd_items_is_refused_in_a_sentence(http, fill):
    fill(3)
    for body, status, message in (
        ({}, 400, "pictures has 3 of the 20 pictures that are needed to find outliers"),
        ({"kind": "strange"}, 400, "kind: "),
        ({"k": 0}, 400, "k: 0 is given, at least 1 is needed"),
        ({"filter": {"yaer": 2020}}, 400, "filter: "),
    ):
        answer = http.post("/collections/pictures/odd", json=body)
        assert (answer.status_code, answer.json()["error"]["message"].startswith(message)) == (status, True), body
    assert http.post("/collections/none/odd").status_code == 404
    with http.app.state.engine.comparisons.gate.admit(1):
        assert http.post("/collections/pictures/odd").status_code == 429
