"""A log after which every part of the state holds something, and the snapshot of that state."""

from __future__ import annotations

from kvplane.events import types
from kvplane.projections import snapshot
from tests.support.fold_given import Given, registered


def story() -> Given:
    """A log after which every part of the state holds something, places and slots that nodes left included."""
    log = Given()
    log.node(registered("gone", capacity=9))
    log.node(registered("old", capacity=9, models=["m", "alias"]))
    log.node(registered("a", capacity=8, mode="managed"))
    log.node(registered("b", capacity=9))
    log.node(registered("c", capacity=9, models=["n"]))
    log.node(registered("dark", capacity=9))
    for name, blocks in (("gone", (1, 2, 3)), ("old", (1, 2, 3, 4, 5, 6)), ("dark", (1, 2))):
        log.stores(name, *blocks)
        log.routes(f"on {name}", name, *blocks, tokens=900)
    log.stores("b", 1, 2, 3, 4)
    log.stores("b", 1, 2, 3, 4, 5, tier="cpu")
    log.drops("b", 2, tier="cpu")
    log.stores("c", 1, 2, 100 + (1 << 60), 100, 100 + (1 << 61))
    log.assigns("s", "old")
    log.assigns("t", "b")
    log.assigns("u", "gone")
    log.routes("r", "b", 1, 2, 3, 4, 7, match=1, session="s")
    log.change(types.NodeRemoved, "gone")
    log.change(types.NodeRemoved, "old")
    log.change(types.NodeLost, "dark")
    log.change(types.NodeCordoned, "c")
    log.places("a", 1, 2, 3)
    log.places("a", 11, 12)
    log.routes("q", "a", 1, 2, 3, 4, match=3, session="t")
    log.routes("q again", "a", 1, 2, match=2, after=0.25)
    log.places("a", 4)
    log.put("control", "", types.PolicyChanged("cascade", {"weight": 0.3}), writer="w", counter=7)
    log.put("access", "w", types.RequestCompleted("nobody", "a"), writer="w", counter=8)
    assert log.put("access", "w", types.RequestCompleted("nobody", "a"), writer="w", counter=8) == "duplicate"
    log.raw("kv.f.cache.who knows", b"junk")
    return log


STORY = story()


DUMPED = snapshot.dump(STORY.state)


BODY_AT = len(DUMPED) - snapshot.peek(DUMPED).length
