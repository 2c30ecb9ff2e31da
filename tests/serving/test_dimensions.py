"""`dimensions` of /v1/embeddings, where the encoder was trained for it."""

from dataclasses import replace

import numpy as np
import pytest

from export.artifact import save_bundle
from serving.client import Client
from tests.serving.test_openai import uri


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, make_bundle):
    made = make_bundle(tmp_path_factory.mktemp("runs") / "nested" / "encoder")
    return save_bundle(made.folder, made.graph.read_bytes(), replace(made.card, shortened=[24, 12, 6]))


def test_vectors_are_cut_to_a_trained_length_and_no_other(listen, bundle, picture):
    import openai  # takes a second

    port, _ = listen()
    address = f"http://127.0.0.1:{port}"
    with Client(address) as ours:
        whole = ours.embed([picture(0)]).vectors[0]
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:

        def ask(**changes) -> np.ndarray:
            answer = client.embeddings.create(model="twinview", input=uri(picture(0)), **changes)
            return np.float32(answer.data[0].embedding)

        for length in (48, 24, 12, 6):
            np.testing.assert_array_equal(ask(dimensions=length), whole[:length])
        unit = whole[:12] / np.linalg.norm(whole[:12])
        np.testing.assert_allclose(ask(dimensions=12, extra_body={"normalize": True}), unit, rtol=1e-6)
        with pytest.raises(openai.BadRequestError) as refused:
            ask(dimensions=13)
    words = f"dimensions: the vectors of {bundle.card.id} have 48 or 24, 12, 6"
    assert words in refused.value.message and refused.value.param == "dimensions"
