"""LightlyStudio's embedding protocol, checked by the programs of its package lightly-studio-serve."""

import io
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from serving.access import Access
from serving.errors import NotReady
from serving.limits import Limits

DESCRIBE, EMBED = "/v1/describe", "/v1/embed/images/bytes"
DOCUMENT = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text().partition("## LightlyStudio")[2]
DOCUMENT = DOCUMENT.partition("\n## ")[0]
BLOCKS = re.findall(r"^```(?:python)?\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def kit():
    import lightly_studio_serve.cli  # takes a second
    import lightly_studio_serve.conformance

    return lightly_studio_serve


@pytest.fixture
def protocol(kit):
    from lightly_studio_serve import protocol

    return protocol


def files(*images: bytes) -> list:
    """As LightlyStudio sends them."""
    return [("files", (str(i), image, "application/octet-stream")) for i, image in enumerate(images)]


@pytest.mark.slow
def test_the_conformance_program_passes_a_service(listen, kit, bundle, capsys):
    port, _ = listen()
    assert kit.cli.main(["conformance", f"http://127.0.0.1:{port}"]) == 0
    report = capsys.readouterr().out
    assert report.splitlines()[2:6] == [
        "protocol 1.0",
        f"space    {bundle.card.id}",
        "vectors  48 values",
        "ready    yes",
    ]
    assert "image_bytes  passed" in report and report.count("not advertised") == 2


def test_the_conformance_program_sends_a_key(listen, kit, capsys):
    port, _ = listen(access=Access.from_keys("secret"))
    ask = ["conformance", f"http://127.0.0.1:{port}", "--api-key"]
    assert kit.cli.main([*ask, "secret"]) == 0
    assert kit.cli.main([*ask, "wrong"]) == 1
    assert "the API key is not one of this service's keys" in capsys.readouterr().out


def test_the_description_has_the_limits_that_are_in_force(serve, protocol, bundle, picture):
    http = serve(limits=Limits(body_bytes=50_000, images=3))
    described = protocol.DescribeResponse.model_validate_json(http.get(DESCRIBE).content)
    assert (described.space_key, described.dimension) == (bundle.card.id, 48)
    assert [one.value for one in described.capabilities] == ["image_bytes"]
    assert (described.limits.max_batch_size, described.limits.max_request_bytes) == (3, 50_000)
    assert http.post(EMBED, files=files(*[picture(1)] * 3)).status_code == 200
    four = http.post(EMBED, files=files(*[picture(1)] * 4))
    assert four.status_code == protocol.STATUS_PAYLOAD_TOO_LARGE
    assert four.json()["error"]["message"] == "more than 3 images in one request; send fewer at a time"
    assert four.json()["error"]["param"] == "files"
    assert http.post(EMBED, files=files(b"x" * 50_001)).status_code == protocol.STATUS_PAYLOAD_TOO_LARGE


def test_the_vectors_are_those_of_embed_with_unit_length(http, protocol, bundle, picture):
    pictures = [*map(picture, range(20)), noise(800, 600)]  # the last is decoded elsewhere
    expected = http.post("/embed?normalize=1", files=[("images", file) for _, file in files(*pictures)]).json()
    got = protocol.EmbeddingsResponse.model_validate_json(http.post(EMBED, files=files(*pictures)).content)
    assert (got.space_key, got.dimension, got.kept_indices) == (bundle.card.id, 48, list(range(21)))
    np.testing.assert_allclose(got.embeddings, expected["embeddings"], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(got.embeddings, axis=1), 1, atol=1e-6)


def noise(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_what_cannot_be_read_is_left_out_and_the_rest_keeps_its_places(serve, protocol, picture):
    http = serve(limits=Limits(pixels=100 * 100))
    cut = picture(7, (90, 90), "JPEG")[:-200]
    sent = [b"", picture(0), b"no picture", cut, picture(1), noise(101, 100), picture(2), b"<svg/>"]
    got = protocol.EmbeddingsResponse.model_validate_json(http.post(EMBED, files=files(*sent)).content)
    assert got.kept_indices == [1, 4, 6]
    alone = [http.post(EMBED, files=files(picture(i))).json()["embeddings"][0] for i in range(3)]
    np.testing.assert_allclose(got.embeddings, alone, atol=1e-6)


def test_a_request_without_a_readable_picture_has_an_empty_answer(http, protocol, bundle):
    got = protocol.EmbeddingsResponse.model_validate_json(http.post(EMBED, files=files(b"no", b"picture")).content)
    assert (got.space_key, got.dimension, got.kept_indices, got.embeddings) == (bundle.card.id, 48, [], [])


def test_pictures_that_have_too_many_pixels_together_are_a_413_after_which_clients_split_them(serve, protocol, picture):
    http = serve(limits=Limits(request_pixels=2000))
    assert http.post(EMBED, files=files(picture(0))).status_code == 200
    refused = http.post(EMBED, files=files(picture(0), picture(1)))
    assert refused.status_code == protocol.STATUS_PAYLOAD_TOO_LARGE
    assert refused.json()["error"]["message"] == "the request's pictures have more than 2,000 pixels; send fewer"


def test_another_encoder_has_another_space(serve, make_bundle, bundle, tmp_path, picture):
    other = make_bundle(tmp_path / "other", scale=1.0)
    spaces = {}
    for one in (bundle, other):
        http = serve(encoder=one.folder)
        spaces[one.card.id] = [
            http.get(DESCRIBE).json()["space_key"],
            http.post(EMBED, files=files(picture(0))).json()["space_key"],
        ]
    assert len(spaces) == 2 and all(keys == [id, id] for id, keys in spaces.items())


def test_of_several_encoders_the_default_is_described_and_embeds(serve, make_bundle, bundle, tmp_path, picture):
    other = make_bundle(tmp_path / "other", scale=1.0)
    http = serve(encoder=f"{other.folder},{bundle.folder}")
    assert http.get(DESCRIBE).json()["space_key"] == other.card.id
    assert http.post(EMBED, files=files(picture(0))).json()["space_key"] == other.card.id


def test_an_encoder_that_does_not_answer_is_not_ready(http, monkeypatch, protocol):
    async def fail():
        raise NotReady("the encoder does not answer")

    monkeypatch.setattr(http.app.state.engine, "check", fail)
    described = protocol.DescribeResponse.model_validate_json(http.get(DESCRIBE).content)
    assert not described.ready


def test_without_an_encoder_clients_are_asked_to_come_back(serve, tmp_path, picture, no_store):
    http = serve(encoder=tmp_path / "nowhere")
    for answer in (http.get(DESCRIBE), http.post(EMBED, files=files(picture(0)))):
        assert answer.status_code == 503
        assert str(tmp_path / "nowhere") in answer.json()["error"]["message"]


def test_a_full_service_is_a_429_that_clients_wait_out(serve, picture):
    http = serve(limits=Limits(images_at_once=0))
    answer = http.post(EMBED, files=files(picture(0)))
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
    assert http.post(EMBED, content=b"no form").status_code == 429  # before its body is read
    more = serve(limits=Limits(images_at_once=2)).post(EMBED, files=files(*map(picture, range(3))))
    assert more.status_code == 429 and "busy with 2 images" in more.json()["error"]["message"]


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({}, 400, "files: the form has no such field"),
        ({"files": [("file", b"x")]}, 400, "file: is not a field of this form; did you mean files?"),
        ({"files": [("images", b"x")]}, 400, "images: is not a field of this form, which has files"),
        ({"files": files(b"x"), "data": {"model": "m"}}, 400, "model: is not a field of this form, which has files"),
        ({"files": [("files", (None, "text"))]}, 400, "files[0]: must be a file"),
        ({"json": {"files": []}}, 415, f"{EMBED} accepts multipart/form-data, not application/json"),
        ({"content": b"x", "headers": {"Content-Type": "image/png"}}, 415, f"{EMBED} accepts multipart/form-data, not"),
        ({"files": files(b"x"), "params": {"normalize": 1}}, 400, f"normalize: is not a parameter of POST {EMBED}"),
    ],
)
def test_a_wrong_request_is_refused_in_a_sentence(http, request_, status, message):
    answer = http.post(EMBED, **request_)
    assert answer.status_code == status
    assert answer.json()["error"]["message"].startswith(message)


