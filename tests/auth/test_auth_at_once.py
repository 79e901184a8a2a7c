"""Credentials that several change at once, and commands that are killed at any point: nobody who was let out is in again."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvplane.events.log.credentials import read_seed
from kvplane.services.auth import folder as folders
from kvplane.services.auth.folder import AuthFolder
from kvplane.services.cli import main
from kvplane.services.cli.common import Common
from kvplane.services.cli.doctor import _credentials
from kvplane.services.process.private import write_private

if TYPE_CHECKING:
    from collections.abc import Callable

FLEET = "default"
NODES = [f"node-{number}" for number in range(8)]


class Killed(BaseException):
    """No code may go on after it."""


def run(*arguments: str) -> int:
    try:
        main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def auth(tmp_path: Path) -> Path:
    with AuthFolder.changing(tmp_path / "auth", create=True) as held:
        held.set_servers([])
        for name in NODES:
            held.add(FLEET, "node", name)
        held.save()
    return tmp_path / "auth"


def check_whole(auth: Path) -> AuthFolder:
    """Seeds, users and what servers read are of one state."""
    held = AuthFolder.existing(auth)
    assert held.problems() == []
    configured = (held.server_folder("server") / "client.conf").read_text()
    for user in held.users:
        assert read_seed(held.seed_file(user.fleet, user.role, user.name)).public == user.key
        assert user.key in configured
    assert configured.count("nkey:") == len(held.users)
    return held


def test_who_is_removed_beside_others_that_are_added_stays_out(auth: Path) -> None:
    """Commands that read, change and write side by side would each write what the others had before."""
    commands = [("remove", "node", name) for name in NODES] + [("add", "client", name) for name in NODES]
    begin = threading.Barrier(len(commands))
    codes: list[int] = []

    def command(words: tuple[str, ...]) -> None:
        begin.wait()
        codes.append(run("auth", *words, "--auth", str(auth)))

    threads = [threading.Thread(target=command, args=(words,)) for words in commands]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0] * len(commands)
    assert {user.label for user in check_whole(auth).users} == {f"client/{name}" for name in NODES}


@pytest.mark.parametrize(
    "words", [("add", "node", "node-1", "--replace"), ("remove", "node", "node-1"), ("add", "client")]
)
def test_a_command_that_is_killed_at_any_point_has_changed_all_or_nothing(
    auth: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    before = {user.label: user.key for user in AuthFolder(auth).users}
    steps = 0
    done = False
    while not done:
        # Killed before the first step that writes, before the second, ... until it is done.
        with monkeypatch.context() as patched:
            left = [steps]

            def dying(real: Callable[..., Any], left: list[int] = left) -> Callable[..., Any]:
                def step(*arguments: Any, **settings: Any) -> Any:
                    if not left[0]:
                        raise Killed
                    left[0] -= 1
                    return real(*arguments, **settings)

                return step

            patched.setattr(folders, "write_private", dying(write_private))
            patched.setattr(Path, "replace", dying(Path.replace))
            patched.setattr(Path, "unlink", dying(Path.unlink))
            with suppress(Killed):
                done = run("auth", *words, "--auth", str(auth)) == 0
        found = AuthFolder(auth)
        found.problems()
        # What the next command finds, whatever it does itself.
        with AuthFolder.changing(auth):
            pass
        held = check_whole(auth)
        changed = {user.label: user.key for user in held.users} != before
        if changed and not done:
            # It was killed behind the one step that counts.
            break
        steps += 1
    assert changed
    assert steps > 1


def test_what_does_not_fit_is_said_by_list_and_by_the_doctor(
    auth: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    held = AuthFolder(auth)
    seed = held.seed_file(FLEET, "node", "node-1")
    assert [finding.level for finding in _credentials(Common(credentials=seed))] == ["ok"]
    assert _credentials(Common(credentials=tmp_path / "a" / "b" / "c")) == []
    capsys.readouterr()
    assert run("auth", "list", "--auth", str(auth)) == 0
    assert capsys.readouterr().err == ""
    seed.write_text(held.seed_file(FLEET, "node", "node-2").read_text())
    held.seed_file(FLEET, "client", "gone").write_text(seed.read_text())
    configuration = held.server_folder("server") / "client.conf"
    configuration.write_text(configuration.read_text().replace("users: [", "users: [ # more"))
    run("auth", "list", "--auth", str(auth))
    said = " ".join(capsys.readouterr().err.split())
    findings = [finding.message for finding in _credentials(Common(credentials=seed))]
    for text in (said, " ".join(findings)):
        assert "`kvplane auth add node node-1 --replace`" in text
        assert "client-gone.seed is the seed of nobody" in text
        assert "he configuration of server server is not that of the users" in text
