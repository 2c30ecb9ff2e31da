"""A cluster of this machine alone, with two actors."""

import importlib.util
import subprocess
import sys
import zipfile

import pytest

from serving.bulk import BulkSettings, run
from serving.collection.index import Index
from serving.collection.undo import changes
from training.data.sources import DataError

has_ray = importlib.util.find_spec("ray") is not None


@pytest.mark.slow
@pytest.mark.skipif(not has_ray, reason="Ray is not installed")
def test_two_actors_fill_one_collection(bundle, picture, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(50):
        (folder / f"{i}.png").write_bytes(picture(i % 40))  # ten are there twice
    (folder / "broken.png").write_text("no picture")
    run(BulkSettings(data=str(folder), encoder=str(bundle.folder), index=str(tmp_path / "index")))
    for i in range(40, 140):
        (folder / f"{i + 10}.png").write_bytes(picture(i))
    options = {"data": str(folder), "encoder": str(bundle.folder), "index": str(tmp_path / "index")}
    program = f"""
import ray
from serving import bulk
from serving.indexing import cluster
cluster.BLOCK_FILES = 16
if __name__ == "__main__":
    ray.init(num_cpus=2, log_to_driver=False)
    print(bulk.run(bulk.BulkSettings(**{options!r}, ray=True)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=sys.path[0])
    assert done.returncode == 0, done.stderr[-3000:]
    index = Index(tmp_path / "index", bundle.card.id, bundle.card.dimension)
    assert index.count() == len(index.ids()) == 140
    assert index.verify() == []
    assert [one.text for one in changes(index)] == ["added 100 items", "added 40 items"]
    assert "indexed 100, already there 50, skipped 1" in done.stdout
    assert "broken.png" in (tmp_path / "index" / "skipped.csv").read_text()


def test_without_ray_the_error_says_how_to_install_it(bundle, picture, tmp_path, monkeypatch):
    (tmp_path / "0.png").write_bytes(picture(0))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match=r"--ray needs Ray, which is not installed: pip install 'twinview\[ray\]'"):
        run(BulkSettings(data=str(tmp_path), encoder=str(bundle.folder), index=str(tmp_path / ".index"), ray=True))


def test_a_zip_is_refused(picture, tmp_path):
    from serving.indexing.cluster import _blocks
    from serving.indexing.originals import open_originals

    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.writestr("0.png", picture(0))
    with pytest.raises(DataError, match=r"--ray cannot read a \.zip"):
        list(_blocks(open_originals(str(tmp_path / "pictures.zip"))))
