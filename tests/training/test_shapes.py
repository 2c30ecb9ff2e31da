import colorsys
import csv

import numpy as np
import pytest
from PIL import Image

from training.data import shapes

TRAIN, TEST, SIZE = 200, 50, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    shapes.make(folder, TRAIN, TEST, SIZE)
    return folder


@pytest.fixture(scope="module")
def factors(folder):
    return shapes.factors(folder)


def read(folder, name) -> np.ndarray:
    return np.asarray(Image.open(folder / name))


def outline(kind: str, size: int = 96, turn_deg: float = 0.0) -> np.ndarray:
    """bool (size, size): the inside of an outline turned counter-clockwise, on [-1.2, 1.2]; row 0 is the lowest y."""
    x, y = np.meshgrid(*[np.linspace(-1.2, 1.2, size, dtype=np.float32)] * 2)
    turn = np.deg2rad(turn_deg)
    return shapes.OUTLINES[kind](x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)) < 0


def inside(folder, factors, i) -> np.ndarray:
    """bool (S, S): pixels of picture i nearer to the object's colour than to the background's."""
    picture = read(folder, factors["name"][i]) / 255
    colours = [
        np.array(colorsys.hsv_to_rgb(*(factors[prefix + part][i] for part in ("hue", "saturation", "value"))))
        for prefix in ("", "background_")
    ]
    of_object, behind = (np.linalg.norm(picture - colour, axis=-1) for colour in colours)
    return of_object < behind


def plain(factors, *kinds: str) -> np.ndarray:
    """Indices of pictures of flat colours."""
    flat = (factors["texture"] == "plain") & (factors["background"] == "plain")
    return np.flatnonzero(flat & np.isin(factors["class"], kinds or list(shapes.OUTLINES)))


def test_every_picture_has_one_row_of_factors_and_the_promised_size(folder, factors):
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    assert set(factors["name"]) == files and len(factors["name"]) == TRAIN + TEST
    assert (factors["split"] == "train").sum() == TRAIN
    for name, split, kind in zip(factors["name"], factors["split"], factors["class"], strict=True):
        assert name.startswith(f"{split}/{kind}/")
    assert all(read(folder, name).shape == (SIZE, SIZE, 3) for name in factors["name"][::25])


