import csv
import os
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export.artifact import read_pixels
from serving import bulk
from serving.bulk import BulkSettings, run
from serving.collection.index import Index, IndexProblem, Item, WrongEncoder, content_id
from serving.collection.undo import changes, undo
from serving.indexing import fill
from serving.inference.decode import DecodingProcess
from serving.inference.encoder import OnnxEncoder
from training.data.sources import DataError


@pytest.fixture
def pictures(tmp_path, picture):
    """pictures(n) -> a folder of them, picture(i) at train/<a or b>/<i>.png."""

    def make(n: int):
        for i in range(n):
            path = tmp_path / "pictures" / "train" / "ab"[i % 2] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(i))
        return tmp_path / "pictures"

    return make


@pytest.fixture
def settings(bundle, tmp_path):
    def make(data, **others) -> BulkSettings:
        given = {"encoder": str(bundle.folder), "index": str(tmp_path / "index"), **others}
        return BulkSettings(data=data and str(data), **given)

    return make


@pytest.fixture
def index(bundle, tmp_path) -> Index:
    return Index(tmp_path / "index", bundle.card.id, bundle.card.dimension)


@pytest.fixture
def encoding(monkeypatch):
    """encoding(report) -> encode on one core, and call `report` with each batch's size before it is encoded."""

    def patch(report):
        def one_core(bundle):
            encoder = fill.batch_encoder(bundle, cpu_cores=1)
            return encoder._replace(encode=lambda pixels: report(len(pixels)) or encoder.encode(pixels))

        monkeypatch.setattr(bulk, "batch_encoder", one_core)

    return patch


@pytest.mark.slow
def test_pictures_are_indexed_with_facts_vectors_and_thumbnails(pictures, settings, index, bundle, picture, capsys):
    folder = pictures(70)
    tally = run(settings(folder))
    assert (tally.indexed, tally.present, tally.skipped) == (70, 0, [])
    item, vector = index.get(content_id(picture(33)))
    assert (item.name, item.label) == ("train/b/033.png", "b")
    assert (item.path, item.width, item.height) == (str(folder / "train/b/033.png"), 40, 30)
    h = OnnxEncoder(bundle)(read_pixels(picture(33), bundle.card.preprocessing)[None])[0]
    np.testing.assert_allclose(vector, h / np.linalg.norm(h), atol=1e-6)
    assert item.bytes == len(picture(33))
    assert index.read_thumbnail(item.id).startswith(b"\xff\xd8")
    assert "indexed 70, already there 0, skipped 0; pictures holds 70" in capsys.readouterr().out


@pytest.mark.slow
def test_indexing_again_adds_what_is_new_and_one_row_for_equal_files(pictures, settings, index, picture):
    folder = pictures(40)
    run(settings(folder))
    for name, seed in (("copy", 2), ("new", 100), ("newer", 100)):
        (folder / "train" / "a" / f"{name}.png").write_bytes(picture(seed))
    tally = run(settings(folder))
    assert (tally.indexed, tally.present) == (1, 42)
    assert index.count() == 41


@pytest.mark.slow
def test_indexed_pictures_are_not_decoded_again(pictures, settings, monkeypatch):
    folder, decoded = pictures(20), []
    run(settings(folder))
    monkeypatch.setattr("serving.inference.reading.read_file", lambda *arguments: decoded.append(1))
    assert run(settings(folder)).present == 20
    assert decoded == []


@pytest.mark.slow
def test_a_file_that_crashes_its_decoder_is_listed_and_the_others_are_kept(
    pictures, settings, index, tmp_path, monkeypatch
):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nimport PIL.Image\nopen_ = PIL.Image.open\n"
        "def falling(file, *rest, **more):\n"
        "    if file.getvalue() == b'deadly':\n        os.abort()\n"
        "    return open_(file, *rest, **more)\n"
        "PIL.Image.open = falling\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("serving.inference.decode.DecodingProcess", DecodingProcess)
    folder = pictures(10)
    (folder / "train" / "a" / "deadly.png").write_bytes(b"deadly")
    assert run(settings(folder)).indexed == index.count() == 10
    with open(tmp_path / "index" / "skipped.csv", newline="") as file:
        assert list(csv.reader(file))[1:] == [["train/a/deadly.png", "crashes its decoder"]]


