"""What services say of themselves holds every field of its Struct, and no other: programs read it as plain data, too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from kvplane.services.history.historian import Historian
from kvplane.services.protocol.status import CoordinatorStatus, HistoryStatus, RouterStatus

if TYPE_CHECKING:
    from pathlib import Path

    from nats.aio.client import Client

    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio


async def _status(client: Client, subject: str, asked: bytes) -> dict[str, Any]:
    answer: dict[str, Any] = msgspec.json.decode((await client.request(f"kv.default.{subject}", asked, timeout=5)).data)
    return answer


async def test_a_status_has_every_field_and_a_digest_when_it_is_asked_for(fleet: Fleet, tmp_path: Path) -> None:
    coordinator, router = await fleet.coordinator(), await fleet.router()
    for subject, form in (
        (f"router.{router.writer}.status", RouterStatus),
        (f"router.{router.writer}.flush", RouterStatus),
        ("coordinator.status", CoordinatorStatus),
        (f"coordinator.{coordinator.writer}.status", CoordinatorStatus),
    ):
        status = await _status(fleet.client, subject, b"")
        assert status.keys() == set(form.__struct_fields__) - {"digest"}
        status = await _status(fleet.client, subject, b'{"digest": true}')
        assert status.keys() == set(form.__struct_fields__)
        assert msgspec.to_builtins(msgspec.convert(status, form)) == status
    historian = Historian(await fleet.connect("historian"), "default", tmp_path / "history", servers=[fleet.url])
    await fleet._group.start(historian.run)
    for subject in ("history.status", f"history.{historian.id}.status"):
        status = await _status(fleet.client, subject, b"")
        assert status.keys() == set(HistoryStatus.__struct_fields__)
        assert msgspec.to_builtins(msgspec.convert(status, HistoryStatus)) == status
