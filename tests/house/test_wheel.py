"""What is installed: one name in site-packages, beside any other, built from a checkout and from its source archive."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import kvplane

ROOT = Path(__file__).resolve().parents[2]
# Another package of the name, as PyPI's Events, and an application that has a room of its own for services.
FOREIGN = {"events": "from .events import Events\n", "services": "MINE = 1\n", "projections": "MINE = 1\n"}


def ran(*command: str, **environment: str) -> str:
    given = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
    path = f"{Path(sys.executable).parent}{os.pathsep}{given.get('PATH', '')}"
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd="/", env={**given, "PATH": path, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built(source: Path, folder: Path) -> Path:
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-index")
    ran(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(source))
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--no-compile")
    ran(sys.executable, "-m", "pip", "install", *options, "--target", str(folder), str(wheel))
    return folder


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_has_one_name_and_every_module(wheel: Path) -> None:
    held = names(wheel)
    assert {name.partition("/")[0] for name in held} == {"kvplane", f"{wheel.name.rsplit('-', 3)[0]}.dist-info"}
    modules = {
        f"kvplane/{path.relative_to(ROOT)}"
        for room in ("events", "projections", "services")
        for path in (ROOT / room).rglob("*.py")
    }
    assert len(modules) > 100
    assert {name for name in held if name.endswith(".py")} == {*modules, "kvplane/__init__.py", "kvplane/__main__.py"}
    assert "kvplane/py.typed" in held


def test_the_source_archive_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    # The build's own tool works in the folder of the project.
    build = (
        f"import os; os.chdir({str(ROOT)!r}); from hatchling.build import build_sdist; build_sdist({str(tmp_path)!r})"
    )
    ran(sys.executable, "-c", build)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as held:
        assert [member.name for member in held if not member.isfile()] == []
    again = built(archive, tmp_path / "again")
    assert names(again) == names(wheel)


@pytest.mark.parametrize("order", ["before", "after"])
def test_it_works_beside_packages_of_the_names_of_its_folders(installed: Path, tmp_path: Path, order: str) -> None:
    for name, text in FOREIGN.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    (tmp_path / "events" / "events.py").write_text("class Events: pass\n")
    folders = [str(installed), str(tmp_path)]
    # `-I` leaves the environment and the checkout's own path alone; what is installed in editable form comes after these.
    code = (
        f"import sys; sys.path[:0] = {folders if order == 'before' else folders[::-1]!r}\n"
        "import events, services, projections, kvplane, kvplane.events.types, kvplane.services.roles.router\n"
        "from kvplane import Completer, View\n"
        "print(events.Events.__name__, services.MINE, projections.MINE, kvplane.__file__)\n"
        "print(sys.modules[View.__module__].__file__)\n"
        "from kvplane.services.cli import main; main(['policy', 'list', '--json'])"
    )
    first, view, rest = ran(sys.executable, "-I", "-c", code).split("\n", 2)
    foreign, mine, again, own = first.split()
    assert (foreign, mine, again) == ("Events", "1", "1")
    assert Path(own).is_relative_to(installed)
    assert Path(view).is_relative_to(installed)
    assert '"ttft"' in rest


def test_what_programs_may_count_on_is_there_and_loaded_when_it_is_used() -> None:
    code = (
        "import sys, kvplane; print(len([name for name in sys.modules if name.startswith('kvplane')]))\n"
        "print(*(getattr(kvplane, name).__name__ if name != 'Column' else name for name in kvplane.__all__))\n"
        "print(set(kvplane.__all__) <= set(dir(kvplane)), hasattr(kvplane, 'Nothing'))"
    )
    count, found, shown = ran(sys.executable, "-c", code).splitlines()
    assert count == "1"
    assert found.split() == kvplane.__all__
    assert shown == "True False"
    assert kvplane.__doc__ is not None
    assert [name for name in kvplane.__all__ if f"`{name}`" not in kvplane.__doc__] == []