def test_broken_files_are_listed_and_the_others_are_kept(pictures, settings, index, picture, tmp_path):
    folder = pictures(10)
    (folder / "train" / "a" / "cat.txt").write_text("no picture")
    (folder / "train" / "a" / "cut.jpg").write_bytes(picture(50, format="JPEG", size=(90, 90))[:-200])
    (folder / "train" / "a" / "empty.png").touch()
    assert run(settings(folder)).indexed == 10
    with open(tmp_path / "index" / "skipped.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["name", "reason"],
            ["train/a/cat.txt", "is not an image in a supported format"],
            ["train/a/cut.jpg", "is truncated: its end is missing"],
            ["train/a/empty.png", "is empty"],
        ]


def test_one_split_of_a_zip_is_indexed_and_its_items_have_no_path(pictures, settings, index, picture, tmp_path):
    folder = pictures(6)
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder))
        archive.writestr("test/a/other.png", picture(200))
    tally = run(settings(tmp_path / "pictures.zip", split="test"))
    assert tally.indexed == 1
    item, _ = index.get(content_id(picture(200)))
    assert (item.name, item.label, item.path) == ("test/a/other.png", "a", None)


def test_a_missing_split_is_named(pictures, settings):
    with pytest.raises(DataError, match="has no test split"):
        run(settings(pictures(3), split="test"))


@pytest.mark.skipif(sys.platform == "win32" or sys.platform == "darwin", reason="names there are always text")
def test_a_name_that_is_not_valid_text_stays_readable(pictures, settings, index, picture):
    folder = pictures(2)
    (folder / "train" / "a" / os.fsdecode(b"caf\xe9.png")).write_bytes(picture(60))
    run(settings(folder))
    assert index.get(content_id(picture(60)))[0].name == "train/a/caf\N{REPLACEMENT CHARACTER}.png"


