"""Something larger than a message, given out in pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import anyio

from kvplane.services.protocol import messages
from kvplane.services.protocol.endpoints import following
from kvplane.services.protocol.errors import BadRequest, NoAnswer
from kvplane.services.rpc.client import ask

if TYPE_CHECKING:
    from nats.aio.client import Client

    from kvplane.services.protocol.endpoints import Server

IDLE_SECONDS = 60.0
"""So long after its last piece it is forgotten."""
PIECE_BYTES = 4 << 20
"""Most bytes of a piece; half of what the server takes in a message, if that is less."""
PATIENCE_SECONDS = 600.0
"""How long a historian may fold for a past state."""


class Pieces:
    """What one service gives out at the moment. `subject` is where further pieces are asked for."""

    def __init__(self, subject: str, client: Client, *, piece_bytes: int = PIECE_BYTES) -> None:
        self.subject = subject
        self._client = client
        self._piece_bytes = piece_bytes
        self._held: dict[str, tuple[float, bytes]] = {}

    async def run(self) -> None:
        """Forget what nobody asks for, until cancelled."""
        while True:
            await anyio.sleep(IDLE_SECONDS / 4)
            before = anyio.current_time() - IDLE_SECONDS
            for name in [name for name, (asked, _) in self._held.items() if asked < before]:
                del self._held[name]

    @property
    def size(self) -> int:
        """Bytes that are held."""
        return sum(len(data) for _, data in self._held.values())

    def forget(self, result: str) -> None:
        """Give no more of a result, if there is one."""
        self._held.pop(result, None)

    def first(self, data: bytes) -> messages.Piece:
        """The first piece."""
        return self._piece(uuid4().hex, data, 0)

    async def more(self, request: messages.PieceRequest) -> messages.Piece:
        """A further piece."""
        held = self._held.get(request.result)
        if held is None:
            raise BadRequest(
                f"there is no such result; nobody asked for it in {IDLE_SECONDS:g} s, or it was given whole"
            )
        return self._piece(request.result, held[1], request.offset)

    def _piece(self, name: str, data: bytes, offset: int) -> messages.Piece:
        size = min(self._piece_bytes, self._client.max_payload // 2)
        last = offset + size >= len(data)
        self._held[name] = anyio.current_time(), data
        if last:
            del self._held[name]
        return messages.Piece(
            result=name, offset=offset, size=len(data), data=data[offset : offset + size],
            next="" if last else self.subject,
        )  # fmt: skip


async def snapshot_at(client: Client, fleet: str, sequence: int) -> bytes:
    """The fleet's state at a sequence as a historian folds it. Raises `Refused` with its code, or `NoAnswer`."""
    request = messages.SnapshotRequest(at=str(sequence))
    try:
        with anyio.fail_after(2 * PATIENCE_SECONDS):
            first = await ask(client, f"kv.{fleet}.history.snapshot", request, messages.Piece, seconds=PATIENCE_SECONDS)
            return await whole(client, fleet, "historian", first)
    except TimeoutError:
        raise NoAnswer(f"a historian gave no whole snapshot in {2 * PATIENCE_SECONDS:g} s") from None


async def whole(client: Client, fleet: str, server: Server, piece: messages.Piece) -> bytes:
    """All pieces, from the first one on, of one kind of service. Raises `NoAnswer` for what can't be its pieces."""
    parts, size, most = [piece.data], len(piece.data), piece.size
    while piece.next:
        where = following(piece.next, fleet, server, "piece")
        piece = await ask(client, where, messages.PieceRequest(result=piece.result, offset=size), messages.Piece)
        # It is not known before all of it was read.
        most = most or piece.size
        parts.append(piece.data)
        size += len(piece.data)
        if size > most:
            raise NoAnswer(f"a {server} gives more than the {most:,} bytes that it spoke of")
    return b"".join(parts)
