"""Pictures in Parquet files and in Hugging Face's data sets."""

import io
import json
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from export.artifact import Preprocessing, UnreadableImage
from training.data import store, tables
from training.data.sources import DataError, open_source

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def value_of(data: bytes) -> int:
    return Image.open(io.BytesIO(data)).getpixel((0, 0))[0]


def make(values=(0, 1, 2), labels=(0, 1, -1), **columns) -> datasets.Dataset:
    """Pictures whose red is the value; columns: name=(values, feature)"""
    files = [{"bytes": png(value), "path": f"/home/somebody/{value}.png"} for value in values]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    content = {"image": files, "label": list(labels)}
    for name, (cells, feature) in columns.items():
        features[name], content[name] = feature, cells
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def seen(data) -> dict[str, tuple]:
    """The split, label and red of each picture, by its name."""
    return {p.name: (p.split, p.label, value_of(p.read())) for p in open_source(str(data)).pictures}


@pytest.fixture
def parquet(tmp_path):
    """parquet(columns, name) writes a Parquet file with a row group for every two rows."""

    def write(columns, name="a.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(
            columns if isinstance(columns, pa.Table) else pa.table(columns), tmp_path / name, row_group_size=2
        )
        return tmp_path / name

    return write


EXPECTED = {"0-0.png": ("train", "cat", 0), "1-1.png": ("train", "dog", 1), "2-2.png": ("train", None, 2)}


def test_a_saved_data_set_has_the_names_of_its_classes_as_labels_and_needs_no_package(tmp_path, monkeypatch):
    make().save_to_disk(tmp_path / "mine")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert seen(tmp_path / "mine") == EXPECTED
    source = open_source(str(tmp_path / "mine"))
    assert source.name == "mine"
    assert source.layout == "pictures from the column image; labels from the column label"
    assert [picture.name for picture in source.pictures] == sorted(EXPECTED)


def test_the_splits_of_a_saved_data_set_are_those_of_folders_and_one_can_be_chosen(tmp_path):
    sets = {"train": make(), "validation": make([3], [1]), "test": make([4, 5], [0, 0])}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "mine")
    splits = {name: split for name, (split, _, _) in seen(tmp_path / "mine").items()}
    assert splits == {
        **dict.fromkeys(("train/0-0.png", "train/1-1.png", "train/2-2.png", "validation/0-3.png"), "train"),
        **dict.fromkeys(("test/0-4.png", "test/1-5.png"), "test"),
    }
    assert list(splits) == sorted(splits)
    assert seen(f"hf:{tmp_path}/mine:test") == {
        "test/0-4.png": ("train", "cat", 4),
        "test/1-5.png": ("train", "cat", 5),
    }
    with pytest.raises(DataError, match=r"mine has no split dev; it has test, train, validation$"):
        open_source(f"hf:{tmp_path}/mine:dev")


def test_a_filtered_and_shuffled_data_set_is_saved_and_read_in_its_order_over_several_files(tmp_path):
    chosen = make(range(30), [0, 1] * 15).shuffle(seed=1).filter(lambda row: row["label"] == 1)
    chosen.save_to_disk(tmp_path / "mine", num_shards=3)
    found = [value for _, _, value in seen(tmp_path / "mine").values()]
    assert found == [
        int(row["path"].split("/")[-1][:-4])
        for row in chosen.cast_column("image", datasets.Image(decode=False))["image"]
    ]
    assert sorted(found) == list(range(1, 30, 2))


