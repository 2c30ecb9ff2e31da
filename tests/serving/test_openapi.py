"""The OpenAPI document: it is complete, and the service conforms to it for generated requests."""

import contextlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from serving.access import Access
from serving.api.groups import GROUPS
from serving.errors import KINDS
from serving.protocol.pack import MEDIA_TYPE, pack

KEY = {"Authorization": "Bearer key"}
EXAMPLES = 40  # requests for each operation
SEARCH = "/collections/{name}/search"
EMBEDDING = ("/embed", "/classify", "/v1/embeddings", SEARCH, "/views")


@pytest.fixture
def document(http) -> dict:
    return http.get("/openapi.json").json()


@pytest.mark.slow
def test_every_route_documents_its_answer_and_its_errors_in_the_same_shape(http, document):
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


def test_every_operation_is_in_a_group_and_has_a_short_summary_of_its_own(document):
    operations = {one["operationId"]: one for item in document["paths"].values() for one in item.values()}
    assert set(operations) == {name for names in GROUPS.values() for name in names}
    assert [tag["name"] for tag in document["tags"]] == list(GROUPS)
    for group, names in GROUPS.items():
        for name, summary in names.items():
            assert (operations[name]["tags"], operations[name]["summary"]) == ([group], summary)
            assert summary[0].isupper() and len(summary) <= 60 and not summary.endswith(".")
            assert operations[name]["description"]
    first = next(iter(document["paths"].values()))
    assert "search" in [operation["operationId"] for operation in first.values()]


def test_operations_have_readable_ids_for_generated_clients(document):
    names = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(set(names)) == len(names)
    assert {"embed", "create_embeddings", "search", "put_items", "items", "collection", "models", "model"} < set(names)


def test_the_bodies_and_parameters_of_embed_are_documented(document):
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


def test_docstrings_of_fields_are_descriptions_in_subclasses_too(document):
    match = document["components"]["schemas"]["Match"]
    assert match["properties"]["similarity"]["description"].startswith("Cosine similarity")
    assert match["properties"]["width"]["description"].startswith("Width in pixels")
    assert "width" in match["required"]  # though the dataclass has a default


def test_arrays_have_the_schema_of_their_json(document):
    schemas = document["components"]["schemas"]
    assert schemas["Map"]["properties"]["x"]["type"] == "string"
    vector = schemas["ItemWithVector"]
    assert vector["properties"]["vector"]["items"] == {"type": "number"} and "vector" not in vector["required"]


@pytest.fixture
def schema(listen, fill, picture):
    """The document of a service with keys on a real socket. About half of the generated bodies are pictures."""
    import schemathesis  # takes two seconds

    @schemathesis.serializer("image/*", MEDIA_TYPE)
    def _(context, value):
        return value

    fill(3)
    port, _ = listen(access=Access.from_keys("key"))
    pictures = st.integers(0, 5).map(picture)
    anything = pictures | st.binary(max_size=100)
    for media in ("image/*", "application/octet-stream"):
        schemathesis.openapi.media_type(media, anything)
    schemathesis.openapi.media_type(MEDIA_TYPE, st.lists(anything, max_size=3).map(pack) | st.binary(max_size=100))
    return schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json", headers=KEY)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_the_service_conforms_to_the_document(schema, mode):
    """No 5xx, only documented statuses, media types and shapes, and no way around the keys, for valid and invalid
    requests. Whether a valid request is accepted is not checked, because few generated files are pictures."""
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

    tested = set()
    for operation in (result.ok() for result in schema.get_all_operations()):

        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(generation_mode=GenerationMode(mode)))
        def keeps(case):
            case.call_and_validate(headers=KEY, excluded_checks=[positive_data_acceptance, negative_data_rejection])

        with contextlib.suppress(Unsatisfiable):  # no request to an operation without parameters is invalid
            keeps()
            tested.add(operation.path)
    assert tested >= {*EMBEDDING, "/collections/{name}/items"}


BODIES = (
    ("put", "/collections/{name}/items"),
    ("patch", "/collections/{name}/items"),
    ("post", "/collections/{name}/search"),
    ("post", "/v1/embeddings"),
)


@pytest.mark.parametrize(("method", "path"), BODIES)
def test_null_is_documented_for_every_field_with_a_default(document, method, path):
    body = document["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"]
    rows = body["properties"].get("items", {}).get("items")
    nullable = {
        (name, name not in schema.get("required", ())): {"type": "null"} in field.get("anyOf", ())
        for schema in (body, rows or body)
        for name, field in schema["properties"].items()
    }
    assert len(nullable) > 5
    assert all(null == optional for (_, optional), null in nullable.items()), nullable


def test_null_in_metadata_is_documented(document):
    body = document["paths"]["/collections/{name}/items"]["put"]["requestBody"]["content"]["application/json"]["schema"]
    (metadata, _) = body["properties"]["items"]["items"]["properties"]["metadata"]["anyOf"]
    assert {"type": "null"} in next(iter(metadata["patternProperties"].values()))["anyOf"]


def test_parameters_and_forms_have_no_null(document):
    for method, path in (("post", "/embed"), ("put", "/collections/{name}/items")):
        for parameter in document["paths"][path][method]["parameters"]:
            assert {"type": "null"} not in parameter["schema"].get("anyOf", ()), parameter
    form = document["paths"]["/collections/{name}/search"]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert not any({"type": "null"} in field.get("anyOf", ()) for field in form["schema"]["properties"].values())
