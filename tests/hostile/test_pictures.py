"""Files that are made to stall or to end the service, sent to a real one while others use it."""

import pytest

from serving.protocol.pack import MEDIA_TYPE, pack
from tests.hostile.files import ONE, SEVERAL
from tests.hostile.siege import besieged, post


@pytest.mark.slow
@pytest.mark.parametrize("what", ONE)
def test_a_hostile_file_delays_nobody(service, wait_until, what):
    data = ONE[what]()
    put = {"path": "/collections/hostile/items", "method": "PUT"}
    asks = [lambda: post(service, data)] * 2 + [lambda: post(service, data, **put)]
    besieged(service, wait_until, asks)


@pytest.mark.slow
@pytest.mark.parametrize("what", SEVERAL)
def test_a_request_of_many_hostile_files_delays_nobody(service, wait_until, what):
    body = pack(SEVERAL[what]())
    asks = [lambda: post(service, body, MEDIA_TYPE)] * 2
    besieged(service, wait_until, asks)
