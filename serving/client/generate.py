"""Writes sync_client.py from async_client.py. Run it after every change of async_client.py:

python serving/client/generate.py
"""

import re
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("async_client.py")
TARGET = Path(__file__).with_name("sync_client.py")
HEADER = '"""Client. Generated from async_client.py by `python serving/client/generate.py`: edit that file instead."""'
REPLACEMENTS = {
    r"async def": "def",
    r"await ": "",
    r"import asyncio": "import time",
    r"asyncio\.sleep": "time.sleep",
    r"AsyncClient": "Client",
    r"AsyncBaseTransport": "BaseTransport",
    r"aclose": "close",
    r"__aenter__": "__enter__",
    r"__aexit__": "__exit__",
}


def generate() -> str:
    """Returns the text of sync_client.py."""
    text = re.sub(r'^""".*?"""$', HEADER, SOURCE.read_text(), count=1, flags=re.MULTILINE)
    for pattern, replacement in REPLACEMENTS.items():
        text = re.sub(rf"\b{pattern}", replacement, text)
    for tidy in (["check", "--fix-only", "--select", "I"], ["format"]):
        command = [sys.executable, "-m", "ruff", *tidy, "--quiet", "--stdin-filename", str(TARGET), "-"]
        text = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=True).stdout
    return text


if __name__ == "__main__":
    TARGET.write_text(generate())
