"""Reads a log and a ledger and says what is wrong between them. Knows no server and no clock: both may be from a file.

Messages are fed in order and judged by two folds, the real one and the naive one, which share nothing but the decoder.
What may legally be missing:

- commits that were never acknowledged: given up by their writer, or in the hands of one that was killed;
- counters of coordinators, and of appenders that gave up: a lost race, too, uses one up;
- decisions of a router that was killed: the last ones, younger than `TAIL_SECONDS`, or than the trouble that kept them;
- decisions that a router counted as unrecorded, or said in its log that it left behind.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

from kvplane.events import codec, types
from kvplane.events.errors import BadCommit
from kvplane.projections.digest import digest
from kvplane.projections.fleet import FleetState
from tests.chaos import answers
from tests.chaos.naive_fleet import NaiveFleet

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvplane.events.codec import Commit, Message
    from tests.chaos.ledger import Entry, Ledger

TAIL_SECONDS = 1.5
"""A decision is on the log by then when nothing is in the way: it lingers 5 ms and is acknowledged in a few more."""
TROUBLE_SECONDS = 15.0
"""So long after a fault a writer may still be at its retries."""
COMPARE_EVERY = 500
"""Sequences between two comparisons of all that both folds hold."""
SHOWN = 20
"""Most violations of one rule that are listed one by one."""

GROUP_WRITERS = ("router-", "node-", "group-")
"""Writers that never give a commit up: their counters have no hole."""
_CONCLUSIONS = (types.NodeLost, types.NodeRecovered)
_ACTIONS: dict[str, type[types.Event]] = {
    "register": types.NodeRegistered, "cordon": types.NodeCordoned, "uncordon": types.NodeUncordoned,
    "remove": types.NodeRemoved, "evict": types.BlocksPlaced, "admit": types.BlocksPlaced, "end": types.SessionEnded,
    "policy": types.PolicyChanged,
}  # fmt: skip


class Violation(NamedTuple):
    """What is wrong: the rule that is broken, and how."""

    rule: str
    detail: str


class Decision(NamedTuple):
    """A decision on the log."""

    sequence: int
    node: str
    model: str
    applied: int
    exclude: tuple[str, ...]


class Stored(NamedTuple):
    """One copy of a commit on the log."""

    sequence: int
    crc: str
    skipped: str | None


class Checker:
    """Both folds and what they found, as far as the log was fed."""

    def __init__(self, fleet: str, *, strangers: bool = False) -> None:
        self.fleet = fleet
        self._strangers = strangers
        """Whether somebody may give two requests one id: then only ids that routers gave are judged."""
        self.state = FleetState(fleet)
        self.naive = NaiveFleet()
        self.found: list[Violation] = []
        self.digests: dict[int, str] = {}
        self.commits: dict[tuple[str, str, int], list[Stored]] = defaultdict(list)
        """Copies of each commit by subject, writer and counter."""
        self.decisions: dict[str, Decision] = {}
        self.completions: dict[str, list[str]] = defaultdict(list)
        """Statuses of each request's completions."""
        self.kinds: dict[int, tuple[Any, str | None]] = {}
        """First event of each commit that a coordinator may have made, and why it was skipped."""
        self._batches: dict[tuple[str, str], list[int]] = defaultdict(list)

    def say(self, rule: str, detail: str) -> None:
        """A violation."""
        self.found.append(Violation(rule, detail))

    def digest(self) -> str:
        """Digest of the fold from zero, where it is now."""
        sequence = self.state.sequence
        if sequence not in self.digests:
            self.digests[sequence] = digest(self.state)
        return self.digests[sequence]

    def feed(self, message: Message) -> None:
        """Take the next message of the log."""
        sequence = message.sequence
        if sequence != self.state.sequence + 1:
            self.say("no gap", f"{sequence} comes after {self.state.sequence}")
        skipped = self.state.apply(message).skipped
        self.naive.pass_time(message.time)
        commit, found = self._read(message)
        if commit is not None:
            found = self.naive.take(message, commit)
        if found != skipped:
            self.say(
                "folds agree",
                f"{sequence} is {skipped or 'applied'} for the fold, {found or 'applied'} for the naive one",
            )
        if skipped == "defect":
            self.say("no defect", f"the fold fails on {sequence} ({message.subject})")
        if commit is not None:
            self._commit(message, commit, skipped)
        if not sequence % COMPARE_EVERY:
            self.compare()

    def _read(self, message: Message) -> tuple[Commit | None, str | None]:
        """The commit, or why it is not looked at."""
        held = self.state.format >= 4 and message.subject.startswith(
            (f"kv.{self.fleet}.cache.", f"kv.{self.fleet}.access.node%2F", f"kv.{self.fleet}.access.node%3A")
        )
        if held and self.naive.too_fast(message):
            return None, "too_fast"
        try:
            commit = codec.decode(self.fleet, message, self.state.format)
        except BadCommit as error:
            if held:
                self.naive.wrote(message, ())
            return None, error.code
        if held:
            self.naive.wrote(message, commit.events)
        return commit, None

    def _commit(self, message: Message, commit: Commit, skipped: str | None) -> None:
        sequence, first = message.sequence, commit.events[0]
        key = (message.subject, commit.writer, commit.writer_seq)
        copies = self.commits[key]
        copies.append(Stored(sequence, codec.checksum(message.body), skipped))
        if len(copies) > 1 and commit.writer_seq and skipped != "duplicate":
            self.say("once", f"commit {commit.writer_seq} of {commit.writer} is applied at {sequence} once more")
        if commit.place.topic in {"node", "cache", "session", "control"}:
            self.kinds[sequence] = (first, skipped)
        if isinstance(first, _CONCLUSIONS) and skipped not in {None, "duplicate", "stale"}:
            # Stale is one that a placement came before: it is decided again.
            self.say("concluded once", f"{type(first).__name__} of {first.node!r} at {sequence} is skipped: {skipped}")
        if commit.writer.startswith("group-") and skipped != "duplicate":
            self._batches[message.subject, commit.writer] += [event.batch for event in commit.events]  # type: ignore[attr-defined]
        self._capacity(sequence, commit)
        if skipped is not None:
            return
        for event in commit.events:
            if isinstance(event, types.RequestRouted):
                self._decision(sequence, event)
            elif isinstance(event, types.RequestCompleted):
                self.completions[event.request].append(event.status)

    def _capacity(self, sequence: int, commit: Commit) -> None:
        node = self.naive.nodes.get(commit.place.name) if commit.place.topic == "cache" else None
        if node is not None and node.managed:
            held, most = len(node.tiers.get("gpu", ())), node.registered.capacity_blocks["gpu"]
            if held > most:
                self.say("capacity", f"{commit.place.name!r} holds {held} of {most} blocks at {sequence}")

    def _decision(self, sequence: int, event: types.RequestRouted) -> None:
        if event.request in self.decisions and not (self._strangers and not event.request.startswith("router-")):
            self.say(
                "once",
                f"request {event.request} has a decision at {self.decisions[event.request].sequence} and {sequence}",
            )
        decision = Decision(sequence, event.node, event.model, event.applied, tuple(event.exclude))
        self.decisions[event.request] = decision
        self._chosen(event.request, decision)

    def _chosen(self, request: str, decision: Decision) -> None:
        """Nobody is sent where the router's own applied state knew that nobody may be sent."""
        _, node, model, applied, exclude = decision
        standing = self.naive.standing(node, applied)
        if standing.why_not:
            self.say("routed well", f"request {request} went to {node!r}, which was {standing.why_not} at {applied}")
        elif model not in standing.models:
            self.say("routed well", f"request {request} for {model!r} went to {node!r}, which serves {standing.models}")
        if node in exclude:
            self.say("routed well", f"request {request} went to {node!r}, which it excluded")

    def compare(self) -> None:
        """All that both folds hold."""
        state, naive, at = self.state, self.naive, self.state.sequence
        if state.nodes.keys() != naive.nodes.keys():
            self.say("folds agree", f"nodes at {at}: {sorted(state.nodes)} and {sorted(naive.nodes)}")
            return
        for name, node in state.nodes.items():
            expected = naive.nodes[name]
            if (node.epoch, node.lost is not None, node.cordoned) != (expected.epoch, expected.lost, expected.cordoned):
                self.say("folds agree", f"node {name!r} at {at}")
            held = set(state.caches.index(node.model).held(node.slots["gpu"])) if "gpu" in node.slots else set()
            if held != expected.tiers.get("gpu", set()):
                self.say(
                    "folds agree", f"blocks of {name!r} at {at}: {len(held)} and {len(expected.tiers.get('gpu', ()))}"
                )
            recency = state.recency.get(name)
            if recency is not None and list(recency.order) != expected.order:
                self.say("folds agree", f"order of blocks of {name!r} at {at}")
        sessions = {key: session.node for key, session in state.sessions.items()}
        if sessions != naive.sessions:
            self.say("sessions", f"{len(sessions)} at {at}, {len(naive.sessions)} in the naive fold, or on other nodes")

    def judge(self, ledger: Ledger, *, whole: bool = True) -> list[Violation]:
        """All violations so far. With `whole` everything that was acknowledged must be there: the log was read to its end."""
        found, self.found = self.found, []
        self.compare()
        if whole:
            self._acknowledged(ledger)
            self._answers(ledger)
            self._groups(ledger)
            self._counters(ledger)
            self._routes(ledger)
            troubles = _troubles(ledger)
            answers.judge(self.completions, ledger, lambda at, end: _excused(at, end, troubles), self.say)
        found, self.found = found + self.found, found
        return found

    def _acknowledged(self, ledger: Ledger) -> None:
        tried = {(e["subject"], e["writer"], e["counter"]): e["crc"] for e in ledger.of("tried")}
        for entry in ledger.of("acked"):
            key = (entry["subject"], entry["writer"], entry["counter"])
            what = f"commit {entry['counter']} of {entry['writer']}, acknowledged at {entry['sequence']},"
            copies = self.commits.get(key, [])
            applied = [copy for copy in copies if copy.skipped != "duplicate"]
            if not copies:
                self.say("nothing lost", f"{what} is not on the log")
            elif entry["sequence"] not in {copy.sequence for copy in copies}:
                self.say("nothing lost", f"{what} is at {[copy.sequence for copy in copies]}")
            elif any(copy.crc != tried[key] for copy in copies):
                self.say("unchanged", f"{what} has another body")
            if copies and len(applied) != 1:
                self.say("once", f"{what} counts {len(applied)} times: {copies}")

    def _answers(self, ledger: Ledger) -> None:
        """What a coordinator answered is on the log, applied, and what it said."""
        for entry in ledger.of("answered"):
            if not entry["changed"]:
                continue
            what = f"{entry['action']} {entry['node']!r}, answered with {entry['sequence']},"
            event, skipped = self.kinds.get(entry["sequence"], (None, None))
            if not isinstance(event, _ACTIONS[entry["action"]]):
                self.say("answers hold", f"{what} is {type(event).__name__} on the log")
            elif skipped is not None:
                self.say("answers hold", f"{what} was skipped: {skipped}")
            elif getattr(event, "node", entry["node"]) != entry["node"] or any(
                wanted != recorded
                for wanted, recorded in (
                    (entry.get("stored"), getattr(event, "stored", b"").hex()),
                    (entry.get("evicted"), getattr(event, "evicted", b"").hex()),
                    (entry.get("session"), getattr(event, "session", "")),
                    (entry.get("policy"), getattr(event, "policy", "")),
                )
                if wanted is not None
            ):
                self.say("answers hold", f"{what} says something else on the log")

    def _groups(self, ledger: Ledger) -> None:
        flushed: dict[tuple[str, str], int] = {}
        for entry in ledger.of("flushed"):
            flushed[entry["subject"], entry["writer"]] = entry["events"]
        for key, batches in self._batches.items():
            if batches != list(range(len(batches))):
                self.say("once", f"events of {key[1]} are not in order, once each")
        for key, count in flushed.items():
            if len(self._batches[key]) < count:
                self.say(
                    "nothing lost", f"{count} events of {key[1]} were acknowledged, {len(self._batches[key])} are there"
                )

    def _counters(self, ledger: Ledger) -> None:
        given_up = {(e["subject"], e["writer"], e["counter"]) for e in ledger.of("given_up")}
        own = {entry["writer"] for entry in ledger.of("tried")}
        seen: dict[tuple[str, str], set[int]] = defaultdict(set)
        for subject, writer, counter in self.commits:
            if counter:
                seen[subject, writer].add(counter)
        for (subject, writer), counters in seen.items():
            if writer in own or writer.startswith(GROUP_WRITERS):
                missing = set(range(1, max(counters))) - counters
                missing -= {counter for counter in missing if (subject, writer, counter) in given_up}
                if missing:
                    self.say("no hole", f"{writer} on {subject} lacks {sorted(missing)[:SHOWN]} of {max(counters)}")

    def _routes(self, ledger: Ledger) -> None:
        troubles = _troubles(ledger)
        ends = {entry["writer"]: entry for entry in ledger.of("end") if entry["writer"]}
        allowed: dict[str, int] = defaultdict(int)
        for entry in ledger.of("unrecorded"):
            allowed[entry["writer"]] += entry["events"]
        by_router: dict[str, list[tuple[int, Entry]]] = defaultdict(list)
        for entry in ledger.of("routed"):
            writer, _, number = entry["request"].rpartition(".")
            by_router[writer].append((int(number, 16), entry))
            decision = self.decisions.get(entry["request"])
            answered = Decision(0, entry["node"], entry["model"], entry["applied"], tuple(entry["exclude"]))
            self._chosen(entry["request"], answered)
            if decision is not None and (decision.node, decision.applied) != (answered.node, answered.applied):
                self.say(
                    "answers hold", f"request {entry['request']} was sent to {entry['node']!r}, recorded is {decision}"
                )
        for writer, routed in by_router.items():
            recorded = [int(r.rpartition(".")[2], 16) for r in self.decisions if r.startswith(f"{writer}.")]
            last = max(recorded, default=0)
            missing = [
                (number, entry)
                for number, entry in sorted(routed, key=_number)
                if entry["request"] not in self.decisions
            ]
            end = ends.get(writer)
            early = [number for number, _ in missing if number < last]
            if len(early) > allowed[writer]:
                self.say(
                    "routes recorded",
                    f"{len(early)} decisions of {writer} are missing before its last one, {early[:SHOWN]}",
                )
            tail = [entry for number, entry in missing if number > last]
            if end is None or not end["how"].startswith("killed"):
                if len(missing) > allowed[writer]:
                    self.say(
                        "routes recorded",
                        f"{len(missing)} decisions of {writer} are missing, {allowed[writer]} counted as unrecorded",
                    )
                continue
            for entry in tail:
                if not _excused(entry["at"], end["began"], troubles):
                    self.say(
                        "routes recorded",
                        f"request {entry['request']}, answered {end['began'] - entry['at']:.2f} s before {writer} was killed",
                    )


def _number(numbered: tuple[int, Entry]) -> int:
    return numbered[0]


def _troubles(ledger: Ledger) -> list[tuple[float, float]]:
    """Times in which the log may be out of reach of a router, joined where they touch."""
    spans = sorted(
        (entry["began"] - TAIL_SECONDS, entry["at"] + TROUBLE_SECONDS)
        for entry in ledger.of("fault")
        if any(name.startswith("nats-") or entry["what"] != "kill" for name in entry["on"])
    )
    joined: list[tuple[float, float]] = []
    for begin, end in spans:
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def _excused(answered: float, killed: float, troubles: Iterable[tuple[float, float]]) -> bool:
    """Whether a decision may be missing from the log: it was young, or trouble lasted from it to the end."""
    if killed - answered <= TAIL_SECONDS:
        return True
    return any(begin <= answered and killed <= end for begin, end in troubles)