def test_factors_come_back_as_they_were_written(folder, factors):
    with open(folder / "factors.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    assert list(factors) == list(rows[0])
    for i in (0, TRAIN + TEST - 1):
        for column, values in factors.items():
            assert rows[i][column] == str(values[i])
    assert all(factors[column].dtype == np.float64 for column in shapes.NUMBERS)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_pictures_and_another_seed_others(folder, factors, tmp_path):
    for seed in (0, 1):
        shapes.make(tmp_path / str(seed), TRAIN, TEST, SIZE, seed)
    names = factors["name"]
    assert all(np.array_equal(read(folder, name), read(tmp_path / "0", name)) for name in names)
    assert not any(np.array_equal(read(folder, name), read(tmp_path / "1", name)) for name in names)


def test_no_picture_of_the_test_split_is_in_train(factors):
    split = factors["split"] == "test"
    for column in ("scale", "hue"):
        assert not set(factors[column][split]) & set(factors[column][~split])


def test_classes_have_equal_shares(factors):
    for split, count in (("train", TRAIN), ("test", TEST)):
        _, counts = np.unique(factors["class"][factors["split"] == split], return_counts=True)
        assert counts.tolist() == [count / len(shapes.OUTLINES)] * len(shapes.OUTLINES)


def test_no_other_factor_depends_on_the_class():
    drawn = shapes._draw_factors(np.random.default_rng(0), "train", 20_000)
    of_class = [drawn["class"] == kind for kind in shapes.OUTLINES]
    for column in shapes.NUMBERS:
        values = drawn[column]
        means = np.array([values[rows].mean() for rows in of_class])
        assert np.abs(means - values.mean()).max() < 5 * values.std() / np.sqrt(2000)
    for column in ("texture", "background"):
        kinds = np.unique(drawn[column])
        shares = np.array([[(drawn[column][rows] == kind).mean() for kind in kinds] for rows in of_class])
        assert np.abs(shares - 1 / len(kinds)).max() < 5 * np.sqrt(0.25 / 2000)


def test_object_and_background_differ_in_grey_as_well(factors):
    def luma(prefix):
        parts = zip(*(factors[prefix + part] for part in ("hue", "saturation", "value")), strict=True)
        return np.array([np.dot(colorsys.hsv_to_rgb(*part), (0.299, 0.587, 0.114)) for part in parts])

    assert np.abs(luma("") - luma("background_")).min() > shapes.LEAST_CONTRAST - 1e-6


def test_colours_equal_those_of_colorsys():
    hsv = np.random.default_rng(0).random((100, 3))
    assert np.allclose(shapes._rgb(*hsv.T), [colorsys.hsv_to_rgb(*row) for row in hsv], atol=1e-6)


def test_the_object_is_at_the_place_of_its_factors(folder, factors):
    chosen = plain(factors, "disc", "ring", "gear", "cross", "square", "star")  # symmetrical about their centre
    assert len(chosen) >= 5
    for i in chosen:
        rows, columns = np.nonzero(inside(folder, factors, i))
        assert (columns.mean() + 0.5) / SIZE == pytest.approx(factors["x"][i], abs=0.01)
        assert (rows.mean() + 0.5) / SIZE == pytest.approx(factors["y"][i], abs=0.01)


def test_scale_is_the_diameter_over_the_side(folder, factors):
    discs = plain(factors, "disc")
    assert len(discs) > 0
    for i in discs:
        area = inside(folder, factors, i).mean()
        assert 2 * np.sqrt(area / np.pi) == pytest.approx(0.95 * factors["scale"][i], rel=0.03)


def test_orientation_is_counter_clockwise_as_seen(folder, factors):
    checked = 0
    for i in plain(factors, "crescent"):  # opens to +x, so its weight lies opposite
        rows, columns = np.nonzero(inside(folder, factors, i))
        right, up = (columns.mean() + 0.5) / SIZE - factors["x"][i], factors["y"][i] - (rows.mean() + 0.5) / SIZE
        weight_deg = np.rad2deg(np.arctan2(up, right)) + 180
        assert abs((weight_deg - factors["orientation_deg"][i] + 180) % 360 - 180) < 8
        checked += 1
    assert checked


def test_objects_stay_inside_the_picture(factors):
    for centre in (factors["x"], factors["y"]):
        assert (np.minimum(centre, 1 - centre) - factors["scale"] / 2).min() > shapes.MARGIN - 1e-6


@pytest.mark.parametrize("kind", shapes.OUTLINES)
def test_an_outline_fills_its_circle(kind):
    x, y = np.meshgrid(*[np.linspace(-1.2, 1.2, 96)] * 2)
    radius = np.hypot(x, y)[outline(kind)]
    assert 0.9 < radius.max() < 1.05


@pytest.mark.parametrize("kind", shapes.OUTLINES)
def test_an_outline_is_a_distance_so_that_its_edge_is_one_pixel_soft(kind):
    x, y = np.meshgrid(*[np.linspace(-1.2, 1.2, 400, dtype=np.float32)] * 2)
    distance = shapes.OUTLINES[kind](x, y)
    slope = np.hypot(*np.gradient(distance, 2.4 / 399))[np.abs(distance) < 0.02]
    assert np.median(slope) == pytest.approx(1, abs=0.05)


def test_no_two_outlines_are_similar_at_any_angle():
    turned = {kind: [outline(kind, 64, turn) for turn in range(0, 360, 10)] for kind in shapes.OUTLINES}
    for first in shapes.OUTLINES:
        for second in shapes.OUTLINES:
            if first < second:
                still = outline(first, 64)
                overlap = max((still & moved).sum() / (still | moved).sum() for moved in turned[second])
                assert overlap < 0.8, (first, second, overlap)


@pytest.mark.parametrize("texture", shapes.TEXTURES)
@pytest.mark.parametrize("background", shapes.BACKGROUNDS)
def test_each_texture_and_background_is_drawn_as_named(texture, background):
    rng = np.random.default_rng(0)
    drawn = {column: values[:1] for column, values in shapes._draw_factors(rng, "train", 1).items()}
    drawn |= {"texture": np.array([texture]), "background": np.array([background])}
    drawn |= {"hue": [0.0], "saturation": [0.0], "value": [0.9], "background_value": [0.4], "background_hue": [0.5]}
    drawn |= {"x": [0.5], "y": [0.5], "scale": [0.9]}
    picture = shapes._render(rng, "disc", drawn, 64)[0].astype(int)
    middle, corner = picture[20:44, 20:44, 0], picture[:7, :7, 0]
    assert (np.ptp(middle) == 0) == (texture == "plain")
    assert (np.ptp(corner) == 0) == (background == "plain")


def test_a_set_smaller_than_the_number_of_classes_is_drawn(tmp_path):
    shapes.make(tmp_path, train=3, test=0, size_px=8)
    assert len(list(tmp_path.rglob("*.png"))) == 3
