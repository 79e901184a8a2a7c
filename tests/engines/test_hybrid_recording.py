"""A recorded engine with a tiny Gemma 3 of random weights: what is foretold of each request is what the engine then found.

`tests/data/gemma3.jsonl` has the batches of a vLLM 0.32 (blocks of 32 tokens, windows of 128) as they came, and each request,
behind the batches of its own steps, with the tokens that the engine found cached.
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections import Counter
from pathlib import Path

from kvplane.events.hashing import block_hashes
from kvplane.services.engines.sequence import Track
from kvplane.services.engines.translate import Translator
from tests.support.one_node_fold import Folded

RECORDING = Path(__file__).parents[1] / "data" / "gemma3.jsonl"


def replayed(*, in_force: int) -> list[tuple[int, int, int]]:
    """Of each request the tokens of full attention alone, those that were foretold, and those that the engine found."""
    folded = Folded(in_force=in_force)
    track = Track(Translator("a", 32, {"gpu": 63}))
    track.adrift = True
    translator = track.translator
    translator.epoch, translator.groups.tells = folded.state.nodes["a"].epoch, in_force >= 5
    found, waiting = [], []
    for line in map(json.loads, RECORDING.read_text().splitlines()):
        if "batch" in line:
            waiting.append(line)
            continue
        hashes, limit = block_hashes(line["prompt"], 32), (len(line["prompt"]) - 1) // 32
        found.append((folded.match(hashes, limit) * 32, folded.hit(hashes, limit) * 32, line["cached"]))
        for batch in waiting:
            events = track.live(batch["sequence"], b64decode(batch["batch"]))
            assert events is not None
            folded.put(events)
        waiting = []
    assert not {name for name, count in translator.counts.items() if count} - {"stored", "removed"}
    return found


def test_what_is_foretold_is_what_the_engine_found() -> None:
    found = replayed(in_force=5)
    assert len(found) == 37
    assert [foretold for _, foretold, _ in found] == [cached for _, _, cached in found]
    # Full attention alone would have promised what the windows could not serve.
    wrong = Counter((full, cached) for full, _, cached in found if full != cached)
    assert wrong == {(224, 0): 2, (128, 0): 2, (480, 0): 1, (288, 0): 1}


def test_in_a_log_of_an_earlier_format_all_is_as_it_was() -> None:
    assert [(full, foretold) for full, foretold, _ in replayed(in_force=4)] == [
        (full, full) for full, _, _ in replayed(in_force=5)
    ]
