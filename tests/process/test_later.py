"""Modules that are loaded at their first use, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def printed(folder: Path, code: str) -> list[str]:
    begin = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); from kvplane.services.process.later import later, without\n"
    )
    done = subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def package(folder: Path) -> None:
    (folder / "slow").mkdir()
    (folder / "slow" / "__init__.py").write_text(
        "print('loaded')\nfrom . import part\nfrom .part import answer\nimport time; time.sleep(0.2)\nlast = 1\n"
        "def __getattr__(name):\n  if name == 'made': return 'made'\n  raise AttributeError(name)\n"
    )
    (folder / "slow" / "part.py").write_text("import slow\nanswer = 42\n")


def test_it_is_loaded_once_when_something_is_asked_for(tmp_path: Path) -> None:
    package(tmp_path)
    code = (
        "later('slow')\nimport slow\nprint('imported')\nprint(slow.answer, slow.last, slow.made, hasattr(slow, 'no'))"
    )
    assert printed(tmp_path, code) == ["imported", "loaded", "42", "1", "made", "False"]
    assert printed(tmp_path, "later('slow')\nfrom slow import part\nprint(part.answer)") == ["loaded", "42"]
    assert printed(tmp_path, "later('slow')\nimport slow.part\nprint(slow.last)") == ["loaded", "1"]


def test_threads_that_ask_meanwhile_wait(tmp_path: Path) -> None:
    package(tmp_path)
    code = (
        "later('slow')\nimport slow\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(4) as pool: print(*pool.map(lambda _: slow.last, range(4)))"
    )
    assert printed(tmp_path, code) == ["loaded", "1", "1", "1", "1"]


def test_what_is_loaded_or_not_there_stays_as_it_is(tmp_path: Path) -> None:
    package(tmp_path)
    assert printed(tmp_path, "import slow\nlater('slow')\nprint(type(slow).__name__)") == ["loaded", "module"]
    assert printed(tmp_path, "later('no_such')\nprint('no_such' in sys.modules)") == ["False"]


def test_the_client_of_nats_is_loaded_without_http_and_still_has_it(tmp_path: Path) -> None:
    code = (
        "later('aiohttp')\nimport nats.aio.transport as t\nprint('aiohttp.client' in sys.modules)\n"
        "print(t.aiohttp.ClientSession.__name__, 'aiohttp.client' in sys.modules)"
    )
    assert printed(tmp_path, code) == ["False", "ClientSession", "True"]


def test_a_module_is_loaded_as_if_another_was_not_installed(tmp_path: Path) -> None:
    package(tmp_path)
    (tmp_path / "user.py").write_text("try: import slow\nexcept ImportError: slow = None\n")
    code = "without('user', 'slow')\nimport user, sys\nprint(user.slow, 'slow' in sys.modules)\nimport slow\nprint(slow.last)"
    assert printed(tmp_path, code) == ["None", "False", "loaded", "1"]
    assert printed(tmp_path, "import slow\nwithout('user', 'slow')\nimport user\nprint(user.slow.last)") == [
        "loaded",
        "1",
    ]


def test_logs_are_written_without_rich(tmp_path: Path) -> None:
    code = "without('structlog', 'rich')\nimport structlog.dev\nprint('rich' in sys.modules, structlog.dev.rich)"
    assert printed(tmp_path, code) == ["False", "None"]
