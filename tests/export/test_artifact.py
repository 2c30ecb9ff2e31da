import contextlib
import dataclasses
import hashlib
import io
import json
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from export.artifact import (
    CARD,
    GRAPH,
    BundleError,
    ModelCard,
    Preprocessing,
    TooManyPixels,
    UnreadableImage,
    encoder_id,
    load_bundle,
    open_image,
    preprocess,
    read_image,
    read_pixels,
    record_measured,
    save_bundle,
)
from export.formats import FORMATS

WIDTH, HEIGHT = 48, 32


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def colours() -> np.ndarray:
    """uint8 (H, W, 3): left half red, right half blue, the upper left quarter bright."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, : WIDTH // 2, 0] = 120
    pixels[:, WIDTH // 2 :, 2] = 200
    pixels[: HEIGHT // 2, : WIDTH // 2, 0] = 240
    return pixels


def ramp() -> np.ndarray:
    """float64 (H, W): 0 to 255 from left to right."""
    return np.tile(np.linspace(0, 255, WIDTH), (HEIGHT, 1))


def decoded(data: bytes) -> np.ndarray:
    image = read_image(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def assert_close(actual: np.ndarray, expected: np.ndarray, at_most: int) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected.astype(int)).max() <= at_most


# Formats and modes


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG", "JPEG2000", "AVIF", "MPO"])
def test_every_format_comes_out_as_rgb(format):
    exact = {
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 100, "subsampling": 0},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }
    exact["MPO"] = {"quality": 100, "subsampling": 0, "save_all": True, "append_images": [Image.new("RGB", (9, 9))]}
    data = encode(Image.fromarray(colours()), format, **exact.get(format, {}))
    assert_close(decoded(data), colours(), {"JPEG": 6, "MPO": 6, "AVIF": 3}.get(format, 0))


def test_every_format_named_is_one_that_pillow_opens_by_that_name():
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = colours()
    undo = {  # the picture as a camera stores it, by the definition of the tag
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo))
    assert_close(decoded(encode(stored, "PNG", exif=exif)), upright, 0)
    assert_close(decoded(encode(stored, "JPEG", exif=exif, quality=100, subsampling=0)), upright, 6)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_exif_that_cannot_be_read_does_not_spoil_the_picture(format):
    data = encode(Image.fromarray(colours()), format, exif=b"Exif\0\0garbage")
    assert decoded(data).shape == (HEIGHT, WIDTH, 3)


def test_grey_becomes_three_equal_channels():
    grey = ramp().round().astype(np.uint8)
    assert_close(decoded(encode(Image.fromarray(grey))), np.stack([grey] * 3, axis=-1), 0)


def test_a_palette_is_looked_up():
    image = Image.fromarray(colours()).quantize(8)
    assert image.mode == "P"
    assert_close(decoded(encode(image)), colours(), 2)


def test_one_bit_becomes_black_and_white():
    mask = ramp() > 100
    for format in ("PNG", "TIFF"):
        assert_close(decoded(encode(Image.fromarray(mask), format)), np.stack([mask * 255] * 3, axis=-1), 0)


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_is_not_inverted(format):
    options = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    data = encode(Image.fromarray(colours()).convert("CMYK"), format, **options)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert_close(decoded(data), colours(), 8)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(format):
    deep = (ramp() * 257).astype(np.uint16)
    data = encode(Image.fromarray(deep), format)
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    assert_close(decoded(data), np.stack([ramp()] * 3, axis=-1), 1)


@pytest.mark.parametrize("top", [1, 255])
def test_a_float_tiff_of_either_range_is_scaled(top):
    data = encode(Image.fromarray((ramp() / 255 * top).astype(np.float32)), "TIFF")
    assert_close(decoded(data), np.stack([ramp()] * 3, axis=-1), 1)


def test_nan_in_a_float_tiff_affects_only_its_own_pixel():
    values = (ramp() / 255).astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    assert_close(decoded(encode(Image.fromarray(values), "TIFF"))[1:], np.stack([ramp()] * 3, axis=-1)[1:], 1)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_transparency_becomes_white(mode):
    image = Image.fromarray(colours()).convert("RGBA")
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[:, WIDTH // 2 :] = 255
    image.putalpha(Image.fromarray(alpha))
    image = image.quantize(16) if mode == "P" else image.convert(mode)
    pixels = decoded(encode(image))
    assert (pixels[:, : WIDTH // 2] == 255).all()
    blue = [23, 23, 23] if mode == "LA" else [0, 0, 200]  # 0.114 * 200 is its luma
    assert np.abs(pixels[:, WIDTH // 2 :] - blue).max() <= 2


def test_half_transparent_is_half_white():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert decoded(encode(image)).tolist() == [[[127] * 3] * 4] * 4


def test_a_transparent_colour_of_an_rgb_png_is_white():
    data = encode(Image.fromarray(colours()), transparency=(0, 0, 200))
    assert (decoded(data)[:, WIDTH // 2 :] == 255).all()


def test_the_first_frame_of_an_animation_is_read():
    frames = [Image.fromarray(colours()), Image.new("RGB", (WIDTH, HEIGHT), "white")]
    assert_close(decoded(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])), colours(), 0)


# What does not decode


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"a list of things to buy\n" * 50, "is not an image in a supported format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG drawing, which is not a supported format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is not an image in a supported format"),
        (b"\x89PNG\r\n\x1a\n", "is a damaged or incomplete PNG file"),
        (b"\xff\xd8\xff", "is a damaged or incomplete JPEG file"),
    ],
    ids=["empty", "text", "svg", "eps", "png signature", "jpeg signature"],
)
def test_bytes_that_are_not_an_image_are_refused_with_the_reason(data, reason):
    for read in (read_image, lambda data: read_pixels(data, Preprocessing(8))):
        with pytest.raises(UnreadableImage) as raised:
            read(data)
        assert str(raised.value) == reason


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_image_is_refused(format, share):
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), format)
    with pytest.raises(UnreadableImage):
        read_image(data[: int(len(data) * share)])


def test_a_flipped_bit_never_raises_anything_else():
    rng = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF"):
        data = encode(Image.fromarray(colours()), format)
        for _ in range(40):
            damaged = bytearray(data)
            damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
            with contextlib.suppress(UnreadableImage):
                assert read_image(bytes(damaged), max_pixels=10**6).mode == "RGB"


def test_too_many_pixels_are_refused_by_the_header_alone():
    bomb = png_header(100_000, 100_000)
    with pytest.raises(TooManyPixels, match="has 100000 x 100000 pixels; at most 134,217,728 are read"):
        read_image(bomb + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))


def test_the_limit_counts_pixels_and_includes_itself():
    data = encode(Image.new("RGB", (10, 10)))
    assert read_image(data, max_pixels=100).size == (10, 10)
    with pytest.raises(TooManyPixels, match="at most 99 are read"):
        read_image(data, max_pixels=99)


def tile_of(side_px: int) -> bytes:
    """A TIFF of 64 x 64 pixels that announces one tile of side_px on each side."""
    data = encode(Image.new("RGB", (64, 64)), "TIFF", compression="tiff_lzw")
    tags = struct.unpack("<I", data[4:8])[0]
    count = struct.unpack("<H", data[tags : tags + 2])[0]
    entries = [data[tags + 2 + 12 * i : tags + 14 + 12 * i] for i in range(count)]
    entries = [entry for entry in entries if entry[:2] != struct.pack("<H", 278)]  # no strips
    entries += [struct.pack("<HHII", tag, 4, 1, side_px) for tag in (322, 323)]
    table = struct.pack("<H", len(entries)) + b"".join(sorted(entries, key=lambda entry: entry[:2])) + b"\0" * 4
    return b"II*\0" + struct.pack("<I", len(data)) + data[8:] + table


def with_scans(count: int) -> bytes:
    """A progressive JPEG of 100 x 100 pixels, its scans repeated."""
    data = encode(Image.fromarray(colours()).resize((100, 100)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode(Image.new("1", (2**18 + 1, 1))), "has 262145 x 1 pixels; at most 262,144 are read on a side"),
        (tile_of(30_000), "has 64 x 64 pixels, as much work as 900,000,000 of a simpler format"),
        (with_scans(4_000_000 // 10_000 * 16), "has 100 x 100 pixels, as much work as 4,0"),
    ],
    ids=["one long row", "a tile", "scans"],
)
def test_pictures_of_few_pixels_that_need_much_memory_or_time_are_refused(data, reason):
    with pytest.raises(TooManyPixels, match=reason):
        open_image(data, max_work=4_000_000)


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "P"])
def test_a_picture_is_converted_in_strips_with_the_same_result(mode, monkeypatch):
    values = np.random.default_rng(0).integers(0, 2**16, (60, 50), np.uint16)
    image = Image.fromarray(values) if mode == "I;16" else Image.fromarray(values.view(np.uint8).reshape(60, 25, 4))
    data = encode(image.quantize(9) if mode == "P" else image)
    whole = decoded(data)
    monkeypatch.setattr("export.rgb.STRIP_PIXELS", 7 * 50)
    assert_close(decoded(data), whole, 0)


# Preprocessing


def test_without_a_crop_the_whole_picture_is_stretched():
    pixels = read_pixels(encode(Image.fromarray(colours())), Preprocessing(16))
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    assert pixels[2, 2].tolist() == [240, 0, 0] and pixels[13, 2].tolist() == [120, 0, 0]
    assert pixels[2, 13].tolist() == [0, 0, 200]


def test_a_crop_is_the_centred_share_of_the_shorter_side():
    marked = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    marked[8:24, 16:32] = 0  # the centred half of the shorter side
    image = Image.fromarray(marked)
    assert preprocess(image, Preprocessing(16, crop=0.5)).max() == 0
    assert preprocess(image, Preprocessing(16, crop=1.0))[:, 0].min() == 255


def test_pixels_of_the_right_size_stay_unchanged():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(read_pixels(encode(Image.fromarray(noise)), Preprocessing(32)), noise)


def test_shrinking_is_antialiased():
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[:, ::2] = 255
    for interpolation in ("bicubic", "bilinear"):
        middle = preprocess(Image.fromarray(lines), Preprocessing(8, interpolation=interpolation))[2:6, 2:6]
        assert np.abs(middle.astype(int) - 127).max() <= 3


@pytest.mark.parametrize("size", [(800, 600), (200, 150)])
def test_a_jpeg_read_at_a_reduced_scale_gives_nearly_the_same_pixels(size):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(smooth, "JPEG", quality=95, exif=exif)
    for preprocessing in (Preprocessing(32), Preprocessing(32, crop=0.5)):
        reduced = read_pixels(data, preprocessing).astype(int)
        assert_close(reduced, preprocess(read_image(data), preprocessing), 8)


def test_pictures_decode_the_same_from_many_threads():
    data = [
        encode(Image.fromarray(np.roll(colours(), i, axis=1)), format) for i in range(8) for format in ("PNG", "GIF")
    ]
    expected = [read_pixels(item, Preprocessing(8)) for item in data]
    with ThreadPoolExecutor(8) as pool:
        for pixels, alone in zip(
            pool.map(lambda item: read_pixels(item, Preprocessing(8)), data), expected, strict=True
        ):
            assert np.array_equal(pixels, alone)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"size_px": 0}, "size_px must be at least 1, not 0"),
        ({"size_px": 8, "crop": 1.5}, "crop must be in (0, 1] or None, not 1.5"),
        ({"size_px": 8, "crop": float("nan")}, "not nan"),
        ({"size_px": 8, "interpolation": "lanczos"}, "not 'lanczos'"),
    ],
)
def test_a_preprocessing_that_makes_no_sense_is_refused(settings, named):
    with pytest.raises(ValueError) as raised:
        Preprocessing(**settings)
    assert named in str(raised.value)


# Bundles

GRAPH_BYTES = b"not really a graph"


def card(graph: bytes = GRAPH_BYTES, **changes) -> ModelCard:
    digest, preprocessing = hashlib.sha256(graph).hexdigest(), Preprocessing(32, crop=0.875)
    facts = {"training": {"data": "shapes", "images": 6000}, "figures": {"knn": 0.5}, **changes}
    return ModelCard(encoder_id("tiny", digest, preprocessing), "tiny", 128, preprocessing, digest, **facts)


def test_a_bundle_comes_back_as_it_was_saved(tmp_path):
    saved = save_bundle(tmp_path / "runs" / "a" / "encoder", GRAPH_BYTES, card())
    loaded = load_bundle(tmp_path / "runs" / "a" / "encoder")
    assert loaded == saved and loaded.card == card()
    assert loaded.graph.read_bytes() == GRAPH_BYTES
    assert sorted(path.name for path in loaded.folder.parent.iterdir()) == ["encoder"]


def test_saving_again_replaces_the_bundle_whole(tmp_path):
    save_bundle(tmp_path / "encoder", GRAPH_BYTES, card())
    save_bundle(tmp_path / "encoder", b"another", card(b"another"))
    assert load_bundle(tmp_path / "encoder").card == card(b"another")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder"]


def test_remains_of_a_killed_save_do_not_disturb_the_next(tmp_path):
    for name in (".encoder.new", ".encoder.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / GRAPH).write_bytes(b"half")
    save_bundle(tmp_path / "encoder", GRAPH_BYTES, card())
    assert load_bundle(tmp_path / "encoder").card == card()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder"]


def test_a_measurement_goes_into_the_card_and_changes_nothing_else(tmp_path):
    folder = save_bundle(tmp_path / "encoder", GRAPH_BYTES, card()).folder
    for measured in ({"data": "clothes", "knn": 0.8}, {"data": "shoes", "found_first": 0.5}):
        record_measured(folder, measured)
        assert load_bundle(folder).card == card(figures={"knn": 0.5, "measured": measured})
    assert sorted(path.name for path in folder.iterdir()) == sorted([GRAPH, CARD])


@pytest.mark.parametrize("name", [GRAPH, CARD])
def test_an_incomplete_bundle_names_the_missing_file_and_how_to_make_one(tmp_path, name):
    (save_bundle(tmp_path / "encoder", GRAPH_BYTES, card()).folder / name).unlink()
    with pytest.raises(BundleError, match=f"encoder is not an encoder bundle: it has no {name}. Make one with"):
        load_bundle(tmp_path / "encoder")
    with pytest.raises(BundleError, match="nowhere is not an encoder bundle"):
        load_bundle(tmp_path / "nowhere")


def test_a_graph_that_is_not_the_one_described_is_refused(tmp_path):
    bundle = save_bundle(tmp_path / "encoder", GRAPH_BYTES, card())
    bundle.graph.write_bytes(GRAPH_BYTES + b"!")
    with pytest.raises(BundleError, match=r"encoder\.onnx is not the file its card describes"):
        load_bundle(bundle.folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda facts: json.dumps(facts)[:100],
        lambda facts: "[]",
        lambda facts: "\udcff",
        lambda facts: json.dumps({key: value for key, value in facts.items() if key != "dimension"}),
        lambda facts: json.dumps({key: value for key, value in facts.items() if key != "preprocessing"}),
        lambda facts: json.dumps(facts | {"preprocessing": {"size_px": 0}}),
        lambda facts: json.dumps(facts | {"unheard_of": 1}),
    ],
    ids=["cut", "list", "not utf-8", "no dimension", "no preprocessing", "size 0", "unknown field"],
)
def test_a_card_that_cannot_be_read_is_named(tmp_path, damage):
    bundle = save_bundle(tmp_path / "encoder", GRAPH_BYTES, card())
    text = damage(bundle.card.to_dict())
    (bundle.folder / CARD).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleError, match=r"model_card\.json cannot be read as a model card"):
        load_bundle(bundle.folder)


def test_the_id_changes_with_graph_and_preprocessing_and_with_nothing_else():
    preprocessing = Preprocessing(32)
    first = encoder_id("tiny", "abc", preprocessing)
    assert first == encoder_id("tiny", "abc", Preprocessing(32)) and first.startswith("tiny-")
    others = [
        encoder_id("tiny", "abd", preprocessing),
        *(
            encoder_id("tiny", "abc", dataclasses.replace(preprocessing, **change))
            for change in ({"size_px": 33}, {"crop": 0.875}, {"interpolation": "bilinear"})
        ),
    ]
    assert len({first, *others}) == 5