def test_hf_reads_what_the_package_reads_and_checks_the_split_first(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, values in (("train", (0, 1, 2)), ("test", (3,))):
        (tmp_path / "set").mkdir(exist_ok=True)
        make(values, [0] * len(values)).to_parquet(tmp_path / "set" / f"{name}-00000-of-00001.parquet")
    source = open_source(f"hf:{tmp_path}/set")
    assert source.name == "set" and source.layout.endswith("for training: train; for testing: test")
    assert [picture.split for picture in source.pictures] == ["test", "train", "train", "train"]
    assert [value_of(picture.read()) for picture in source.pictures] == [3, 0, 1, 2]
    assert [picture.name for picture in open_source(f"hf:{tmp_path}/set:test").pictures] == ["test/0-3.png"]
    monkeypatch.setattr(datasets.DatasetBuilder, "download_and_prepare", None)
    with pytest.raises(DataError, match=r"set has no split dev; it has test, train$"):
        open_source(f"hf:{tmp_path}/set:dev")


def test_parquet_files_have_the_split_of_their_name_or_folder_or_of_a_column(tmp_path, parquet):
    parquet(make([0], [0]).data.table, "hub/data/train-00000-of-00002.parquet")
    parquet(make([1], [1]).data.table, "hub/data/train-00001-of-00002.parquet")
    parquet(make([2], [1]).data.table, "hub/data/test-00000-of-00001.parquet")
    (tmp_path / "hub" / "README.md").write_text("# about")
    expected = [("test", "dog", 2), ("train", "cat", 0), ("train", "dog", 1)]
    assert list(seen(tmp_path / "hub").values()) == expected
    assert list(seen(tmp_path / "hub" / "*" / "*.parquet").values()) == expected
    assert list(seen(f"hf:{tmp_path}/hub/data/*.parquet:test").values()) == [("train", "dog", 2)]
    one = parquet({"image": [png(0), png(1), png(2)], "split": ["test", "train", "train"]})
    assert [split for split, _, _ in seen(one).values()] == ["test", "train", "train"]
    assert open_source(str(one)).name == "a"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["cat", "", None], ["cat", None, None]),
        ([3, 10, None], ["3", "10", None]),
        ([1.0, float("nan"), 2.0], ["1", None, "2"]),
        (pa.array(["cat", "dog", "cat"]).dictionary_encode(), ["cat", "dog", "cat"]),
        ([[1], [2], [3]], [None] * 3),
    ],
)
def test_a_column_label_of_any_program_gives_the_labels(parquet, labels, expected):
    path = parquet({"image": [png(0), png(1), png(2)], "label": labels})
    assert [label for _, label, _ in seen(path).values()] == expected


def test_one_of_several_class_labels_is_used_and_named(parquet):
    coarse = datasets.ClassLabel(names=["animal"])
    set_ = make().rename_column("label", "fine").add_column("coarse", [0, 0, 0], feature=coarse)
    path = parquet(set_.data.table.combine_chunks())
    assert open_source(str(path)).layout == (
        "pictures from the column image; labels from the column fine, not from coarse"
    )
    assert list(seen(path).values()) == list(EXPECTED.values())


def test_pictures_of_a_row_group_are_read_when_they_are_needed_and_a_group_only_once(parquet, monkeypatch):
    path, read = parquet({"image": [png(i) for i in range(20)]}), []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda file, group, *names: read.append(group) or original(file, group, *names),
    )
    pictures = open_source(str(path)).pictures
    assert read == []
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda picture: value_of(picture.read()), pictures)) == list(range(20))
    assert sorted(read) == list(range(10))
    monkeypatch.setattr(tables, "GROUPS_BYTES", 1)
    monkeypatch.setattr(tables, "_GROUPS", tables._Groups())
    for picture in pictures:
        picture.read()
    assert len(tables._GROUPS._kept) == tables.FEWEST_GROUPS


def test_pictures_of_an_arrow_file_are_mapped_and_not_loaded(tmp_path):
    make(range(100), [0] * 100).save_to_disk(tmp_path / "mine")
    before = pa.total_allocated_bytes()
    pictures = open_source(str(tmp_path / "mine")).pictures
    assert value_of(pictures[77].read()) == 77
    assert pa.total_allocated_bytes() - before < 2000 < sum(len(picture.read()) for picture in pictures)
    again = pickle.loads(pickle.dumps(pictures[5]))  # as they are sent to another process
    assert value_of(again.read()) == 5 and len(pickle.dumps(pictures[5])) < 1000


def test_broken_rows_are_skipped_like_broken_files(tmp_path, parquet, capsys):
    (tmp_path / "near.png").write_bytes(png(7))
    (tmp_path.parent / "far.png").write_bytes(png(8))
    cells = [
        {"bytes": png(1), "path": None},
        {"bytes": b"none", "path": "x.png"},
        {"bytes": None, "path": "near.png"},
        {"bytes": None, "path": "../far.png"},
        {"bytes": None, "path": "https://example.org/a.png"},
        {"bytes": None, "path": "gone.png"},
        {"bytes": None, "path": None},
        None,
    ]
    source = open_source(str(parquet({"image": cells})))
    loaded = store.load(source, Preprocessing(4), "train", tmp_path / "data")
    assert loaded.pixels[:, 0, 0, 0].tolist() == [1, 7]
    assert loaded.names == ["0", "2-near.png"]
    reasons = dict(loaded.skipped)
    assert reasons.keys() == {"1-x.png", "3-far.png", "4-a.png", "5-gone.png", "6", "7"}
    assert "which is not in the folder of" in reasons["3-far.png"]
    assert "which is not downloaded" in reasons["4-a.png"]
    assert "No such file" in reasons["5-gone.png"]
    assert reasons["6"] == reasons["7"] == "has no picture in its row"
    assert "skipped 6 of 8 files" in capsys.readouterr().out


