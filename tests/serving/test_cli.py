"""The command `twinview`, against a service behind a real socket."""

import csv
import dataclasses
import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import get_type_hints

import httpx
import numpy as np
import pyarrow.parquet
import pytest

from serving.access import Access
from serving.cli import main
from serving.client import Client
from serving.collection.index import Index, Item, content_id
from serving.errors import Busy, NotReady
from serving.limits import Limits

ROOT = Path(__file__).parents[2]


@pytest.fixture
def service(listen):
    port, _ = listen()
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def pictures(tmp_path, picture):
    """A folder of 100 pictures in two classes, and the expected names in order."""
    folder = tmp_path / "pictures"
    for i in range(100):
        path = folder / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    return folder


def read(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_embed_writes_vectors_and_names_in_the_order_of_the_names(service, pictures, twinview, picture, tmp_path):
    twinview("embed", pictures, "--service", service, "-o", tmp_path / "out" / "v.npy")
    vectors, rows = np.load(tmp_path / "out" / "v.npy"), read(tmp_path / "out" / "v.csv")
    names = sorted(f"{'ab'[i % 2]}/{i:02}.png" for i in range(100))
    assert [row["name"] for row in rows] == names
    assert rows[0] == {"name": "a/00.png", "label": "a", "split": "train", "path": str(pictures / "a" / "00.png")}
    assert (vectors.shape, vectors.dtype) == ((100, 48), np.float32)
    with Client(service) as client:
        expected = client.embed([picture(int(name[2:4])) for name in names]).vectors
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert sorted(os.listdir(tmp_path / "out")) == ["v.csv", "v.npy"]


@pytest.mark.slow
def test_a_parquet_file_holds_vectors_and_names(service, pictures, twinview, bundle, tmp_path):
    twinview("embed", pictures, "--service", service, "--output", tmp_path / "v.npy", "--normalize")
    twinview("embed", pictures, "--service", service, "--output", tmp_path / "v.parquet", "--normalize")
    table = pyarrow.parquet.read_table(tmp_path / "v.parquet")
    facts = ["id", "name", "label", "path", "width", "height", "bytes"]
    assert table.column_names == [*facts, "split", "vector"]
    vectors = np.array(table["vector"].to_pylist(), np.float32)
    np.testing.assert_allclose(vectors, np.load(tmp_path / "v.npy"), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert table["name"].to_pylist() == [row["name"] for row in read(tmp_path / "v.csv")]
    assert table.schema.metadata[b"twinview.encoder"].decode() == bundle.card.id


@pytest.mark.slow
def test_a_parquet_file_of_embed_can_be_imported(service, pictures, twinview, picture, bundle, tmp_path, capsys):
    twinview("embed", pictures, "--service", service, "-o", tmp_path / "v.parquet")
    other = ("--index", tmp_path / "other", "--collection", "parts")
    twinview("index", "import", tmp_path / "v.parquet", *other, "--pictures", pictures)
    assert "100 sent, 0 already there; parts holds 100" in capsys.readouterr().out
    index = Index(tmp_path / "other", bundle.card.id, bundle.card.dimension, "parts")
    data, path = picture(33), str(pictures / "b" / "33.png")
    item, vector = index.get(content_id(data))
    assert item == Item(content_id(data), "b/33.png", "b", path, 40, 30, len(data), {"split": "train"})
    assert index.read_thumbnail(item.id).startswith(b"\xff\xd8")
    with Client(service) as client:
        np.testing.assert_allclose(vector, client.embed([data], normalize=True).vectors[0], atol=1e-5)


@pytest.mark.slow
def test_broken_files_are_listed_and_the_rest_is_embedded(service, pictures, twinview, picture, tmp_path, capsys):
    broken = {}
    for i in range(0, 100, 3):
        path = pictures / "ab"[i % 2] / f"{i:02}.png"
        path.write_bytes([b"no picture", b"", picture(i)[:60]][i % 3 if i else 2] if i % 2 else b"text")
        broken[f"{'ab'[i % 2]}/{i:02}.png"] = path
    twinview("embed", pictures, "--service", service, "-o", tmp_path / "v.npy")
    skipped, rows = read(tmp_path / "v.skipped.csv"), read(tmp_path / "v.csv")
    assert {row["name"] for row in skipped} == set(broken)
    assert all(row["reason"].startswith("is ") for row in skipped)
    assert len(rows) == len(np.load(tmp_path / "v.npy")) == 100 - len(broken)
    output = capsys.readouterr().out
    assert "66 vectors" in output and "34 files skipped" in output and "a/00.png is not an image" in output
    with Client(service) as client:
        expected = client.embed([pictures / row["name"] for row in rows]).vectors
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5)


@pytest.mark.slow
def test_a_picture_of_too_many_pixels_is_skipped_too(listen, pictures, twinview, picture, tmp_path):
    port, _ = listen(limits=Limits(pixels=40 * 30))
    (pictures / "a" / "huge.png").write_bytes(picture(0, size=(50, 30)))
    twinview("embed", pictures, "--service", f"http://127.0.0.1:{port}", "-o", tmp_path / "v.npy")
    (skipped,) = read(tmp_path / "v.skipped.csv")
    assert skipped == {"name": "a/huge.png", "reason": "has 50 x 30 pixels; at most 1,200 are read"}


def test_embed_waits_for_a_busy_service(listen, pictures, twinview, tmp_path, monkeypatch):
    port, app = listen()
    embed, asked = app.state.engine.embed, []

    async def busy(*arguments):
        asked.append(1)
        if len(asked) < 30:
            raise Busy("come back", headers={"Retry-After": "0"})
        return await embed(*arguments)

    monkeypatch.setattr(app.state.engine, "embed", busy)
    twinview("embed", pictures, "--service", f"http://127.0.0.1:{port}", "-o", tmp_path / "v.npy")
    assert len(np.load(tmp_path / "v.npy")) == 100 and len(asked) > 30


@pytest.mark.slow
def test_an_error_ends_embed_although_other_requests_wait_for_a_busy_service(
    listen, pictures, twinview, picture, tmp_path, monkeypatch
):
    port, app = listen()

    async def busy(files, *_):
        if files[0].data == picture(0):  # the first of all
            raise NotReady("out of order")
        raise Busy("come back", headers={"Retry-After": "0"})

    monkeypatch.setattr(app.state.engine, "embed", busy)
    with pytest.raises(SystemExit, match=r"^error: out of order$"):
        twinview("embed", pictures, "--service", f"http://127.0.0.1:{port}", "-o", tmp_path / "v.npy")


@pytest.mark.slow
def test_files_of_which_none_is_a_picture_leave_the_vectors_of_before(service, pictures, twinview, tmp_path):
    twinview("embed", pictures, "-o", tmp_path / "v.npy", "--service", service)
    before = (tmp_path / "v.npy").read_bytes()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jpg").write_text("no picture")
    with pytest.raises(SystemExit, match=r"error: no file of .*texts is a readable picture: a\.jpg is not an"):
        twinview("embed", tmp_path / "texts", "-o", tmp_path / "v.npy", "--service", service)
    assert (tmp_path / "v.npy").read_bytes() == before


def test_the_skipped_list_of_an_earlier_run_is_deleted(service, pictures, twinview, picture, tmp_path):
    (pictures / "a" / "00.png").write_text("text")
    twinview("embed", pictures, "--service", service, "-o", tmp_path / "v.npy")
    assert (tmp_path / "v.skipped.csv").exists()
    (pictures / "a" / "00.png").write_bytes(picture(0))
    twinview("embed", pictures, "--service", service, "-o", tmp_path / "v.npy")
    assert not (tmp_path / "v.skipped.csv").exists()


def test_the_key_comes_from_the_environment_and_is_never_printed(
    listen, pictures, twinview, tmp_path, monkeypatch, capsys
):
    port, _ = listen(access=Access.from_keys("s3cr3t"))
    command = ("embed", pictures, "--service", f"http://127.0.0.1:{port}", "-o", tmp_path / "v.npy")
    with pytest.raises(SystemExit, match=r"^error: this service requires an API key"):
        twinview(*command)
    monkeypatch.setenv("TWINVIEW_API_KEY", "s3cr3t")
    twinview(*command)
    with pytest.raises(SystemExit):
        twinview("embed", "--help")
    output = capsys.readouterr()
    assert "100 vectors" in output.out and "s3cr3t" not in output.out + output.err


def test_wrong_arguments_are_reported_before_anything_is_embedded(service, pictures, twinview, tmp_path):
    for arguments, sentence in (
        ((pictures, "-o", tmp_path / "v.txt"), r"v\.txt must end in \.npy or \.parquet"),
        ((pictures, "-o", pictures / "a" / "00.png" / "v.npy"), "v.npy cannot be written"),
        ((tmp_path / "nowhere",), "nowhere"),
        ((pictures, "--model", "nobody"), "no encoder nobody is served"),
        ((pictures, "--service", "http://127.0.0.1:9"), r"the service at http://127\.0\.0\.1:9\S* cannot be reached"),
    ):
        defaults = () if "-o" in arguments else ("-o", tmp_path / "v.npy")
        address = () if "--service" in arguments else ("--service", service)
        with pytest.raises(SystemExit, match=rf"^error: .*{sentence}"):
            twinview("embed", *arguments, *defaults, *address)
    assert not (tmp_path / "v.npy").exists()


def test_a_service_without_an_encoder_explains_it(pictures, twinview, serve, no_store, tmp_path, monkeypatch):
    http = serve(encoder=tmp_path / "nowhere")

    def answer(request: httpx.Request) -> httpx.Response:
        got = http.request(request.method, str(request.url))
        return httpx.Response(got.status_code, content=got.content)

    client = Client("http://127.0.0.1", transport=httpx.MockTransport(answer))
    monkeypatch.setattr("serving.cli.embed.Client", lambda *_, **__: client)
    with pytest.raises(SystemExit, match=r"^error: .*nowhere .*python training/pretrain\.py"):
        twinview("embed", pictures, "-o", tmp_path / "v.npy")


def test_the_version_is_that_of_the_package(twinview, capsys):
    twinview("--version")
    assert capsys.readouterr().out == f"twinview {version('twinview')}\n"


def test_help_lists_commands_and_options(twinview, capsys):
    twinview("--help")
    with pytest.raises(SystemExit):
        twinview("embed", "--help")
    output = capsys.readouterr().out
    assert "index add" in output and "--service" in output and "TWINVIEW_API_KEY" in output


@pytest.mark.slow
def test_help_imports_no_large_package():
    program = (
        "import sys; from serving.cli.main import main; sys.argv = ['twinview', '--help']; main(); print(*sys.modules)"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert not {"numpy", "torch", "lancedb", "pyarrow", "tyro", "httpx"} & set(output.splitlines()[-1].split())


def test_every_command_has_a_function_and_settings():
    for place, *_ in main.COMMANDS.values():
        module, _, function = place.partition(":")
        settings = get_type_hints(getattr(import_module(module), function))["settings"]
        assert dataclasses.is_dataclass(settings), place


@pytest.mark.parametrize("words", [["indx"], ["index", "ad"], ["--verison"]])
def test_an_unknown_command_is_named(words, twinview, capsys):
    with pytest.raises(SystemExit) as ended:
        twinview(*words)
    assert ended.value.code == 2
    assert f"error: there is no command twinview {' '.join(words)};" in capsys.readouterr().err


def test_a_misspelt_setting_ends_a_command(twinview, tmp_path, monkeypatch):
    monkeypatch.setenv("TWINVIEW_KEEP_ORIGINAL", "0")
    with pytest.raises(SystemExit, match="error: there is no setting TWINVIEW_KEEP_ORIGINAL; did you mean"):
        twinview("index", "list", "--index", tmp_path)


def test_ctrl_c_ends_with_130(twinview, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("serving.cli.index.collections", interrupted)
    with pytest.raises(SystemExit) as ended:
        twinview("index", "list", "--index", tmp_path)
    assert ended.value.code == 130
