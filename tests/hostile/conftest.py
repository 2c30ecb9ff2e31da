from collections.abc import Iterator

import pytest

from tests.conftest import PATIENCE_S
from tests.serving import running
from tests.serving.conftest import _make_bundle
from tests.serving.running import Running


@pytest.fixture(scope="package")
def service(tmp_path_factory, wait_until) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("hostile")
    started = running.start(folder, _make_bundle(folder / "encoder").folder)
    try:
        ended = started.process.poll
        wait_until(lambda: ended() is not None or started.answers("/readyz"), "the service is not ready")
        yield started
    finally:
        started.process.terminate()
        started.process.wait(PATIENCE_S)
