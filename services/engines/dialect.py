"""What engines publish about their caches, decoded. Pure.

A batch is MessagePack: `[time, [event, ...], data parallel rank]`, or a map of the same. Events are maps with a `type`
(vLLM since mid-2026, SGLang since September 2026) or arrays led by it (before). Fields that are unknown here are ignored,
event types that are unknown are counted. Sources: `vllm/distributed/kv_events.py` and SGLang's `disaggregation/kv_events.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from kvplane.services.protocol.errors import BadBatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvplane.events.types import EngineHash, Tier

_decode = msgspec.msgpack.Decoder().decode
_encode = msgspec.msgpack.Encoder().encode

_TIERS: dict[str, Tier] = {
    "GPU": "gpu", "HBM": "gpu", "DEVICE": "gpu",
    "CPU": "cpu", "CPU_PINNED": "cpu", "HOST": "cpu", "DRAM": "cpu", "CPU_TIER1": "cpu", "CPU_TIER2": "cpu",
    "STORAGE": "disk", "DISK": "disk", "SSD": "disk", "NVME": "disk", "FS": "disk",
}  # fmt: skip
_FULL = {"", "full_attention", "mla_attention", "sink_full_attention"}
_MM_DIGITS = 64
_NAMES = frozenset((int, bytes))


class Stored(NamedTuple):
    """Blocks that the engine now holds, in the order of their chain."""

    hashes: Sequence[EngineHash]
    parent: EngineHash | None
    tokens: Sequence[int]
    """Token ids of all of them; empty when the engine names blocks that it has stored before."""
    block_size: int
    tier: Tier | None
    """None for a place that is not this engine's own."""
    lora: str
    salt: str
    keys: Mapping[int, bytes] | None
    """What else was hashed, by the block's position in `hashes`."""
    group: int | None
    full: bool
    """Whether the group's attention is full; others keep parts of a prompt only."""
    kind: str = ""
    """What the engine calls the group's kind."""
    window: int = 0
    """Tokens of its window or chunk; 0 where that is not said."""


class Removed(NamedTuple):
    """Blocks of which the engine has dropped a copy."""

    hashes: Sequence[EngineHash]
    tier: Tier | None
    group: int | None


class Cleared(NamedTuple):
    """The engine's cache is empty."""


class Batch(NamedTuple):
    """One message of an engine. `unknown` counts events of types that are not known here."""

    events: Sequence[Stored | Removed | Cleared]
    rank: int | None
    unknown: Mapping[str, int]


def decode(payload: bytes) -> Batch:
    """Decode one batch. Raises `BadBatch` when an event can't be understood: what it reported is lost then."""
    try:
        raw = _decode(payload)
    except (msgspec.DecodeError, UnicodeError, RecursionError, ValueError) as error:
        raise BadBatch(f"a batch of the engine is no MessagePack: {str(error)[:120]}") from None
    try:
        if isinstance(raw, dict):
            published, rank = raw["events"], raw.get("data_parallel_rank", raw.get("dp_rank"))
        else:
            published, rank = raw[1], raw[2] if len(raw) > 2 else None
        events: list[Stored | Removed | Cleared] = []
        unknown: dict[str, int] = {}
        for event in published:
            named = event if isinstance(event, dict) else _named(event)
            kind = named.get("type")
            if kind == "BlockStored":
                events.append(_stored(named))
            elif kind == "BlockRemoved":
                events.append(Removed(_hashes(named["block_hashes"]), _tier(named), _whole(named.get("group_idx"))))
            elif kind == "AllBlocksCleared":
                events.append(Cleared())
            else:
                unknown[str(kind)[:64]] = unknown.get(str(kind)[:64], 0) + 1
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise BadBatch(f"a batch of the engine can't be understood: {error!r:.160}") from None
    return Batch(events, _whole(rank), unknown)


_STORED = (
    "type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys",
    "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window", "locality",
)  # fmt: skip
_REMOVED = ("type", "block_hashes", "medium", "group_idx", "locality")


