"""An engine's block pool as plainly as it can be written, the dialects it speaks, and block hashes one by one."""

from __future__ import annotations

import struct
from collections import Counter, deque
from typing import Any

import msgspec
from xxhash import xxh3_64_intdigest

EventMap = dict[str, Any]


def naive_hashes(tokens: list[int], size: int, lora: str = "", salt: str = "", parent: int | None = None) -> list[int]:
    """Hashes of the full blocks, each computed alone."""
    hashes: list[int] = []
    seed = xxh3_64_intdigest(lora.encode() + b"\0" + salt.encode(), 1337) if lora or salt else 1337
    for at in range(0, len(tokens) - size + 1, size):
        body = struct.pack(f"<{size}I", *tokens[at : at + size])
        before = hashes[-1] if hashes else parent
        if before is None:
            hashes.append(xxh3_64_intdigest(body, seed))
        else:
            hashes.append(xxh3_64_intdigest(struct.pack("<QQ", before, xxh3_64_intdigest(body, 1337)), 1337))
    return hashes


class NaiveEngine:
    """One life of an engine: physical blocks with a least-recently-used order, and the events of what happens to them."""

    def __init__(
        self, life: int = 0, *, capacity: int = 12, size: int = 4, buffer: int = 10_000, dialect: str = "maps",
        names: str = "int", rank: int = 0,
    ) -> None:  # fmt: skip
        self.life, self.capacity, self.size = life, capacity, size
        self.dialect, self.names, self.rank = dialect, names, rank
        self.blocks: list[tuple[Any, int]] = []
        """Physical blocks as (name, block hash), least recently used first."""
        self.buffer: deque[tuple[int, bytes]] = deque(maxlen=buffer)
        self.sequence = 0
        self.queue: list[EventMap] = []
        self.clock = float(life * 1_000_000)

    def held(self) -> set[int]:
        return {block for _, block in self.blocks}

    def copies(self) -> Counter[int]:
        return Counter(block for _, block in self.blocks)

    def name(self, parent: Any, block: list[int], extra: str) -> Any:
        parts = f"{self.life if self.names != 'same' else 0}|{parent}|{block}|{extra}".encode()
        number = xxh3_64_intdigest(parts, 7)
        return number.to_bytes(8, "big") * 4 if self.names == "bytes" else number

    def request(self, tokens: list[int], lora: str = "", salt: str = "", *, twice: bool = False) -> int:
        """Cache a prompt; return how many of its tokens need not be computed.

        `twice`: as if it had come together with an identical one, so that nothing is reused.
        """
        full = len(tokens) // self.size
        names: list[Any] = []
        for at in range(full):
            parent = names[-1] if names else None
            names.append(
                self.name(parent, tokens[at * self.size : (at + 1) * self.size], f"{lora}/{salt}" if not at else lora)
            )
        blocks = naive_hashes(tokens, self.size, lora, salt)
        known = {name for name, _ in self.blocks}
        hit = 0
        while not twice and hit < full and names[hit] in known:
            hit += 1
        used = set(names[:hit])
        reused = [entry for entry in self.blocks if entry[0] in used]
        self.blocks = [entry for entry in self.blocks if entry[0] not in used] + reused
        fresh = min(full - hit, self.capacity - hit)
        removed = []
        while len(self.blocks) + fresh > self.capacity:
            removed.append(self.blocks.pop(0)[0])
        # One hash an event, as vLLM tells it.
        self.queue += [{"type": "BlockRemoved", "block_hashes": [name], "medium": "GPU"} for name in removed]
        found = min(hit, (len(tokens) - 1) // self.size) * self.size
        if fresh <= 0:
            return found
        stored = names[hit : hit + fresh]
        self.blocks += zip(stored, blocks[hit : hit + fresh], strict=True)
        keys: list[Any] = [[lora] if lora else None for _ in stored]
        if salt and not hit:
            keys[0] = [*(keys[0] or []), salt]
        self.queue.append({
            "type": "BlockStored", "block_hashes": stored, "parent_block_hash": names[hit - 1] if hit else None,
            "token_ids": tokens[hit * self.size : (hit + fresh) * self.size], "block_size": self.size,
            "lora_id": 1 if lora else None, "medium": "GPU", "lora_name": lora or None, "extra_keys": keys,
        })  # fmt: skip
        return found

    def reset(self) -> None:
        self.blocks = []
        self.queue.append({"type": "AllBlocksCleared"})

    def step(self) -> tuple[int, bytes] | None:
        """The batch of what happened since the last one, as published; none when nothing did."""
        if not self.queue:
            return None
        self.clock += 1
        batch = (self.sequence, encoded(self.queue, self.dialect, self.clock, self.rank))
        self.queue = []
        self.sequence += 1
        self.buffer.append(batch)
        return batch

    def replay(self, start: int) -> list[tuple[int, bytes]]:
        return [batch for batch in self.buffer if batch[0] >= start]


STORED = (
    "type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys",
)  # fmt: skip
REMOVED = ("type", "block_hashes", "medium")


def encoded(events: list[EventMap], dialect: str, clock: float, rank: int = 0) -> bytes:
    """A batch in one of the dialects that engines speak or spoke."""
    written: list[Any] = events
    if dialect in {"arrays", "sglang"}:
        written = []
        for event in events:
            order = {"BlockStored": STORED, "BlockRemoved": REMOVED}.get(event["type"], ("type",))
            written.append([event.get(field) for field in order])
        if dialect == "sglang":
            # No LoRA's name and no extra keys; what ends an array is left out when it is nothing.
            written = [event[:7] if event[0] == "BlockStored" else event for event in written]
    if dialect == "map_batch":
        return msgspec.msgpack.encode({"ts": clock, "events": written, "data_parallel_rank": rank, "news": [1]})
    return msgspec.msgpack.encode([clock, written] if dialect == "sglang" else [clock, written, rank])
