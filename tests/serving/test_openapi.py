"""The OpenAPI document: that it is whole, and that the service keeps to it, whatever is generated from it."""

import contextlib

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from serving.access import Access
from serving.errors import KINDS
from serving.protocol.pack import MEDIA_TYPE, pack

KEY = {"Authorization": "Bearer key"}
EXAMPLES = 40  # of each operation
SEARCH = "/collections/{name}/search"
EMBEDDING = ("/embed", "/classify", "/v1/embeddings", SEARCH, "/views")


@pytest.fixture
def document(http) -> dict:
    return http.get("/openapi.json").json()


def test_every_route_is_documented_with_its_answer_and_its_errors_in_the_one_shape(http, document):
    routes = {route.path_format for route in http.app.routes if getattr(route, "include_in_schema", False)}
    assert routes == set(document["paths"])
    for path, item in document["paths"].items():
        for operation in item.values():
            answers = operation["responses"]
            (content, *_) = answers["202" if "202" in answers else "200"]["content"].values()
            assert content["schema"], path
            for status, answer in answers.items():
                if status not in ("200", "202", "304"):
                    assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorAnswer")
                    assert status == "default" or int(status) in KINDS
            if path in EMBEDDING:
                assert {"400", "401", "403", "413", "422", "429", "503"} <= set(answers)
                assert operation["requestBody"]["required"]
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_operations_have_names_for_the_methods_of_generated_clients(document):
    names = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(set(names)) == len(names)
    assert {"embed", "create_embeddings", "search", "put_items", "items", "collection", "models", "model"} < set(names)


def test_the_bodies_of_embed_and_its_parameters_are_documented(document):
    embed = document["paths"]["/embed"]["post"]
    assert set(embed["requestBody"]["content"]) == {
        "multipart/form-data",
        "image/*",
        "application/octet-stream",
        MEDIA_TYPE,
    }
    assert {parameter["name"] for parameter in embed["parameters"]} == {"normalize", "model", "encoding_format"}
    assert set(embed["responses"]["200"]["content"]) == {"application/json", "application/x-npy"}
    query = document["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(query["properties"]) >= {"input", "model", "encoding_format", "dimensions", "user", "modality"}
    assert {one.get("type") for one in query["properties"]["input"]["anyOf"]} == {"string", "array"}


@pytest.fixture
def schema(listen, fill, picture):
    """Of a service with keys, over a real socket. Bodies are pictures as often as they are not."""
    fill(3)
    port, _ = listen(access=Access.of_keys("key"))
    pictures = st.integers(0, 5).map(picture)
    anything = pictures | st.binary(max_size=100)
    for media in ("image/*", "application/octet-stream"):
        schemathesis.openapi.media_type(media, anything)
    schemathesis.openapi.media_type(MEDIA_TYPE, st.lists(anything, max_size=3).map(pack) | st.binary(max_size=100))
    return schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json", headers=KEY)


@schemathesis.serializer("image/*", MEDIA_TYPE)
def _(context, value):
    return value


@pytest.mark.parametrize("mode", GenerationMode)
def test_the_service_keeps_to_it(schema, mode):
    """No 5xx, only documented statuses and types, answers and errors in their shapes, no way around the keys; with what
    fits the document and with what does not. Of what fits little is a picture, so that its refusal says nothing."""
    tested = set()
    for operation in (result.ok() for result in schema.get_all_operations()):

        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(generation_mode=mode))
        def keeps(case):
            case.call_and_validate(headers=KEY, excluded_checks=[positive_data_acceptance, negative_data_rejection])

        with contextlib.suppress(Unsatisfiable):  # an operation without parameters cannot be asked wrongly
            keeps()
            tested.add(operation.path)
    assert tested >= {*EMBEDDING, "/collections/{name}/items"}