def test_routes_of_newer_versions_and_of_texts_are_a_404(http):
    """That is how clients learn that a server does not offer something."""
    for method, path in (("GET", "/v2/describe"), ("POST", "/v1/embed/texts"), ("POST", "/v1/embed/videos/bytes")):
        answer = http.request(method, path)
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == f"there is nothing at {path}; /docs lists the routes"


def test_embedded_pictures_are_counted_and_compared_with_the_collection(http, monkeypatch, picture):
    noted = []
    monkeypatch.setattr(http.app.state.engine.library, "note_pictures", lambda encoder, h: noted.append(h.shape))
    http.post(EMBED, files=files(picture(0), b"no picture", picture(1)))
    assert noted == [(2, 48)]
    text = http.get("/metrics").text
    assert "twinview_images_total 2.0" in text
    assert f'route="{EMBED}"' in text


# docs/integrations.md -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_documents_commands_start_a_service_and_check_it(launch, bundle, kit, capsys):
    start, _, check = BLOCKS
    *settings, bentoml, serve = start.split()
    assert (bentoml, serve) == ("bentoml", "serve")
    environment = dict(one.split("=") for one in settings)
    assert environment.pop("TWINVIEW_ENCODER") == "lite0"
    running = launch(bundle.folder, environment=environment)
    program, *arguments = shlex.split(check.replace("http://127.0.0.1:3000", running.address))
    assert program == kit.cli.PROGRAM
    assert kit.cli.main(arguments) == 0, capsys.readouterr().out


def test_the_documents_program_connects_to_the_service(listen, kit, monkeypatch):
    """LightlyStudio itself is large: stand-ins have the names and parameters of version 1.2.0 that the program uses."""
    did = []

    class RemoteEmbedder:
        @classmethod
        def connect(cls, client: str, api_key: str | None = None):
            probes = kit.conformance.HttpProbeClient(client, api_key)
            return kit.conformance.check_conformance(probes)

    class Dataset:
        def add_images_from_path(self, path: str):
            did.append("images")

    def register_default_embedder(embedder):
        assert embedder.passed, kit.conformance.render(embedder)
        did.append("embedder")

    def start_gui():
        did.append("page")

    studio = SimpleNamespace(
        register_default_embedder=register_default_embedder,
        ImageDataset=SimpleNamespace(create=Dataset),
        start_gui=start_gui,
    )
    remote = "lightly_studio.embed.remote"
    for name, module in {
        "lightly_studio": studio,
        "lightly_studio.embed": SimpleNamespace(),
        remote: SimpleNamespace(),
        f"{remote}.connection": SimpleNamespace(build_client=lambda url: url),
        f"{remote}.embedder": SimpleNamespace(RemoteEmbedder=RemoteEmbedder),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    port, _ = listen(access=Access.from_keys("secret"))
    _, program, _ = BLOCKS
    exec(program.replace("http://127.0.0.1:3000", f"http://127.0.0.1:{port}"), {})
    assert did == ["embedder", "images", "page"]


def test_the_document_names_the_routes():
    assert f"`GET {DESCRIBE}`" in DOCUMENT.replace("\n", " ") and f"`POST {EMBED}`" in DOCUMENT
