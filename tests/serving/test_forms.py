"""Forms of other encodings, forms that are cut off, and a full disk for temporary files."""

import errno
import os
import re
import shlex
import tempfile
from pathlib import Path

import pytest

ITEMS = "/collections/pictures/items"
ROUTES = [("POST", "/embed"), ("PUT", ITEMS), ("POST", "/collections/pictures/search"), ("POST", "/matrix")]
TYPE = "multipart/form-data; boundary=x"


def form(*files: bytes) -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n'
    return b"".join(head + file + b"\r\n" for file in files) + b"--x--\r\n"


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("charset", ["undefined", "idna", "utf-7", "rot13", "no-such", "a\0b", "latin-1"])
def test_a_form_in_another_encoding_is_refused(http, picture, method, path, charset):
    headers = {"Content-Type": f'{TYPE}; charset="{charset}"'}
    answer = http.request(method, path, content=form(picture(0)), headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == f"forms are sent in UTF-8, not in {charset!r}"


@pytest.mark.parametrize("charset", ["utf-8", "UTF8", "us-ascii"])
def test_a_form_may_say_that_it_is_in_utf_8(http, picture, charset):
    headers = {"Content-Type": f"{TYPE}; charset={charset}"}
    assert http.post("/embed", content=form(picture(0)), headers=headers).status_code == 200


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_form_that_is_cut_off_is_refused(http, picture, method, path):
    whole = form(picture(0), picture(1))
    second = len(form(picture(0))) + 150
    for length in (second, len(whole) - len(b"--\r\n")):
        answer = http.request(method, path, content=whole[:length], headers={"Content-Type": TYPE})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == "the form is cut off: it has no end"
    assert http.get(ITEMS).status_code == 404  # nothing was stored


def test_what_follows_the_end_of_a_form_is_ignored(http, picture):
    content = form(picture(0)) + b"\r\n" * 100
    assert http.post("/embed", content=content, headers={"Content-Type": TYPE}).status_code == 200


@pytest.mark.parametrize("path", ["/embed", "/matrix"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_for_temporary_files_is_507(http, monkeypatch, caplog, path, code):
    def full(self) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", full)
    answer = http.post(path, files={"images": ("a.png", bytes(2 * 2**20))})
    assert answer.status_code == 507
    assert answer.json()["error"]["code"] == "disk_full"
    assert "a disk is full" in caplog.text


@pytest.mark.slow
def test_the_documented_commands_of_curl_embed_and_search(http, fill, picture):
    fill(6)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    answers = []
    for command in re.findall(r"^curl (.*)$", readme, re.MULTILINE):
        *options, url = shlex.split(command)
        assert options[::2] == ["-F"] * (len(options) // 2)
        fields = [field.split("=", 1) for field in options[1::2]]
        files = [(name, (value[1:], picture(i))) for i, (name, value) in enumerate(fields) if value.startswith("@")]
        data = {name: value for name, value in fields if not value.startswith("@")}
        answers.append(http.post(url.removeprefix("http://127.0.0.1:3000"), files=files, data=data).json())
    embedded, found = answers
    assert len(embedded["embeddings"]) == 2 and len(found["results"]) == 5
