"""README's first examples, as they are printed: `curl` and three lines with the `openai` package."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.commands import up
from tests.support.markdown import ROOT
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

USUAL = "127.0.0.1:8080"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    address = f"127.0.0.1:{free_port()}"
    with up(tmp_path_factory.mktemp("up"), "--simulate", "4", "--gateway", address):
        yield address


def block(begins: str, page: Path = ROOT / "README.md") -> str:
    """The first fenced block that begins so, whatever its language."""
    blocks: list[str] = re.findall(r"^```\w*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return next(text for text in blocks if text.startswith(begins))


def test_curl_gets_an_answer(gateway: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not on this machine")
    command = block("curl ").replace(USUAL, gateway)
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=30, check=True)
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["prompt_tokens"] > 0


def test_the_openai_package_gets_an_answer(gateway: str) -> None:
    code = block("from openai import").replace(USUAL, gateway)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert len(done.stdout.split()) > 3
