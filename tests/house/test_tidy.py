"""Rules of the house that no linter knows: what is pure stays pure, and modules stay small."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("events", "projections", "services")

CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
FILES = {"projections/history/store.py", "projections/history/archive.py"}
"""They write the history's files for the folds, and belong to no pure module."""


def pure_files() -> list[Path]:
    """Files of the modules that are pure, which the contract of imports names."""
    (contract,) = [one for one in CONTRACTS if one["name"] == "what is pure knows no I/O"]
    # A package's own module runs before those in it; the contract can't name it without the log.
    found = [ROOT / "events" / "__init__.py"]
    for module in contract["source_modules"]:
        place = ROOT.joinpath(*module.split(".")[1:])
        found += sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    return [path for path in found if str(path.relative_to(ROOT)) not in FILES]


PURE = pure_files()
BANNED_MODULES = {
    "time", "datetime", "random", "secrets", "uuid", "os", "pathlib", "io", "socket", "subprocess", "asyncio", "anyio",
    "nats", "duckdb", "threading", "tempfile", "shutil", "structlog", "logging",
}  # fmt: skip
BANNED_CALLS = {"open", "print", "input", "id", "hash"}


def _imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def _called(tree: ast.AST) -> set[str]:
    return {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def impurities(source: str) -> set[str]:
    """Clock, random, environment and I/O that a source text reaches for."""
    tree = ast.parse(source)
    return (_imported(tree) & BANNED_MODULES) | (_called(tree) & BANNED_CALLS)


@pytest.mark.parametrize("path", PURE, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_decides_knows_no_clock_no_random_and_no_io(path: Path) -> None:
    assert impurities(path.read_text()) == set()


def test_of_events_all_but_the_log_is_pure() -> None:
    assert set((ROOT / "events").glob("*.py")) <= set(PURE)


@pytest.mark.parametrize(
    "source", ["import time", "from datetime import datetime", "import os.path", "x = open('f')", "hash('a')"]
)
def test_the_purity_rule_bites(source: str) -> None:
    assert impurities(source)


def _tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_modules_stay_small() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in _tracked() if path.suffix == ".py"}
    assert {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > 450} == {}


def test_no_machine_is_named() -> None:
    named = re.compile(r"/(?:home|root|work|Users)/[a-z]|//[^ ]*(?:pypi|pythonhosted|npmjs)", re.IGNORECASE)
    found = []
    for path in _tracked():
        if path == Path(__file__).resolve():
            continue
        text = path.read_text(errors="replace")
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in named.finditer(text)]
    assert found == []


TESTS = [path for path in sorted((ROOT / "tests").rglob("*.py")) if path != Path(__file__).resolve()]


def imported_tests(source: str) -> set[str]:
    """Test modules that a source text imports, also in programs that it starts and in names of functions."""
    named = set(re.findall(r"\btests\.(?:\w+\.)*(?:test_\w+|conftest)\b", source))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tests":
            named |= {f"{node.module}.{alias.name}" for alias in node.names if re.match("test_|conftest$", alias.name)}
    return named


def test_no_test_imports_another() -> None:
    """What they share lies in `tests/support/`: a test may be changed without a look at the others."""
    found = {}
    for path in TESTS:
        itself = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if others := imported_tests(path.read_text()) - {itself}:
            found[itself] = others
    assert found == {}


@pytest.mark.parametrize("source", ["import tests.cli.test_x", "from tests import conftest", "x = 'tests.a.test_b:f'"])
def test_the_rule_of_imports_bites(source: str) -> None:
    assert imported_tests(source)


def test_there_is_one_way_to_wait() -> None:
    ways = re.compile(r"^(?:async )?def ((?:wait_)?(?:until|for)(?:_\w+)?)\(", re.MULTILINE)
    found = [f"{path.relative_to(ROOT)}: {name}" for path in TESTS for name in ways.findall(path.read_text())]
    assert found == ["tests/support/waiting.py: until"]


def test_ports_of_tests_are_held() -> None:
    """One that is free now may be another worker's before a server has it: `tests/support/ports.py` keeps it."""
    taking = [
        str(path.relative_to(ROOT))
        for path in TESTS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvplane")
        if "free_port" in {alias.name for alias in node.names}
    ]
    assert taking == []


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_importing_the_folds_loads_no_io() -> None:
    """Transitive imports count as well: a fold must run where no event loop is."""
    folds = "kvplane.projections.digest, kvplane.projections.fleet"
    code = f"import sys, {folds}; print({{'anyio', 'nats', 'asyncio'}} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.strip() == "set()"
