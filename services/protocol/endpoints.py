"""Every endpoint of a fleet, in one place: where it is asked, what is asked and answered, who answers and who may ask.

From this table follow what services serve (`rpc.server.serving`), what credentials allow (`auth.roles`), what a client asks
again (`rpc.client`), and docs/subjects.md and docs/asyncapi.yaml (`protocol.document`).

A subject is written below `kv.<fleet>.`. A word in braces is a name: of a node, which then speaks for itself only, or of the
one router, coordinator or historian that is asked.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

from kvplane.services.protocol import answers, messages, status
from kvplane.services.protocol.errors import NoAnswer

Server = Literal["router", "coordinator", "historian", "node"]
"""Who answers."""
Asker = Literal["coordinator", "router", "node", "client"]
"""Who may ask, beside the admin, who may ask anything."""

PLAIN = dict[str, Any]
"""An answer whose fields depend on what is asked."""


class Spec(NamedTuple):
    """One endpoint. `name` is how `nats micro` shows it."""

    server: Server
    name: str
    subject: str
    request: type
    answer: Any
    askers: tuple[Asker, ...]
    says: str
    again: bool = False
    """Whether it may be asked again when its answer does not come: it changes nothing and takes no time, or counts once."""
    traced: bool = False
    """Whether a traceparent goes with it."""
    unasked: bool = False
    """Whether a request without a reply subject is accepted."""

    def pattern(self, fleet: str) -> str:
        """Subject with `*` for names."""
        words = ["*" if word.startswith("{") else word for word in self.subject.split(".")]
        return f"kv.{fleet}.{'.'.join(words)}"

    def at(self, fleet: str, name: str) -> str:
        """Subject at the one service of this name (a subject token); `*` where the name is a node's."""
        words = self.subject.split(".")
        filled = ["*" if word == "{node}" else name if word.startswith("{") else word for word in words]
        return f"kv.{fleet}.{'.'.join(filled)}"


_CLIENT: tuple[Asker, ...] = ("client",)
_REPLICAS: tuple[Asker, ...] = ("coordinator", "router", "client")
_NODE: tuple[Asker, ...] = ("node",)
_COORDINATOR: tuple[Asker, ...] = ("coordinator", "client")
_m = messages