def test_a_row_too_large_for_a_picture_is_refused_and_so_is_a_file_that_became_damaged(parquet, monkeypatch):
    path = parquet({"image": [png(0), png(1)]})
    first, second = open_source(str(path)).pictures
    monkeypatch.setattr("training.data.sources.MAX_FILE_BYTES", 4)
    with pytest.raises(UnreadableImage, match="is larger than"):
        first.read()
    monkeypatch.undo()
    monkeypatch.setattr(tables, "_GROUPS", tables._Groups())
    path.write_bytes(b"PAR1")
    with pytest.raises(UnreadableImage, match=r"cannot be read from .*a\.parquet"):
        second.read()


def test_the_store_is_made_again_for_another_column(tmp_path, parquet):
    path = parquet({"image": [png(0), png(1)], "mask": [png(8), png(9)]})
    for column, expected in (("image", [0, 1]), ("mask", [8, 9])):
        source = open_source(f"hf:{path}::{column}")
        assert store.load(source, Preprocessing(4), "train", tmp_path).pixels[:, 0, 0, 0].tolist() == expected


def test_a_list_of_paths_is_a_table_too(tmp_path, parquet):
    (tmp_path / "1.png").write_bytes(png(1))
    assert list(seen(parquet({"path": ["1.png"], "label": ["cat"]})).values()) == [("train", "cat", 1)]


def test_unusable_tables_are_named_in_one_sentence(tmp_path, parquet, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    two = parquet({"image": [png(0)], "mask": [png(1)], "n": [1]}, "two.parquet")
    make([0], [0], second=([{"bytes": png(1), "path": None}], datasets.Image())).save_to_disk(tmp_path / "pair")
    (tmp_path / "bad.parquet").write_bytes(b"none")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "dataset_dict.json").write_text("{}")
    shutil.copytree(tmp_path / "pair", tmp_path / "cut")
    next((tmp_path / "cut").glob("*.arrow")).write_bytes(b"none")
    (tmp_path / "configs").mkdir()
    for name in ("a", "b"):
        make([0], [0]).to_parquet(tmp_path / "configs" / f"{name}.parquet")
    about = [{"config_name": name, "data_files": f"{name}.parquet"} for name in ("a", "b")]
    (tmp_path / "configs" / "README.md").write_text(f"---\nconfigs: {json.dumps(about)}\n---\n")
    for given, sentence in (
        (two, f"{two} has several columns of pictures, image, mask: choose one, as in hf:{two}::image"),
        (f"hf:{two}:", f"choose one, as in hf:{two}::image"),
        (tmp_path / "pair", f"image, second: choose one, as in hf:{tmp_path}/pair::image"),
        (f"hf:{two}::n", "has no column n with pictures; its columns are image, mask, n"),
        (parquet({"n": [1]}), "has no column of pictures, or of the bytes of their files; its columns are n"),
        (tmp_path / "bad.parquet", f"{tmp_path}/bad.parquet cannot be read"),
        (tmp_path / "damaged", f"{tmp_path}/damaged is a damaged folder of save_to_disk"),
        (tmp_path / "cut", "cannot be read"),
        (f"hf:{tmp_path}/configs", "among the available configs: ['a', 'b']. Give a folder written by datasets."),
        ("hf:", "hf: names no data set"),
        (f"hf:{tmp_path}/nowhere.parquet", "no file matches"),
        ("hf:a b", "hf:a b cannot be"),
    ):
        with pytest.raises(DataError) as raised:
            open_source(str(given))
        assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_a_data_set_that_cannot_be_reached_is_named_at_once(monkeypatch):
    import huggingface_hub.constants

    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"^hf:nobody/nothing cannot be downloaded; is there a network\? \(http.*:9"):
        open_source("hf:nobody/nothing:train")


def test_without_the_package_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"^hf:mnist needs the Python package datasets.*pip install 'twinview\[hf\]'$"):
        open_source("hf:mnist")
