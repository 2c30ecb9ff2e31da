"""Machines that are not like the developer's: little is open at a time, output goes nowhere, nothing can be written."""

import io
import os
import resource
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
OPEN_FILES = 64


def run(program: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Run lines of Python that start a program of ours."""
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=options.pop("capture_output", True), **options)


TWINVIEW = "import sys; sys.argv[0] = 'twinview'; from serving.cli.main import main; main()"


def read_nothing(program: str, *arguments: str) -> tuple[int, str]:
    """Status and messages of a program whose output nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    ended = run(program, *arguments, capture_output=False, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    return ended.returncode, ended.stderr


@pytest.mark.parametrize(
    "arguments", [("--help",), ("index", "list", "--index=docs"), ("index", "add", "--help")], ids=" ".join
)
def test_a_reader_that_has_gone_ends_a_command_without_a_message(arguments):
    status, messages = read_nothing(TWINVIEW, *arguments)
    assert (messages, status) == ("", 141)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
@pytest.mark.parametrize(
    "arguments", [("--help",), ("index", "list", "--index=docs"), ("index", "add", "--help")], ids=" ".join
)
def test_a_full_disk_ends_a_command_with_a_sentence(arguments):
    with open("/dev/full", "w") as full:
        ended = run(TWINVIEW, *arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.stderr == "error: the output cannot be written (No space left on device)\n"
    assert ended.returncode == 1


def test_a_program_that_goes_on_printing_ends():
    program = """
        from export.terminal import prepare_output
        prepare_output()
        try:
            while True:
                print("x" * 1000)
        except Exception:
            print("an error")
    """
    assert read_nothing(program) == (141, "")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_names_that_the_outputs_encoding_lacks_are_written_as_escapes(encoding, tmp_path):
    given = {**os.environ, "PYTHONIOENCODING": encoding}
    (tmp_path / "日本").mkdir()
    ended = run(TWINVIEW, "index", "list", f"--index={tmp_path}/日本", env=given)
    shown = "日本" if encoding == "utf-8" else r"\u65e5\u672c"
    assert ended.stdout == f"{tmp_path}/{shown} holds no collection\n".encode()
    assert ended.stderr == b"" and ended.returncode == 0
    assert run(TWINVIEW, "index", "add", "--help", env=given).returncode == 0


@pytest.mark.slow
def test_a_port_in_use_is_named_without_a_traceback(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        serve = [sys.executable, "-m", "bentoml", "serve", "--port", str(port)]
        environment = os.environ | {"BENTOML_HOME": str(tmp_path)}
        ended = subprocess.run(serve, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
    expected = f"error: 127.0.0.1:{port} cannot be used (Address already in use); choose another port with --port"
    assert ended.stderr.splitlines()[-1] == expected


def test_more_parquet_lists_than_may_be_open_are_read(tmp_path):
    for i in range(2 * OPEN_FILES):
        pq.write_table(pa.table({"image": [b"%d" % i], "split": ["train"]}), tmp_path / f"{i:03d}.parquet")
    program = """
        import sys
        from serving.indexing.originals import open_originals
        for split in ("all", "train"):
            found = open_originals(sys.argv[1], split)
            print(found.count, sum(int(one.read()) for one in found.files))
    """
    ended = run(program, str(tmp_path / "*.parquet"), preexec_fn=_few_open_files)
    assert ended.stdout.decode().split() == ["128", str(sum(range(128)))] * 2, ended.stderr


def test_more_shards_than_may_be_open_are_read(tmp_path):
    import tarfile

    file = io.BytesIO()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(file, "PNG")
    for i in range(2 * OPEN_FILES):
        with tarfile.open(tmp_path / f"{i:03d}.tar", "w") as shard:
            member = tarfile.TarInfo("0.png")
            member.size = len(file.getvalue())
            shard.addfile(member, io.BytesIO(file.getvalue()))
    program = """
        import sys
        from training.data.sources import open_source
        print(sum(len(picture.read()) for picture in open_source(sys.argv[1]).pictures))
    """
    ended = run(program, str(tmp_path), preexec_fn=_few_open_files)
    assert int(ended.stdout) == 2 * OPEN_FILES * len(file.getvalue()), ended.stderr


def _few_open_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))


@pytest.mark.slow
def test_a_map_is_made_where_neither_packages_nor_home_can_be_written():
    """Without a place for compiled functions, Numba refuses to import them."""
    program = """
        import sys
        import numba.core.caching as caching

        def refuse(*_):
            raise OSError
        for name in dir(caching):
            if "InTree" in name:  # next to the package
                getattr(caching, name).ensure_cache_path = refuse

        import numpy as np
        from serving.derived import map

        class Imported:  # the line after the import, which would fail
            def getLogger(self, name):
                print(name)
                sys.exit()
        map.is_writable, map.logging = lambda folder: False, Imported()
        map._pacmap(np.zeros((100, 8), np.float32), 0, None, print)
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG", "NUMBA"))}
    ended = run(program, env={**environment, "HOME": "/proc/none"}, text=True)
    assert ended.stdout.endswith("pacmap\n"), ended.stderr
