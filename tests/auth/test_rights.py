"""The table of rights in docs/security.md is what a real server says, and what low roles may do harms nobody."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from docs.reference import rights
from docs.reference.attempts import Tried, actions, api, guarded, tried
from docs.reference.hostile import harmed, live
from kvplane.services.auth import roles

if TYPE_CHECKING:
    from pathlib import Path

    from docs.reference.attempts import Action
    from kvplane.services.auth.roles import Role

pytestmark = pytest.mark.anyio


async def test_the_table_is_what_the_server_says_and_no_low_role_changes_what_others_see(tmp_path: Path) -> None:
    async with guarded(tmp_path) as (server, held):
        found = await tried(server, held, actions())
        async with live(server, held, tmp_path / "history") as running:
            assert await harmed(running, held, found) == {}
            # Made again with: python -m docs.reference.rights
            assert rights.section(found, running.sent) == rights.written()


def test_all_of_the_servers_api_is_tried() -> None:
    """What this server knows and nobody wrote down here would be missing from the table."""
    names = {subject.removeprefix("$JS.API.").partition(".*")[0] for subject in api()}
    assert {"STREAM.PURGE", "STREAM.MSG.DELETE", "CONSUMER.DELETE", "CONSUMER.CREATE", "META.LEADER.STEPDOWN"} <= names
    assert any(subject.startswith("$SYS.REQ.") for subject in api())
    assert len(names) > 40


def _differs(found: Tried, rights_now: dict[str, frozenset[Role]]) -> set[tuple[str, Role]]:
    """What is allowed now and was not before, by the action's subject."""
    return {(_key(action), role) for action, able in found.allowed.items() for role in able - rights_now[_key(action)]}


def _key(action: Action) -> str:
    return f"{'listen ' if action.listens else ''}{action.subject}"


async def test_holes_that_are_planted_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with guarded(tmp_path / "sound") as (server, held):
        sound = await tried(server, held, actions())
    before = {_key(action): able for action, able in sound.allowed.items()}
    holes = (
        ("PUBLISH", "router", "$JS.API.STREAM.PURGE.{log}"), ("PUBLISH", "node", "_INBOX.>"),
        ("SUBSCRIBE", "client", "kv.{f}.node.*"), ("PUBLISH", "client", "kv.{f}.coordinator.policy.set"),
    )  # fmt: skip
    for table, role, more in holes:
        was = getattr(roles, table)
        monkeypatch.setattr(roles, table, {**was, role: (*was[role], more)})
    async with guarded(tmp_path / "holes") as (server, held):
        found = await tried(server, held, actions())
        assert rights.table(found) != rights.table(sound)
        assert _differs(found, before) == {
            ("$JS.API.STREAM.PURGE.KV_f", "router"), ("_INBOX.{key}.x", "node"), ("_INBOX.{other}.x", "node"),
            ("kv.f.coordinator.policy.set", "client"), ("listen kv.f.node.*", "client"),
            ("listen kv.f.node.node-a", "client"), ("listen kv.f.node.node-b", "client"),
        }  # fmt: skip
        async with live(server, held, tmp_path / "history") as running:
            assert await harmed(running, held, found, ["client"]) == {"client": ["policy"]}