def test_files_of_which_none_is_a_picture_are_an_error(settings, tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("one", "two"):
        (tmp_path / "texts" / f"{name}.jpg").write_text("no picture")
    with pytest.raises(DataError, match=r"no file of .*texts is a readable picture: \w+\.jpg is not an"):
        run(settings(tmp_path / "texts"))


def test_two_equal_broken_files_are_both_listed(pictures, settings, tmp_path):
    folder = pictures(3)
    for name in ("one", "two"):
        (folder / "train" / "a" / f"{name}.txt").write_text("no picture")
    tally = run(settings(folder))
    assert [name for name, _ in sorted(tally.skipped)] == ["train/a/one.txt", "train/a/two.txt"]
    assert tally.present == 0


@pytest.mark.slow
def test_batches_are_full_though_most_files_are_known_or_broken(pictures, settings, picture, encoding):
    folder, sizes = pictures(100), []
    run(settings(folder))
    for i in range(100):
        (folder / "train" / "a" / f"{i}-broken.png").write_text(f"no picture {i}")
    for i in range(200, 264):
        (folder / "train" / "a" / f"{i % 10}-{i}.png").write_bytes(picture(i))
    encoding(sizes.append)
    run(settings(folder))
    assert sum(sizes) == 64
    assert len(sizes) <= 4  # two threads, each with an end


@pytest.mark.slow
def test_encoding_continues_during_a_write_and_is_at_most_one_upsert_ahead(
    pictures, settings, index, encoding, monkeypatch, wait_until
):
    events, upsert = [], Index.upsert

    def encoded() -> int:
        return sum(n for kind, n in events if kind == "encoded")

    def slow(self, items, *others):
        next_portion = min(320, sum(n for kind, n in events if kind == "written") + len(items) + 64)
        wait_until(lambda: encoded() >= next_portion, "nothing is encoded while a portion is written")
        upsert(self, items, *others)
        events.append(("written", len(items)))

    monkeypatch.setattr(fill, "MIN_ROWS_PER_UPSERT", 32)
    monkeypatch.setattr(fill, "MAX_ROWS_PER_UPSERT", 64)
    monkeypatch.setattr(Index, "upsert", slow)
    encoding(lambda n: events.append(("encoded", n)))
    run(settings(pictures(320)))
    behind = greatest = 0
    for kind, n in events:
        behind += n if kind == "encoded" else -n
        greatest = max(greatest, behind)
    assert behind == 0
    assert 64 <= greatest <= 64 + 64 + 2 * 32  # a portion being written, one waiting, a batch in each thread's hands
    assert index.count() == 320


@pytest.mark.slow
def test_a_collection_is_maintained_while_it_fills(pictures, settings, index, monkeypatch):
    """Otherwise the searches of a long fill would read its new rows one by one."""
    monkeypatch.setattr(fill, "MIN_ROWS_PER_UPSERT", 4)
    monkeypatch.setattr(fill, "MAX_ROWS_PER_UPSERT", 8)
    monkeypatch.setattr(Index, "rows_per_maintenance", 16)
    counts, maintain = [], Index.maintain
    monkeypatch.setattr(Index, "maintain", lambda self: counts.append(self.count()) or maintain(self))
    run(settings(pictures(100)))
    assert len(counts) >= 2 and counts[0] < 100
    assert index.count() == 100


@pytest.mark.slow
def test_an_error_of_the_index_ends_the_command(pictures, settings, monkeypatch):
    def fail(*arguments):
        raise IndexProblem("the disk is full")

    monkeypatch.setattr(fill, "MIN_ROWS_PER_UPSERT", 32)
    monkeypatch.setattr(Index, "upsert", fail)
    with pytest.raises(IndexProblem, match="the disk is full"):
        run(settings(pictures(300)))


def test_another_encoder_is_refused_before_anything_is_read(pictures, settings, make_bundle, tmp_path, monkeypatch):
    folder = pictures(5)
    run(settings(folder))
    other = make_bundle(tmp_path / "other", 1 / 100)
    monkeypatch.setattr(bulk, "fill", lambda *arguments: pytest.fail("it begins"))
    with pytest.raises(WrongEncoder, match=r"pictures in .* has 5 items with vectors of means-"):
        run(settings(folder, encoder=str(other.folder)))


def test_reembedding_keeps_old_vectors_and_lists_missing_files(
    pictures, settings, index, make_bundle, picture, tmp_path
):
    folder = pictures(12)
    run(settings(folder))
    gone, changed = folder / "train/a/000.png", folder / "train/b/001.png"
    gone.unlink()
    changed.write_bytes(picture(77))
    other = make_bundle(tmp_path / "other", 1 / 100)
    tally = run(settings(None, encoder=str(other.folder), reembed=True))
    assert (tally.indexed, sorted(name for name, _ in tally.skipped)) == (10, ["train/a/000.png", "train/b/001.png"])
    reasons = dict(tally.skipped)
    assert reasons["train/a/000.png"] == "cannot be read: No such file or directory"
    assert reasons["train/b/001.png"].startswith("has changed since it was indexed")
    new = Index(index.store.uri, other.card.id, other.card.dimension)
    (old_item, old_vector), (new_item, new_vector) = (each.get(content_id(picture(5))) for each in (index, new))
    assert old_item == new_item
    assert index.count() == 12
    assert new.count() == 10
    np.testing.assert_allclose(old_vector, new_vector, atol=1e-5)  # another scale, and so the same direction
    assert new.read_thumbnail(new_item.id)
    assert run(settings(None, encoder=str(other.folder), reembed=True)).present == 10


def test_reembedding_reads_below_the_folders_that_were_indexed_only(pictures, settings, index, make_bundle, tmp_path):
    folder = pictures(3)
    run(settings(folder))
    assert index.folders() == [str(folder)]
    secret, vector = index.get(index.page(1)[0].id)
    (tmp_path / "secret.png").write_bytes(Path(secret.path).read_bytes())
    index.upsert([replace(secret, path=str(tmp_path / "secret.png"))], vector[None])
    other = make_bundle(tmp_path / "other", 1 / 100)
    tally = run(settings(None, encoder=str(other.folder), reembed=True))
    assert [reason for _, reason in tally.skipped] == [
        f"is outside the folders that may be read; --pictures names more: {tmp_path}/secret.png"
    ]
    more = settings(None, encoder=str(other.folder), reembed=True, pictures=(str(tmp_path),))
    assert (run(more).indexed, index.folders()) == (1, [str(folder), str(tmp_path)])


def test_a_collection_whose_folders_are_not_known_is_reembedded_from_those_given(settings, fill, make_bundle, tmp_path):
    fill(2)
    other = make_bundle(tmp_path / "other", 1 / 100)
    with pytest.raises(DataError, match="name the folders with the pictures of pictures with --pictures"):
        run(settings(None, encoder=str(other.folder), reembed=True))


def test_reembedding_with_data_reads_the_data(pictures, settings, make_bundle, tmp_path):
    folder = pictures(6)
    run(settings(folder))
    other = make_bundle(tmp_path / "other", 1 / 100)
    assert run(settings(folder, encoder=str(other.folder), reembed=True)).indexed == 6


@pytest.mark.parametrize("filled", [False, True])
def test_nothing_to_reembed_is_reported(pictures, settings, filled):
    if filled:
        run(settings(pictures(2)))
    reason = "nothing to re-embed: .* only holds vectors of means-" if filled else "there is no index at"
    with pytest.raises((DataError, IndexProblem), match=reason):
        run(settings(None, reembed=True))


@pytest.mark.slow
def test_collections_of_one_index_are_separate(pictures, settings, index, bundle):
    folder = pictures(6)
    run(settings(folder))
    run(settings(folder, collection="parts", split="train"))
    assert Index(index.store.uri, bundle.card.id, bundle.card.dimension, "parts").count() == index.count() == 6


def test_an_index_inside_the_folder_is_refused(pictures, settings):
    folder = pictures(3)
    with pytest.raises(DataError, match="so its thumbnails would be indexed too"):
        run(settings(folder, index=str(folder / "index")))
    assert run(settings(folder, index=str(folder / ".index"))).indexed == 3


@pytest.mark.slow
def test_ctrl_c_stores_what_is_embedded_and_prints_the_counts(pictures, settings, index, encoding, monkeypatch, capsys):
    folder, sizes = pictures(200), []

    def report(n: int) -> None:
        sizes.append(n)
        if len(sizes) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    encoding(report)
    arguments = ["--data", str(folder), "--encoder", settings("x").encoder, "--index", index.store.uri]
    monkeypatch.setattr(sys, "argv", ["bulk.py", *arguments])
    monkeypatch.setattr(bulk, "lower_priority", lambda: None)  # the tests after this one would
    with pytest.raises(SystemExit) as stopped:
        bulk.main()
    assert stopped.value.code == 130
    kept = index.count()
    assert kept == sum(sizes) < 200
    *_, stopping, interrupted = capsys.readouterr().out.splitlines()
    assert stopping == "stopping: the pictures embedded so far are being stored"
    said = f"indexed {kept}, already there 0, skipped 0; run the same command again to resume"
    assert interrupted == f"interrupted: {said}"


@pytest.mark.slow
def test_after_kill_9_the_same_command_completes_without_duplicates(pictures, settings, index, wait_until):
    """Killed with two of its small portions on the disk, at the third."""
    folder = pictures(200)
    program = f"""
import itertools, time
from serving import bulk
from serving.indexing import fill
from serving.collection.index import Index
upsert, portions = Index.upsert, itertools.count(1)
Index.upsert = lambda *given: upsert(*given) if next(portions) < 3 else time.sleep(1000)
fill.MIN_ROWS_PER_UPSERT = fill.MAX_ROWS_PER_UPSERT = 32
bulk.run(bulk.BulkSettings(data={str(folder)!r}, encoder={settings("x").encoder!r}, index={index.store.uri!r}))
"""
    environment = {**os.environ, "PYTHONPATH": sys.path[0]}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: index.count() >= 64, "the process has not written 64 rows")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = index.count()
    assert 64 <= left < 200
    tally = run(settings(folder))
    assert (tally.present, tally.indexed) == (left, 200 - left)
    assert index.count() == len(index.ids()) == 200
    assert index.verify() == []


