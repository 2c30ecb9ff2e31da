"""The picture that an item was made from: who gets it, in which form, and that no path leads to any other file."""

import io
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from serving.access import Access
from serving.app import create_app
from serving.client import ServiceError
from serving.collection.index import Index, content_id
from serving.limits import DEFAULT_LIMITS

SIZE = (90, 60)


def jpeg(size: tuple[int, int] = SIZE, orientation: int = 1) -> bytes:
    """The left half red, the right half blue."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2, 0] = pixels[:, size[0] // 2 :, 2] = 255
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    exif[0x010E] = "at home"
    Image.fromarray(pixels).save(file, "JPEG", exif=exif, comment=b"by me")
    return file.getvalue()


@pytest.fixture
def add(bundle, tmp_path):
    """add(data, path=..., id=...) -> the item's id, of a file in a folder that has been indexed."""

    def put(data: bytes, id: str | None = None, **facts) -> str:
        from serving.collection.items import Item

        (tmp_path / "pictures").mkdir(exist_ok=True)
        id = id or content_id(data)
        file = tmp_path / "pictures" / f"{id}.jpg"
        file.write_bytes(data)
        item = replace(Item(id, "a.jpg", None, str(file), *SIZE, len(data)), **facts)
        index = Index(tmp_path / "index", bundle.card.id, bundle.card.dimension)
        index.add_folders([str(tmp_path / "pictures")])
        index.upsert([item], np.ones((1, bundle.card.dimension)), {id: b"thumbnail"})
        return id

    return put


@pytest.fixture
def get(http):
    return lambda id, **params: http.get(f"/collections/pictures/items/{id}/original", params=params)


def opened(answer) -> Image.Image:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/jpeg"
    return Image.open(io.BytesIO(answer.content))


def refused(answer) -> str:
    assert answer.status_code == 404
    return answer.json()["error"]["message"]


def test_the_original_is_upright_and_says_nothing_but_its_pixels(add, get):
    answer = get(add(jpeg(orientation=6)))
    image = opened(answer)
    assert image.size == SIZE[::-1]
    top, bottom = np.asarray(image)[[5, 84], 30]
    assert top[0] > 200 > top[2] and bottom[2] > 200 > bottom[0]
    assert not image.getexif() and b"at home" not in answer.content and b"by me" not in answer.content
    assert answer.headers["cache-control"].startswith("private")


@pytest.mark.slow
@pytest.mark.parametrize(("size", "shown"), [((5000, 2500), (2048, 1024)), ((300, 4096), (150, 2048))])
def test_a_large_picture_is_made_smaller(add, get, size, shown):
    assert opened(get(add(jpeg(size)))).size == shown


def test_a_file_that_has_changed_or_gone_is_not_shown(add, get, tmp_path):
    id = add(jpeg())
    file = tmp_path / "pictures" / f"{id}.jpg"
    file.write_bytes(jpeg()[:-2] + b"!!")
    assert "cannot be read here, or has changed" in refused(get(id))
    file.unlink()
    assert "cannot be read here, or has changed" in refused(get(id))


def test_a_path_leads_to_no_other_file_even_if_the_item_claims_its_size(add, get, tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg((80, 60)))
    size = secret.stat().st_size
    assert refused(get(add(jpeg(), path=str(secret), bytes=size)))
    assert refused(get(add(jpeg(), id="chosen", path=str(secret), bytes=size)))
    assert refused(get(add(jpeg(), path="/proc/self/environ", bytes=0)))
    (tmp_path / "link.jpg").symlink_to(secret)
    assert refused(get(add(jpeg(), path=str(tmp_path / "link.jpg"), bytes=size)))


