"""Completion by the shell, with a real one."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.commands import run

if TYPE_CHECKING:
    from pathlib import Path

COMPLETE = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _kvplane; printf "%s\\n" "${COMPREPLY[@]}"'


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    done = run("--install-completion", "--shell", "bash", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    script = tmp_path / ".local" / "share" / "bash-completion" / "completions" / "kvplane"
    assert str(script) in (tmp_path / ".bashrc").read_text()

    def completed(*words: str) -> list[str]:
        command = ["bash", "-c", COMPLETE, "bash", str(script), "kvplane", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert completed("sn") == ["snapshot"]
    assert set(completed("node", "")) >= {"list", "register", "cordon", "uncordon", "remove"}
    assert "--record" in completed("route", "--re")