def test_the_command_runs_at_low_priority(monkeypatch, settings):
    done = []
    monkeypatch.setattr(bulk, "lower_priority", lambda: done.append("gives way"))
    monkeypatch.setattr(bulk, "run", lambda settings: done.append("runs"))
    bulk.command(settings("x"))
    assert done == ["gives way", "runs"]


@pytest.mark.slow
def test_giving_way_lowers_the_priority_of_a_process_and_only_once():
    code = "import os; from serving.limits import lower_priority; lower_priority(); lower_priority(); print(os.nice(0))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "10\n"


def test_a_filling_of_many_commits_is_one_change(pictures, settings, index, monkeypatch):
    run(settings(pictures(4)))
    monkeypatch.setattr(fill, "MAX_ROWS_PER_UPSERT", 2)
    monkeypatch.setattr(fill, "MIN_ROWS_PER_UPSERT", 2)
    monkeypatch.setattr(fill, "MAX_CPU_BATCH_PIXELS", 0)
    before = index.version()
    run(settings(pictures(30)))
    assert index.version() > before + 2, "it made several commits"
    assert [one.text for one in changes(index)] == ["added 26 items", "added 4 items"]
    undo(index)
    assert index.count() == 4


def test_what_has_gone_from_the_folder_is_told_and_removed_by_sync(pictures, settings, index, picture, capsys):
    folder = pictures(6)
    run(settings(folder))
    assert "no longer" not in capsys.readouterr().out
    (folder / "train/a/000.png").unlink()
    (folder / "train/b/001.png").rename(folder / "train/a/moved.png")
    (folder / "train/a/002.png").write_bytes(picture(50))
    (folder / "train/b/003.png").write_bytes(b"no picture")
    elsewhere = Item("elsewhere", "x.png", None, "/not there/x.png", 1, 1)
    index.upsert([elsewhere], np.ones((1, index.dimension)))
    gone, replaced = content_id(picture(0)), content_id(picture(2))
    run(settings(folder))
    expected = f"2 pictures of pictures are no longer in {folder}; the same command with --sync removes them"
    assert expected in capsys.readouterr().out
    assert {gone, replaced} <= index.ids()
    (folder / "train/b/005.png").unlink()
    (folder / "train/new.png").write_bytes(picture(51))
    run(settings(folder, sync=True))
    said = capsys.readouterr().out
    assert f"3 pictures of pictures are no longer in {folder}, and removed; to bring them back: " in said
    assert f"twinview index undo --index {index.store.uri} --collection pictures\n" in said
    kept = {content_id(picture(1)), content_id(picture(3)), "elsewhere"}
    assert not {gone, replaced} & index.ids() and kept <= index.ids()
    assert changes(index)[0].text == "added 1 item, deleted 3 items"
    undo(index)
    assert gone in index.ids() and content_id(picture(51)) not in index.ids()


def test_sync_refuses_what_it_cannot_compare_with(settings, pictures):
    for data, others in (("shapes", {}), (pictures(2), {"split": "train"})):
        with pytest.raises(DataError, match=r"--sync (needs a folder, and shapes|cannot be combined)"):
            run(settings(data, sync=True, **others))