def test_the_picture_itself_is_not_read_outside_the_folders_that_were_indexed(add, get, tmp_path):
    id = content_id(jpeg())
    opened(get(add(jpeg())))
    (tmp_path / "elsewhere.jpg").write_bytes(jpeg())
    refused(get(add(jpeg(), path=str(tmp_path / "elsewhere.jpg"))))
    refused(get(add(jpeg(), path=str(tmp_path / "pictures" / ".." / "elsewhere.jpg"))))
    (tmp_path / "pictures" / "link.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    refused(get(add(jpeg(), path=str(tmp_path / "pictures" / "link.jpg"))))
    (tmp_path / "pictures" / "own.jpg").symlink_to(tmp_path / "pictures" / f"{id}.jpg")
    opened(get(add(jpeg(), path=str(tmp_path / "pictures" / "own.jpg"))))


def test_a_pipe_is_not_waited_for(add, get, tmp_path):
    (tmp_path / "pictures").mkdir()
    os.mkfifo(tmp_path / "pictures" / "pipe")
    assert refused(get(add(jpeg(), path=str(tmp_path / "pictures" / "pipe"))))


def test_an_item_without_a_file_and_no_item_at_all_are_404(add, get):
    assert "cannot be read here" in refused(get(add(jpeg(), path=None)))
    assert "no item 0123 is in the collection" in refused(get("0123"))


def test_a_picture_that_the_service_would_refuse_as_an_upload_is_not_read(add, bundle, serve):
    id = add(jpeg())
    for limits in (replace(DEFAULT_LIMITS, pixels=100), replace(DEFAULT_LIMITS, body_bytes=100)):
        refused(serve(limits=limits).get(f"/collections/pictures/items/{id}/original"))


def test_the_original_needs_the_key(add, serve):
    id = add(jpeg())
    locked = serve(access=Access.from_keys("secret"))
    path = f"/collections/pictures/items/{id}/original"
    assert locked.get(path).status_code == 401
    assert locked.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200


def test_the_client_gets_it(add, http, connect):
    id = add(jpeg())
    assert Image.open(io.BytesIO(connect(http).original(id))).size == SIZE
    with pytest.raises(ServiceError) as failure:
        connect(http).original("0123")
    assert failure.value.status == 404


def test_an_uploaded_picture_is_kept_and_shown(http, get, tmp_path):
    data = jpeg()
    answer = http.put("/collections/pictures/items", content=data, headers={"Content-Type": "image/jpeg"})
    id = answer.json()["items"][0]["id"]
    assert opened(get(id)).size == SIZE
    assert Index(tmp_path / "index", answer.json()["model"], 48).read_original(id) == data
    assert http.get("/collections/pictures").json()["originals"] == len(data)
    assert [facts["originals"] for facts in http.get("/collections").json()["collections"]] == [len(data)]


def test_a_setting_keeps_no_uploaded_picture(serve, monkeypatch):
    monkeypatch.setenv("TWINVIEW_KEEP_ORIGINALS", "0")
    http = serve()
    answer = http.put("/collections/pictures/items", content=jpeg(), headers={"Content-Type": "image/jpeg"})
    assert http.get("/collections/pictures").json()["originals"] == 0
    refused(http.get(f"/collections/pictures/items/{answer.json()['items'][0]['id']}/original"))


def test_another_value_of_the_setting_ends_the_start(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("TWINVIEW_KEEP_ORIGINALS", "some")
    with pytest.raises(ValueError, match="TWINVIEW_KEEP_ORIGINALS is 1 or 0, not 'some'"):
        create_app(str(bundle.folder), tmp_path / "index")


def test_the_original_of_an_id_that_can_get_another_picture_is_asked_for_again(http, get):
    def put(size: tuple[int, int]) -> None:
        body, kind = jpeg(size), {"Content-Type": "image/jpeg"}
        http.put("/collections/pictures/items", params={"id": "mine"}, content=body, headers=kind)

    put(SIZE)
    first = get("mine")
    assert first.headers["cache-control"] == "private, no-cache"
    path, known = "/collections/pictures/items/mine/original", {"If-None-Match": first.headers["etag"]}
    assert http.get(path, headers=known).status_code == 304
    put(SIZE[::-1])
    assert opened(http.get(path, headers=known)).size == SIZE[::-1]


def test_a_kept_original_that_was_damaged_is_refused(http, get, tmp_path):
    answer = http.put("/collections/pictures/items", content=jpeg(), headers={"Content-Type": "image/jpeg"})
    id, model = answer.json()["items"][0]["id"], answer.json()["model"]
    index = Index(tmp_path / "index", model, 48)
    index.store.write(index.files.path("originals", id), jpeg()[:-100])
    assert "cannot be read here" in refused(get(id))
