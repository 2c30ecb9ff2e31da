"""OpenAI's own client, unchanged, over a real socket."""

import asyncio
import base64

import httpx
import numpy as np
import pytest

from serving.client import Client


@pytest.fixture(scope="module")
def openai():
    import openai  # takes a second

    return openai


@pytest.fixture
def service(listen):
    port, _ = listen()
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def client(service, openai):
    with openai.OpenAI(base_url=f"{service}/v1", api_key="any", max_retries=0) as client:
        yield client


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.mark.slow
def test_it_gets_the_vectors_of_embed(service, client, bundle, picture):
    with Client(service) as ours:
        expected = ours.embed([picture(0), picture(1)]).vectors
    answer = client.embeddings.create(model="twinview", input=[uri(picture(0)), base64.b64encode(picture(1)).decode()])
    assert (answer.object, answer.model) == ("list", bundle.card.id)
    assert [(one.object, one.index) for one in answer.data] == [("embedding", 0), ("embedding", 1)]
    np.testing.assert_array_equal(np.float32([one.embedding for one in answer.data]), expected)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (2, 2)


def test_floats_and_base64_are_the_same_numbers(client, picture):
    one, other = (
        client.embeddings.create(model="twinview", input=uri(picture(0)), encoding_format=form).data[0].embedding
        for form in ("float", "base64")
    )
    assert isinstance(one, list) and isinstance(other, str)
    np.testing.assert_array_equal(np.float32(one), np.frombuffer(base64.b64decode(other), "<f4"))


def test_the_async_client_gets_the_same(service, client, picture, openai):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{service}/v1", api_key="any", max_retries=0) as client:
            return await client.embeddings.create(model="twinview", input=uri(picture(3)), user="me", dimensions=48)

    expected = client.embeddings.create(model="twinview", input=uri(picture(3)))
    assert asyncio.run(ask()).data[0].embedding == expected.data[0].embedding


def test_extra_fields_of_other_clients_are_accepted(client, picture):
    answer = client.embeddings.create(
        model="twinview", input=uri(picture(0)), extra_body={"modality": "image", "normalize": True}
    )
    assert np.linalg.norm(answer.data[0].embedding) == pytest.approx(1, abs=1e-6)


def test_it_lists_the_models(client, bundle):
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == (bundle.card.id, "model", "twinview")
    assert model.created > 1.7e9
    assert model.dimension == 48 and model.preprocessing["size_px"] == 32
    assert client.models.retrieve(bundle.card.id) == model == client.models.retrieve("twinview")


def test_a_refusal_is_an_error_of_the_openai_client(client, picture, openai):
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.embeddings.create(model="twinview", input=[uri(picture(0)), uri(b"no picture")])
    assert refused.value.body["message"] == "input[1] is not an image in a supported format"
    assert (refused.value.code, refused.value.param) == ("undecodable", "input[1]")
    with pytest.raises(openai.NotFoundError) as refused:
        client.embeddings.create(model="gpt-4", input=uri(picture(0)))
    assert (refused.value.code, refused.value.param) == ("not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"input": "https://example.org/cat.jpg"}, "input[0]", "is a URL, which the service does not fetch"),
        ({"input": ["", "file:///etc/passwd"]}, "input[1]", "is a URL"),
        ({"input": "a cat."}, "input[0]", "is neither a data URI nor base64"),
        ({"input": "data:image/png;base64,abcde"}, "input[0]", "is neither"),
        ({"input": []}, "input", "is empty"),
        ({"input": [[1, 2]]}, "input[0]", "text is needed"),
        ({"input": None}, "input", "a list is needed"),
        ({"encoding_format": "int8"}, "encoding_format", "float or base64 is needed"),
        ({"dimensions": 24}, "dimensions", "have 48 and cannot be shortened"),
        ({"dimensions": "many"}, "dimensions", "a whole number is needed"),
        ({"modality": "text"}, "modality", "image is needed"),
        ({"inputs": "x"}, "inputs", "did you mean input?"),
    ],
)
def test_an_invalid_query_is_a_400_that_names_the_field(http, picture, changes, param, words):
    query = {"model": "twinview", "input": uri(picture(0))}
    answer = http.post("/v1/embeddings", json=query | changes)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"] and error["message"].startswith(param)


def test_a_data_uri_without_base64_is_percent_encoded(http, picture):
    answers = [http.post("/v1/embeddings", json={"input": text}) for text in (uri(picture(0)), plain_uri(picture(0)))]
    assert answers[0].json()["data"] == answers[1].json()["data"]
    refused = http.post("/v1/embeddings", json={"input": "data:image/png,abc"})
    assert refused.status_code == 422 and refused.json()["error"]["param"] == "input[0]"


def plain_uri(data: bytes) -> str:
    return "data:image/png," + "".join(f"%{byte:02X}" for byte in data)


def test_base64_can_have_line_breaks(http, picture):
    lines = base64.encodebytes(picture(0)).decode()
    assert "\n" in lines[:-1]
    assert http.post("/v1/embeddings", json={"input": lines}).status_code == 200


def test_a_key_of_the_service_is_an_api_key_for_openais_client(listen, picture, openai):
    from serving.access import Access

    port, _ = listen(access=Access.from_keys("secret"))
    ask = {"model": "twinview", "input": uri(picture(0))}
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret") as client:
        assert len(client.embeddings.create(**ask).data[0].embedding) == 48
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            client.embeddings.create(**ask)
        assert refused.value.code == "no_key"


def test_openais_client_retries_while_the_service_is_busy(monkeypatch, openai):
    """The client understands the Retry-After of this service."""
    waits = []
    busy = httpx.Response(429, headers={"Retry-After": "1"}, json={"error": {"message": "come back"}})
    good = {"object": "list", "data": [], "model": "m", "usage": {"prompt_tokens": 0, "total_tokens": 0}}
    answers = [busy, httpx.Response(200, json=good)]
    transport = httpx.MockTransport(lambda request: answers.pop(0))
    monkeypatch.setattr("time.sleep", waits.append)
    with openai.OpenAI(base_url="http://s/v1", api_key="k", http_client=httpx.Client(transport=transport)) as client:
        client.embeddings.create(model="twinview", input="x", encoding_format="float")
    assert waits and 0.5 <= waits[0] <= 2
