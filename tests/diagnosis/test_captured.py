"""A stream of somebody else's that stores questions: its acknowledgement is no answer, and who sees it says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvplane.services.diagnosis.doctor import judge
from kvplane.services.diagnosis.examine import examine
from kvplane.services.protocol.errors import NoAnswer
from kvplane.services.protocol.messages import ListRequest, RegisterRequest, RouteRequest
from kvplane.services.rpc.client import ask
from tests.support.commands import run

if TYPE_CHECKING:
    import msgspec

    from tests.support.fleet import Fleet

pytestmark = pytest.mark.anyio
ASKED: list[tuple[str, msgspec.Struct]] = [
    ("coordinator.node.list", ListRequest()),
    (
        "coordinator.node.register",
        RegisterRequest(node="a", address="x", models=["m"], block_size=4, capacity_blocks={"gpu": 4}),
    ),
    ("route", RouteRequest(model="m", tokens=[1])),
]


@pytest.mark.parametrize(("endpoint", "request_"), ASKED)
@pytest.mark.parametrize("form", [None, dict[str, int]])
async def test_an_acknowledgement_is_no_answer(
    fleet: Fleet, endpoint: str, request_: msgspec.Struct, form: type[dict[str, int]] | None
) -> None:
    js = fleet.client.jetstream()
    await js.add_stream(name="AUDIT", subjects=["kv.*.coordinator.>", "kv.*.route"])
    with pytest.raises(NoAnswer) as caught:
        await ask(fleet.client, f"kv.default.{endpoint}", request_, form)
    said = str(caught.value)
    assert (
        f"what answered on kv.default.{endpoint} is no kvplane: stream 'AUDIT' captures kv.default.{endpoint}" in said
    )
    assert (
        f"take {'kv.default.route' if endpoint == 'route' else 'kv.default.coordinator.>'} out of its subjects" in said
    )


async def test_the_doctor_names_the_stream(fleet: Fleet) -> None:
    await fleet.coordinator()
    assert not [finding for finding in judge(await examine(fleet.client, fleet.name)) if finding.what == "requests"]
    await fleet.client.jetstream().add_stream(name="AUDIT", subjects=["kv.*.coordinator.>"])
    (finding,) = [finding for finding in judge(await examine(fleet.client, fleet.name)) if finding.what == "requests"]
    assert finding.level == "problem"
    assert "stream 'AUDIT' captures kv.default.coordinator." in finding.message


async def test_commands_say_it_without_a_traceback(fleet: Fleet) -> None:
    await fleet.client.jetstream().add_stream(name="AUDIT", subjects=["kv.*.coordinator.>"])
    done = run("node", "list", KVPLANE_SERVER=fleet.url)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "stream 'AUDIT' captures kv.default.coordinator.node.list" in done.stderr


@pytest.mark.parametrize("answer", [b"", b"no MessagePack", b"\xd9\x01\xff", b'{"stream": 7}', b"{}", b"\x80\x80"])
async def test_another_answer_that_is_none_is_said_as_well(fleet: Fleet, answer: bytes) -> None:
    async def responds(message: object) -> None:
        await message.respond(answer)  # type: ignore[attr-defined]

    await fleet.client.subscribe("kv.default.coordinator.node.list", cb=responds)
    await fleet.client.flush()
    with pytest.raises(NoAnswer, match="can't be read"):
        await ask(fleet.client, "kv.default.coordinator.node.list", ListRequest())