ENDPOINTS: tuple[Spec, ...] = (
    Spec("router", "route", "route", _m.RouteRequest, _m.RouteAnswer, _CLIENT, "Where should this request go?", again=True,
         traced=True),
    Spec("router", "complete", "complete", _m.CompleteRequest, answers.CompleteAnswer, _CLIENT, "A routed request has ended.",
         traced=True, unasked=True),
    Spec("router", "status", "router.{writer}.status", _m.StatusRequest, status.RouterStatus, _REPLICAS,
         "What is this router, and what does it know?", again=True),
    Spec("router", "flush", "router.{writer}.flush", _m.StatusRequest, status.RouterStatus, (),
         "Answer when everything that was decided so far is on the log and read back."),
    Spec("coordinator", "node_register", "coordinator.node.register", _m.RegisterRequest, answers.RegisterAnswer, (),
         "Register a node; its cache starts empty."),
    Spec("coordinator", "node_cordon", "coordinator.node.cordon", _m.NodeRequest, answers.ChangeAnswer, (),
         "Send no new requests to a node."),
    Spec("coordinator", "node_uncordon", "coordinator.node.uncordon", _m.NodeRequest, answers.ChangeAnswer, (),
         "Send requests to a node again."),
    Spec("coordinator", "node_remove", "coordinator.node.remove", _m.NodeRequest, answers.ChangeAnswer, (),
         "Take a node out of the fleet."),
    Spec("coordinator", "node_list", "coordinator.node.list", _m.ListRequest, answers.NodesAnswer, _CLIENT,
         "List the nodes, with their state and load.", again=True),
    Spec("coordinator", "cache_admit", "coordinator.cache.admit", _m.AdmitRequest, answers.AdmitAnswer, (),
         "Place blocks on a managed node."),
    Spec("coordinator", "cache_touch", "coordinator.cache.touch", _m.BlocksRequest, answers.ChangeAnswer, (),
         "Mark blocks of a managed node as used."),
    Spec("coordinator", "cache_evict", "coordinator.cache.evict", _m.BlocksRequest, answers.ChangeAnswer, (),
         "Evict blocks of a managed node."),
    Spec("coordinator", "node_last", "coordinator.node.last", _m.NodeRequest, _m.NodeLast, (),
         "The log's last commit about a node itself."),
    Spec("coordinator", "cache_names", "coordinator.cache.names", _m.NodeRequest, _m.Piece, (),
         "What a node held before, with the engine's own hashes; in pieces, a `Remembered` in MessagePack."),
    Spec("coordinator", "cache_lookup", "coordinator.cache.lookup", _m.LookupRequest, answers.LookupAnswer, _CLIENT,
         "How many leading blocks does each node hold?", again=True),
    Spec("coordinator", "session_end", "coordinator.session.end", _m.SessionRequest, answers.SessionAnswer, (),
         "End a session."),
    Spec("coordinator", "policy_set", "coordinator.policy.set", _m.PolicyRequest, answers.PolicyAnswer, (),
         "Change the policy of all routers."),
    Spec("coordinator", "format_show", "coordinator.format.show", _m.StatusRequest, answers.FormatShown, _CLIENT,
         "Which format is the log in, and who reads which?", again=True),
    Spec("coordinator", "format_raise", "coordinator.format.raise", _m.FormatRequest, answers.FormatAnswer, (),
         "Raise the log's format."),
    Spec("coordinator", "status", "coordinator.status", _m.StatusRequest, status.CoordinatorStatus, _CLIENT,
         "What is any one of the coordinators, and what does it know?", again=True),
    Spec("coordinator", "snapshot", "coordinator.snapshot", _m.StatusRequest, answers.SnapshotAnswer, (),
         "Take a snapshot of the state."),
    Spec("coordinator", "compact", "coordinator.compact", _m.CompactRequest, answers.CompactAnswer, (),
         "Purge what of the log is no longer needed."),
    Spec("coordinator", "status_of_one", "coordinator.{writer}.status", _m.StatusRequest, status.CoordinatorStatus, _REPLICAS,
         "What is this coordinator, and what does it know?", again=True),
    Spec("coordinator", "piece", "coordinator.{writer}.piece", _m.PieceRequest, _m.Piece, _NODE,
         "A further piece of `cache.names`. An empty one: it is still being read, ask again."),
    Spec("coordinator", "register_oneself", "coordinator.node.register.{node}", _m.RegisterRequest, answers.RegisterAnswer,
         _NODE, "As `coordinator.node.register`, by the node itself."),
    Spec("coordinator", "leave", "coordinator.node.leave.{node}", _m.LeaveRequest, answers.ChangeAnswer, _NODE,
         "A node leaves, by its own word, if it is still in the life that it names."),
    Spec("coordinator", "admit_to_oneself", "coordinator.cache.admit.{node}", _m.AdmitRequest, answers.AdmitAnswer, _NODE,
         "As `coordinator.cache.admit`, by the node itself."),
    Spec("coordinator", "last_of_oneself", "coordinator.node.last.{node}", _m.NodeRequest, _m.NodeLast, _NODE,
         "As `coordinator.node.last`, by the node itself."),
    Spec("coordinator", "names_of_oneself", "coordinator.cache.names.{node}", _m.NodeRequest, _m.Piece, _NODE,
         "As `coordinator.cache.names`, by the node itself."),
    Spec("historian", "sql", "sql", _m.SqlRequest, _m.SqlAnswer, _CLIENT, "Ask the history in SQL."),
    Spec("historian", "sql_next", "sql.{historian}", _m.SqlNextRequest, _m.SqlAnswer, _CLIENT, "A result's next page."),
    Spec("historian", "explain", "explain", _m.ExplainRequest, PLAIN, _CLIENT, "Why was a request sent where it was?"),
    Spec("historian", "state", "history.state", _m.MomentRequest, PLAIN, _CLIENT, "The fleet as it was."),
    Spec("historian", "changes", "history.changes", _m.ChangesRequest, PLAIN, _CLIENT, "What changed between two moments?"),
    Spec("historian", "sequence", "history.sequence", _m.MomentRequest, answers.SequenceAnswer, _CLIENT,
         "Which sequence does a moment mean?"),
    Spec("historian", "snapshot", "history.snapshot", _m.SnapshotRequest, _m.Piece, _REPLICAS,
         "The fleet's state at a moment, as a snapshot; in pieces."),
    Spec("historian", "piece", "history.{historian}.piece", _m.PieceRequest, _m.Piece, _REPLICAS,
         "A further piece of `history.snapshot`."),
    Spec("historian", "whatif", "history.whatif", _m.WhatifRequest, answers.WhatifAnswer, (), "Keep what came of a what-if."),
    Spec("historian", "status", "history.status", _m.StatusRequest, status.HistoryStatus, _COORDINATOR,
         "How far is the history?", again=True),
    Spec("historian", "status_of_one", "history.{historian}.status", _m.StatusRequest, status.HistoryStatus, _COORDINATOR,
         "How far is the history of this historian?", again=True),
    Spec("node", "serve", "serve.{node}", _m.ServeRequest, _m.ServeAnswer, _CLIENT, "Run a request on a simulated node.",
         traced=True),
)  # fmt: skip


def served(server: Server) -> list[Spec]:
    """What one kind of service answers."""
    return [spec for spec in ENDPOINTS if spec.server == server]


def asked_by(asker: Asker) -> list[Spec]:
    """What one role may ask."""
    return [spec for spec in ENDPOINTS if asker in spec.askers]


def following(subject: str, fleet: str, server: Server, name: str) -> str:
    """The subject that an answer names for what comes next, if it is one of this endpoint.

    Whoever asks on it does so with his own rights, so a service must not choose another. Raises `NoAnswer`.
    """
    spec = of_subject(subject)
    if spec is None or (spec.server, spec.name) != (server, name) or not subject.startswith(f"kv.{fleet}."):
        raise NoAnswer(f"an answer names {subject[:120]!r} for what follows, and a {server} has no such subject")
    return subject


@lru_cache(maxsize=4096)
def of_subject(subject: str) -> Spec | None:
    """The endpoint that a subject leads to; none for a subject of no endpoint."""
    words = subject.split(".")
    if len(words) < 3 or words[0] != "kv":
        return None
    for spec in ENDPOINTS:
        pattern = spec.subject.split(".")
        if len(pattern) == len(words) - 2 and all(
            want.startswith("{") or want == word for want, word in zip(pattern, words[2:], strict=True)
        ):
            return spec
    return None