def _named(event: Sequence[Any]) -> dict[str, Any]:
    """Fields of an event that is an array. SGLang appends a map with the salt wherever its fields end."""
    kind = event[0]
    names = _STORED if kind == "BlockStored" else _REMOVED if kind == "BlockRemoved" else ("type",)
    named: dict[str, Any] = {}
    for name, value in zip(names, event, strict=False):
        if isinstance(value, dict):
            named.update(value)
        elif name == "lora_name" and isinstance(value, list):
            named["extra_keys"] = value
        else:
            named.setdefault(name, value)
    return named


def _stored(event: dict[str, Any]) -> Stored:
    hashes = _hashes(event["block_hashes"])
    parent = event.get("parent_block_hash")
    lora = event.get("lora_name") or ""
    if not lora and event.get("lora_id") is not None:
        lora = str(event["lora_id"])
    salt = event.get("cache_salt") or ""
    tokens, size = event.get("token_ids") or [], event.get("block_size") or 0
    kind = event.get("kv_cache_spec_kind") or ""
    if not (isinstance(lora, str) and isinstance(salt, str) and isinstance(tokens, list) and isinstance(size, int)):
        raise TypeError("a field has the wrong type")
    if tokens and isinstance(tokens[0], list):
        # SGLang with EAGLE: each token with the one behind it, which the next pair begins with.
        tokens = [first for first, _ in tokens]
    keys = None
    extra = event.get("extra_keys")
    if extra and any(extra):
        for position, block in enumerate(extra):
            if not block:
                continue
            at_root = parent is None and not position
            found_lora, found_salt, key = _extra(block, lora, at_root=at_root)
            lora, salt = lora or found_lora, salt or found_salt
            if key:
                keys = keys or {}
                keys[position] = key
    return Stored(
        hashes, None if parent is None else _hashes([parent])[0], tokens, size, _tier(event), lora, salt, keys,
        _whole(event.get("group_idx")), kind in _FULL, str(kind)[:64],
        max(0, _whole(event.get("kv_cache_spec_sliding_window")) or 0),
    )  # fmt: skip


def _extra(block: Sequence[Any], lora: str, *, at_root: bool) -> tuple[str, str, bytes]:
    """LoRA, salt and multimodal key of one block's extra keys.

    They are bare values (LoRA, then multimodal items, then salt), or maps with their kinds. A bare string at the root
    of a chain is the salt, which is nowhere else; beyond it an older vLLM's multimodal item.
    """
    salt, key = "", b""
    named = False
    for item in block:
        if isinstance(item, dict):
            kind = item.get("type")
            if kind == "lora":
                lora = lora or str(item["name"])
            elif kind == "cache_salt":
                salt = str(item["salt"])
            elif kind == "mm":
                key += multimodal_key(str(item["hash"]))
            else:
                key += _encode(item.get("hash", item.get("value")))
        elif isinstance(item, str):
            if item == lora and not named:
                named = True
            elif at_root:
                salt = item
            else:
                key += multimodal_key(item)
        elif isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str):
            key += multimodal_key(item[0])
        elif not (isinstance(item, int) and str(item) == lora):
            key += item if isinstance(item, bytes) else _encode(item)
    return lora, salt, key


def multimodal_key(identifier: str) -> bytes:
    """What a multimodal item adds to its block: 8 bytes of its digest as little-endian u64, as NVIDIA Dynamo takes it.

    An identifier that is no digest of 64 hex digits is added as it is.
    """
    if len(identifier) == _MM_DIGITS:
        try:
            return int(identifier[:16], 16).to_bytes(8, "little")
        except (ValueError, OverflowError):
            pass
    return identifier.encode()


def _hashes(values: Any) -> Sequence[EngineHash]:  # noqa: ANN401 - whatever was decoded
    if not _NAMES.issuperset(map(type, values)):
        raise TypeError("a block hash is neither a number nor bytes")
    return values  # type: ignore[no-any-return]


def _tier(event: dict[str, Any]) -> Tier | None:
    if event.get("locality") == "REMOTE":
        return None
    medium = event.get("medium")
    return "gpu" if medium is None or medium == "GPU" else _TIERS.get(str(medium).upper())


def _whole(value: Any) -> int | None:  # noqa: ANN401 - whatever was decoded
    return value if type(value) is int else None
