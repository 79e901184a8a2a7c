"""What a real vLLM published, folded: equal to what it held, and to what it then reused."""

from __future__ import annotations

import json
import struct
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from kvplane.events.hashing import block_hashes
from kvplane.services.engines.sequence import Track, Verdict
from kvplane.services.engines.translate import Translator
from tests.support.naive_engine import naive_hashes
from tests.support.one_node_fold import Folded
from tests.support.shared_data import SHARED

if TYPE_CHECKING:
    from pathlib import Path

FOLDER = SHARED / "vllm"
RUNS = ("run1_int_sha256", "run3_bytes_sha256cbor_buf8", "run4_lora")
# Others run side by side, so what they find depends on who came first.
SEQUENTIAL = {
    "cold", "shared_prefix", "exact_repeat_block_multiple", "decode_growth", "session_salt_report", "chat_multi_turn",
    "evict", "shared_prefix_again_after_evict", "first_request_after_reset", "double_reset_then_request", "base", "lora",
}  # fmt: skip

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the recordings of a real engine are not on this machine")


def frames(run: str) -> list[tuple[int, int, list[bytes]]]:
    """Time, kind and frames of each recorded message."""
    raw, found, at = (FOLDER / f"{run}.frames").read_bytes(), [], 0
    while at < len(raw):
        time, kind, count = struct.unpack_from(">QBB", raw, at)
        at += 10
        parts = []
        for _ in range(count):
            (length,) = struct.unpack_from(">I", raw, at)
            parts.append(raw[at + 4 : at + 4 + length])
            at += 4 + length
        found.append((time, kind, parts))
    return found


def published(run: str) -> list[tuple[int, int, bytes]]:
    """Time, number and payload of each batch that was published."""
    return [(time, int.from_bytes(parts[1], "big"), parts[2]) for time, kind, parts in frames(run) if kind == 0]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def named(value: Any) -> Any:
    return value["__bytes_hex__"] if isinstance(value, dict) else value


def naive_reading(run: str) -> tuple[set[int], int]:
    """Blocks that the engine holds at the end by a plain count of what it said, and how many names it ever used."""
    copies: Counter[Any] = Counter()
    meaning: dict[Any, int] = {}
    for line in lines(FOLDER / f"{run}.events.jsonl"):
        if line["kind"] != "pub":
            continue
        for event in line["batch"][1]:
            if event["type"] == "AllBlocksCleared":
                copies.clear()
            elif event["type"] == "BlockRemoved":
                copies.subtract(named(name) for name in event["block_hashes"])
            else:
                names = [named(name) for name in event["block_hashes"]]
                parent = None if event["parent_block_hash"] is None else meaning[named(event["parent_block_hash"])]
                keys = (event["extra_keys"] or [None])[0] or []
                salt = "".join(key for key in keys if key != event["lora_name"])
                blocks = naive_hashes(event["token_ids"], 32, event["lora_name"] or "", salt, parent)
                meaning.update(zip(names, blocks, strict=True))
                copies.update(names)
    return {meaning[name] for name, count in copies.items() if count > 0}, len(meaning)


def track() -> Track:
    return Track(Translator("a", 32, {"gpu": 63}))


@pytest.mark.parametrize("run", RUNS)
def test_a_recording_folds_to_what_the_engine_holds(run: str) -> None:
    folded, follower = Folded(), track()
    follower.translator.epoch = 1
    assert follower.resync([], ended=True, same_life=None).verdict is Verdict.SAME
    for _, number, payload in published(run):
        events = follower.live(number, payload)
        assert events is not None
        folded.put(events)
    expected, names = naive_reading(run)
    assert folded.held() == expected
    assert names > len(expected) or run == "run4_lora"
    counts = follower.translator.counts
    assert counts["lost_parent"] == counts["misfit"] == counts["ambiguous"] == 0
    # In one run a request made the engine report reused blocks again, unmarked: copies that never existed.
    assert (counts["trimmed"] > 0) is (run == "run1_int_sha256")
    assert counts["unknown_removed"] <= counts["trimmed"]


@pytest.mark.parametrize("run", RUNS)
def test_what_the_fold_matches_is_what_the_engine_reused(run: str) -> None:
    folded, follower = Folded(), track()
    follower.translator.epoch = 1
    follower.resync([], ended=True, same_life=None)
    waiting = published(run)
    compared, reused, before = 0, 0, 0
    for line in lines(FOLDER / f"{run}.requests.jsonl"):
        # Where no latency was recorded, one was sent when the one before it had ended.
        arrived = line["t_ns"] - int(line["latency_s"] * 1e9) if "latency_s" in line else before + 2_000_000
        before = line["t_ns"]
        if line.get("status") != 200 or line["phase"] not in SEQUENTIAL:
            continue
        while waiting and waiting[0][0] < arrived:
            _, number, payload = waiting.pop(0)
            folded.put(follower.live(number, payload) or [])
        tokens, model = line["prompt_token_ids"], line["body"]["model"]
        hashes = block_hashes(
            tokens, 32, lora="" if model == "tiny" else model, salt=line["body"].get("cache_salt", "")
        )
        cached = line["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert folded.match(hashes, (len(tokens) - 1) // 32) * 32 == cached, line["phase"]
        compared += 1
        reused += cached > 0
    assert (compared, reused > 0) == (
        {"run1_int_sha256": 38, "run3_bytes_sha256cbor_buf8": 22, "run4_lora": 4}[run],
        True,
    )


def test_a_replay_that_reaches_the_beginning_gives_the_same_as_having_listened() -> None:
    """The recorded answers of the replay socket, as an adapter that starts late gets them."""
    replies = [
        (int.from_bytes(parts[2], "big"), parts[3])
        for _, kind, parts in frames("run1_int_sha256")[134:267]
        if kind == 1
    ]
    late = track()
    assert late.resync(replies, ended=True, same_life=None).verdict is Verdict.SAME
    assert late.translator.held() == naive_reading("run1_int_sha256")[0]


def test_a_replay_that_does_not_reach_the_beginning_teaches_only_what_is_certain() -> None:
    run = "run3_bytes_sha256cbor_buf8"
    replies = [(int.from_bytes(parts[2], "big"), parts[3]) for _, kind, parts in frames(run) if kind == 1][:-1]
    assert len(replies) == 8
    late = track()
    assert late.resync(replies, ended=True, same_life=None).verdict is Verdict.GAP
    assert set() < late.translator.held() < naive_reading(run)[0]
