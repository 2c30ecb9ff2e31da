"""The model for FiftyOne. FiftyOne itself is large and needs a database: stand-ins have its names, as of 1.22.1."""

import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from serving.access import Access
from serving.client import Client, ServiceError

DOCUMENT = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text().partition("## FiftyOne")[2]
DOCUMENT = DOCUMENT.partition("\n## ")[0]


class Model:
    """What FiftyOne's class raises where a subclass lacks something."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    @property
    def has_embeddings(self) -> bool:
        return False

    @property
    def media_type(self):
        raise NotImplementedError

    ragged_batches = transforms = preprocess = media_type


class EmbeddingsMixin:
    @property
    def has_embeddings(self):
        raise NotImplementedError


class Dataset(list):
    @classmethod
    def from_images_dir(cls, folder: str) -> "Dataset":
        return cls(SimpleNamespace(filepath=path) for path in sorted(Path(folder).iterdir()))

    def compute_embeddings(self, model: Model, embeddings_field: str, batch_size: int | None = None) -> None:
        """As FiftyOne does: it reads the files, and `ragged_batches` forbids batches."""
        assert isinstance(model, Model) and model.has_embeddings
        assert model.media_type == "image" and not model.ragged_batches
        arrays = [np.asarray(Image.open(sample.filepath).convert("RGB")) for sample in self]
        with model:
            vectors = [model.embed(image) for image in arrays] if batch_size is None else model.embed_all(arrays)
        for sample, vector in zip(self, vectors, strict=True):
            setattr(sample, embeddings_field, vector)


@pytest.fixture
def fiftyone(monkeypatch):
    """Stands in for FiftyOne, and for what imports it."""
    package = SimpleNamespace(Dataset=Dataset)
    models = SimpleNamespace(Model=Model, EmbeddingsMixin=EmbeddingsMixin)
    for name, module in {"fiftyone": package, "fiftyone.core": package, "fiftyone.core.models": models}.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield package
    sys.modules.pop("serving.client.fiftyone_model", None)


@pytest.fixture
def service(listen) -> str:
    port, _ = listen(access=Access.from_keys("secret"))
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def pictures(tmp_path, monkeypatch, picture) -> list[Path]:
    """Three pictures of different sizes in the folder `pictures` of the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    paths = [Path("pictures") / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(picture(i, (40 + i, 30)))
    return paths


def test_the_documents_program_gives_every_sample_the_services_vector(fiftyone, service, pictures):
    (program,) = re.findall(r"^```python\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)
    names: dict = {}
    exec(program.replace("http://127.0.0.1:3000", service), names)
    with Client(service, "secret") as client:
        direct = client.embed(pictures, normalize=True).vectors
    np.testing.assert_allclose([sample.twinview for sample in names["dataset"]], direct, atol=1e-6)
    names["dataset"].compute_embeddings(names["model"], embeddings_field="batch", batch_size=3)
    np.testing.assert_allclose([sample.batch for sample in names["dataset"]], direct, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(direct, axis=1), 1, atol=1e-6)


def test_a_model_uses_the_encoder_that_is_named_and_refuses_in_sentences(fiftyone, service, picture):
    from serving.client.fiftyone_model import TwinviewModel

    image = np.asarray(Image.open(io.BytesIO(picture(0))))
    with pytest.raises(ServiceError, match="requires an API key"):
        TwinviewModel(service).embed(image)
    with pytest.raises(ServiceError, match="nobody"):
        TwinviewModel(service, "secret", model="nobody").embed(image)
    with pytest.raises(NotImplementedError, match="use compute_embeddings"):
        TwinviewModel(service, "secret").predict(image)
    model = TwinviewModel(service, "secret")
    assert model.transforms is None and model.preprocess is False
