"""A stranger that knows the inbox of somebody's consumer, and would have its owner empty a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.waiting import until

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js.api import ConsumerInfo

STALLED = "Nats-Consumer-Stalled"
CONTROL = {"Status": "100", "Description": "Idle Heartbeat"}
"""What an idle heartbeat says, as headers; a server says it in their first line."""


async def consumer_of(client: Client, stream: str, kind: str = "") -> ConsumerInfo:
    """The only consumer of a stream, of those whose name begins so, that somebody listens to; once there is one."""
    found: list[ConsumerInfo] = []

    async def there() -> bool:
        found[:] = [
            info
            for info in await client.jetstream().consumers_info(stream)
            if info.push_bound and info.name.startswith(kind)
        ]
        return bool(found)

    await until(there)
    (info,) = found
    return info


async def _heartbeat(stranger: Client, inbox: str, stalled: str) -> None:
    """Send what looks like a server's heartbeat in every byte."""
    headers = f"NATS/1.0 100 Idle Heartbeat\r\n{STALLED}: {stalled}\r\n\r\n".encode()
    await stranger._send_command(b"HPUB %s %d %d\r\n%s\r\n" % (inbox.encode(), len(headers), len(headers), headers))
    await stranger.flush()


async def purging(stranger: Client, stream: str, kind: str = "") -> None:
    """Ask the owner of a consumer's inbox to publish where it must not; then to its own flow control, and see it answered.

    Fails when the owner published anything to the API for purging or to flow control that is not its own.
    """
    received: list[str] = []

    async def hear(message: Msg) -> None:
        received.append(message.subject)

    info = await consumer_of(stranger, stream, kind)
    inbox, own = info.config.deliver_subject, f"$JS.FC.{stream}.{info.name}.own"
    assert inbox
    for subject in ("$JS.API.STREAM.PURGE.>", "$JS.FC.>"):
        await stranger.subscribe(subject, cb=hear)
    purge, elses = f"$JS.API.STREAM.PURGE.{stream}", "$JS.FC.KV_other.other.token"
    for subject in (purge, elses):
        await stranger.publish(inbox, b"", reply=subject)
        for headers in ({STALLED: subject}, {**CONTROL, STALLED: subject}):
            await stranger.publish(inbox, b"", headers=headers)
        await stranger.publish(
            inbox, b"", reply=subject, headers={"Status": "100", "Description": "FlowControl Request"}
        )
        await stranger.publish(inbox, b"junk", reply=subject)
        await _heartbeat(stranger, inbox, subject)
    await _heartbeat(stranger, inbox, own)
    # It is answered on the same connection, behind what else was.
    await until(lambda: own in received)
    assert received == [own]
