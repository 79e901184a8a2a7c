"""The peer of the policies here: NVIDIA Dynamo's own worker selector, in place of a `Chooser`.

It is the selector of the package `ai-dynamo-runtime` itself (`dynamo.llm.SelectionService`; what follows was measured with
1.6.1), in this process, fed with what a `World` commits. It sends a request to the worker with the lowest cost, in blocks:

    prefill = what the worker has yet to compute, of its requests, + this prompt
    cost    = scale * max(0, prefill - credit * match)
              + |blocks of its requests, united with this one's| + weight * its requests

A request counts until its answer ends, and as prefill until its first token comes; Dynamo's frontend sees that as it passes
the answer on, hence `computed`. Sessions, and blocks that are not stored yet, are no part of a match. As is Dynamo's
default, several routers don't know of each other's requests.

Facts of it that this module is built around:

- It gets blocks as vLLM's events, by ZeroMQ with a socket for each worker, and applies that at some later time. So
  before a decision every worker with news stores one more block, a *fence*, and the decision waits until the fences are
  found: a worker's events are applied in order.
- It wants a block's tokens, not their hash. They are made up from the block's own (chained) hash, so that Dynamo's hashes
  are equal exactly where ours are. Requests can be given as hashes.
- It drops blocks that are stored behind a parent that the worker doesn't have. Nothing here mends that.
- It breaks ties at random, and the generator can't be seeded. So each worker has a taint, and a request prefers taints in
  an order that comes of a hash of request and worker, by weights that are too small to matter between costs that differ.
- It has a clock only for requests that are never freed; that is turned off.
- It reads its settings from the environment, when it is made.
"""

from __future__ import annotations

import asyncio
import math
import os
import resource
import time
import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from kvplane.events import types
from kvplane.events.hashing import derive_hash, unpack_hashes
from kvplane.events.types import Candidate, RequestRouted, SessionAssigned
from kvplane.services.protocol.errors import BadRequest, NoNode, Overloaded, UnknownModel
from kvplane.services.routing.decide import Decision
from kvplane.services.routing.parameters import Parameter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from kvplane.events.codec import Commit
    from kvplane.projections.fleet import FleetState
    from kvplane.services.routing.query import Query

POLICY = "dynamo"
PARAMETERS = {
    "prefill_load_scale": Parameter(1.0, "", "weight of prompts to be computed"),
    "kv_overlap_score_credit": Parameter(1.0, "", "how much of a match is subtracted from them"),
    "decode_active_request_weight": Parameter(0.0, "blocks", "cost of each running request"),
}
"""Dynamo's names, and its defaults."""
LEAST_BLOCK_SIZE = 3
"""Tokens that a block's hash is written in."""
TIE_WEIGHT = 1e-9
"""Largest weight of a preference: costs are multiplied by 1 - weight, and differ by a token of less than 1e9, or not."""
PATIENCE = 10.0
"""Seconds of real time until it is concluded that Dynamo gets no events."""
FILES = 16
"""Open files that a worker takes, on both ends of its socket. When they run out Dynamo ends the process."""
_MODEL = "kvplane"
_NEVER = str(365 * 86400)
_FENCE = 1 << 63
_WORD = (1 << 32) - 1


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Let Dynamo see these settings and no others of its own."""
    outside = {key: value for key, value in os.environ.items() if key.startswith("DYN_")}
    for key in outside:
        del os.environ[key]
    os.environ.update({"DYN_LOG": outside.get("DYN_LOG", "error"), **settings})
    try:
        yield
    finally:
        for key in ("DYN_LOG", *settings):
            os.environ.pop(key, None)
        os.environ.update(outside)


class _Worker:
    """A node as Dynamo knows it, and the socket on which it says what it holds."""

    def __init__(self, number: int, socket: Any) -> None:  # noqa: ANN401 - the package may be absent
        self.number = number
        self.socket = socket
        self.news: list[list[object]] = []
        """Events that were not sent yet."""
        self.fence: int | None = None
        self._sent = 0

    def send(self) -> None:
        body = msgspec.msgpack.encode([0.0, self.news, None])
        self.socket.send_multipart([b"", self._sent.to_bytes(8, "big"), body])
        self._sent += 1
        self.news = []


class Selector:
    """Dynamo's selector as a synchronous object. Raises `BadRequest` when its package is not installed."""

    def __init__(self, parameters: Mapping[str, float] = MappingProxyType({})) -> None:
        for name, value in parameters.items():
            if name not in PARAMETERS or not 0 <= value < math.inf:
                names = ", ".join(PARAMETERS)
                raise BadRequest(f"policy dynamo has no parameter {name}={value:g}; it has {names}, from 0 up")
        settings = {f"DYN_ROUTER_{name.upper()}": str(value) for name, value in parameters.items()}
        settings["DYN_ROUTER_ACTIVE_REQUEST_EXPIRY_SECS"] = _NEVER
        with _environment(settings), ExitStack() as held:
            try:
                # Needed for nothing else, and slow.
                import zmq  # noqa: PLC0415
                from dynamo.llm import SelectionService, compute_block_hash_for_seq  # noqa: PLC0415
            except ImportError:
                raise BadRequest("policy dynamo needs the peer's package: pip install 'kvplane[peers]'") from None
            self._directory = held.enter_context(TemporaryDirectory(prefix="kvplane-"))
            self._context: Any = zmq.Context()
            held.callback(self._context.destroy, linger=0)
            self._loop = asyncio.new_event_loop()
            held.callback(self._loop.close)
            self._service = self._loop.run_until_complete(self._start(SelectionService))
            held.callback(self._service.shutdown)
            self._finish = weakref.finalize(self, held.pop_all().close)
        self._publisher: int = zmq.XPUB
        self._hash: Callable[[list[int], int], list[int]] = compute_block_hash_for_seq
        self._workers: dict[str, _Worker] = {}
        self._names: dict[int, str] = {}
        self._numbers = 0
        self._block_size = 0
        self._fences = 0
        self._locals: dict[int, int] = {}
        """Dynamo's hash of the tokens of each block."""

    @staticmethod
    async def _start(service: Any) -> Any:  # noqa: ANN401 - the package may be absent
        return service(indexer_threads=1)

    def _do(self, name: str, *arguments: object) -> Any:  # noqa: ANN401 - Dynamo's answers are plain data
        async def done() -> object:
            return await getattr(self._service, name)(*arguments)

        return self._loop.run_until_complete(done())

    def close(self) -> None:
        """Stop threads and close sockets; nothing can be asked after that."""
        self._finish()

    def add(self, name: str, block_size: int) -> None:
        """A worker begins, empty. Raises `BadRequest` for what Dynamo has no form for."""
        if block_size < LEAST_BLOCK_SIZE:
            raise BadRequest(f"policy dynamo needs blocks of {LEAST_BLOCK_SIZE} tokens or more, not {block_size}")
        if self._workers and block_size != self._block_size:
            raise BadRequest("policy dynamo needs nodes that all have one block size")
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if most != resource.RLIM_INFINITY and (len(self._workers) + 5) * FILES > most:
            raise BadRequest(f"policy dynamo needs {FILES} open files for each node; `ulimit -n` allows {most} in all")
        if block_size != self._block_size:
            self._block_size = block_size
            self._locals.clear()
        self._numbers += 1
        number = self._numbers
        socket = self._context.socket(self._publisher)
        endpoint = f"ipc://{self._directory}/{number}"
        socket.bind(endpoint)
        worker = {
            "worker_id": number, "model_name": _MODEL, "endpoint": f"sim://{number}", "block_size": block_size,
            "kv_events_endpoint": endpoint, "taints": [str(number)],
        }  # fmt: skip
        self._do("upsert_worker", worker)
        if not socket.poll(PATIENCE * 1000):
            raise TimeoutError("Dynamo did not subscribe to a node's events")
        socket.recv()
        self._workers[name] = _Worker(number, socket)
        self._names[number] = name
        until = time.monotonic() + PATIENCE
        while not any(load["worker_id"] == number for model in self._service.loads() for load in model["loads"]):
            if time.monotonic() > until:
                raise TimeoutError("Dynamo did not take a node into account")
            time.sleep(0.0002)

    def remove(self, name: str) -> None:
        """A worker is gone, and what was booked there."""
        worker = self._workers.pop(name)
        del self._names[worker.number]
        self._do("delete_worker", worker.number)
        worker.socket.close()

    def _tokens(self, block: int, fence: int = 0) -> list[int]:
        return [block & _WORD, block >> 32, fence, *[0] * (self._block_size - LEAST_BLOCK_SIZE)]

    def _local(self, block: int) -> int:
        known = self._locals.get(block)
        if known is None:
            known = self._locals[block] = self._signed_hash(self._tokens(block))
        return known

    def _signed_hash(self, tokens: list[int]) -> int:
        (value,) = self._hash(tokens, self._block_size)
        return value - (1 << 64) if value >> 63 else value

    def _stored(self, hashes: Sequence[int], parent: int | None, tokens: list[int]) -> list[object]:
        return ["BlockStored", hashes, parent, tokens, self._block_size, None, "GPU"]

    def store(self, name: str, hashes: Sequence[int], parent: int | None) -> None:
        """A worker holds a run of blocks behind a parent."""
        tokens: list[int] = []
        for block in hashes:
            tokens += self._tokens(block)
        self._workers[name].news.append(self._stored(hashes, parent, tokens))

    def drop(self, name: str, hashes: Sequence[int]) -> None:
        """A worker holds these blocks no longer."""
        self._workers[name].news.append(["BlockRemoved", hashes, "GPU"])

    def clear(self, name: str) -> None:
        """A worker holds nothing."""
        self._workers[name].news.append(["AllBlocksCleared"])

    async def _flush(self) -> None:
        """Send what is new, and wait until all of it is applied."""
        telling = [worker for worker in self._workers.values() if worker.news]
        if not telling:
            return
        self._fences += 1
        fence, tokens = _FENCE | self._fences, self._tokens(self._fences, 1)
        for worker in telling:
            if worker.fence is not None:
                worker.news.append(["BlockRemoved", [worker.fence], "GPU"])
            worker.news.append(self._stored([fence], None, tokens))
            worker.fence = fence
            worker.send()
        wanted = {worker.number for worker in telling}
        question = {
            "model_name": _MODEL, "block_hashes": [self._signed_hash(tokens)], "sequence_hashes": [self._fences],
            "isl_tokens": self._block_size,
        }  # fmt: skip
        async with asyncio.timeout(PATIENCE):
            while wanted:
                answer = await self._service.overlap_scores(question)
                wanted -= {worker["worker_id"] for worker in answer["workers"] if worker["device_blocks"]}

    async def _select(self, question: dict[str, object]) -> Any:  # noqa: ANN401 - Dynamo's answers are plain data
        await self._flush()
        return await self._service.select(question)

    def select(self, request: str, hashes: bytes, tokens: int, allowed: Iterable[str]) -> tuple[str, int]:
        """The best of the allowed workers, and how many leading blocks it has. Nothing is booked."""
        ranked = sorted(allowed, key=lambda name: derive_hash(request.encode(), name.encode()))
        numbers = [self._workers[name].number for name in ranked]
        step = TIE_WEIGHT / len(numbers)
        question: dict[str, object] = {
            "selection_id": request, "model_name": _MODEL, "isl_tokens": max(1, tokens),
            "block_hashes": [self._local(block) for block in unpack_hashes(hashes)],
            "sequence_hashes": np.frombuffer(hashes, "<i8").tolist(),
            "allowed_worker_ids": numbers,
            "routing_constraints": {
                "preferred_taints": {str(number): rank * step for rank, number in enumerate(numbers)}
            },
        }  # fmt: skip
        answer = self._loop.run_until_complete(self._select(question))
        return self._names[answer["worker_id"]], answer["overlap"]["gpu"] // self._block_size

    def book(self, request: str) -> None:
        """Count the request where it was last selected to go."""
        self._do("create_reservation", {"selection_id": request, "model_name": _MODEL})

    def computed(self, request: str) -> None:
        """The prompt of a booked request is computed."""
        self._do("prefill_complete", request)

    def free(self, request: str) -> None:
        """A booked request is over."""
        self._do("free_reservation", request)


class PeerDesk:
    """A router that asks Dynamo. Knows of nodes and blocks what the log says, and its own requests."""

    decisions = policy_failures = 0
    last_failure = ""

    def __init__(
        self,
        state: FleetState,
        name: str,  # noqa: ARG002 - it never asks which requests on the log are its own
        parameters: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self._state = state
        self._selector = Selector(parameters)
        self._known: set[str] = set()
        self._booked: dict[str, str] = {}
        """Nodes of the requests under way."""
        self._active: Counter[str] = Counter()

    def close(self) -> None:
        """Release what Dynamo holds."""
        self._selector.close()

    def _candidates(self, query: Query) -> list[str]:
        serving = [node for node in self._state.nodes.values() if query.model in node.registered.models]
        if not serving:
            raise UnknownModel(f"no node serves model {query.model[:80]!r}")
        there = [node for node in serving if node.available and node.name not in query.exclude]
        if not there:
            raise NoNode(f"no node of model {query.model[:80]!r} is available, or all are excluded by the request")
        active = self._active
        free = [node.name for node in there if not (most := node.registered.max_active) or active[node.name] < most]
        if not free:
            raise Overloaded(f"every node of model {query.model[:80]!r} runs as many requests as it may (max_active)")
        return free

    def decide(self, query: Query, now: int) -> Decision:  # noqa: ARG002 - nothing here depends on time
        """Choose a node. Raises `UnknownModel`, `NoNode` or `Overloaded`."""
        chosen, found = self._selector.select(query.id, query.hashes, query.tokens, self._candidates(query))
        match = min(found, query.blocks)
        kind = "miss" if not match else "exact" if match >= query.blocks else "prefix"
        # Dynamo doesn't say what the cost was.
        candidates = [Candidate(chosen, match, 0.0)]
        return Decision(self._state.nodes[chosen], kind, match, "", "", POLICY, 0.0, candidates, match)

    def hold(self, query: Query, now: int) -> None:
        """Nothing waits."""

    def ready(self, model: str, now: int) -> tuple[str, ...]:  # noqa: ARG002 - as the others are asked
        """So nobody may go."""
        return ()

    def count_in(
        self,
        query: Query,
        decision: Decision,
        now: int,
        applied: int,
    ) -> tuple[RequestRouted, SessionAssigned | None]:
        """Book a decision; what must be written to the log about it."""
        node = decision.node.name
        # It comes again when its node failed.
        self._free(query.id)
        self._selector.book(query.id)
        self._booked[query.id] = node
        self._active[node] += 1
        return decision.event(query, now, applied, self._state.nodes), None

    def computed(self, request: str, now: int) -> None:  # noqa: ARG002 - nothing here depends on time
        """The first token of a request came."""
        if request in self._booked:
            self._selector.computed(request)

    def _free(self, request: str) -> None:
        node = self._booked.pop(request, None)
        if node is not None:
            self._active[node] -= 1
            self._selector.free(request)

    def observe(self, commit: Commit, time: int, now: int) -> None:  # noqa: ARG002 - nothing here depends on time
        """The fold has applied a commit."""
        name = commit.place.name
        for event in commit.events:
            match event:
                case types.NodeRegistered(block_size=block_size):
                    self._gone(name)
                    self._selector.add(name, block_size)
                    self._known.add(name)
                case types.NodeRecovered() if name not in self._known:
                    self._selector.add(name, self._state.nodes[name].registered.block_size)
                    self._known.add(name)
                case types.NodeLost() | types.NodeRemoved():
                    self._gone(name)
                case types.BlocksStored(tier="gpu") if name in self._known:
                    self._selector.store(name, unpack_hashes(event.hashes), event.parent)
                case types.BlocksRemoved(tier="gpu") if name in self._known:
                    self._selector.drop(name, unpack_hashes(event.hashes))
                case types.CacheCleared() if name in self._known:
                    self._selector.clear(name)
                case types.RequestCompleted(request=request, node=node) if self._booked.get(request) == node:
                    self._free(request)
                case _:
                    pass

    def _gone(self, name: str) -> None:
        if name not in self._known:
            return
        self._known.remove(name)
        self._selector.remove(name)
        # Dynamo has forgotten what was booked there.
        for request in [request for request, node in self._booked.items() if node == name]:
            del self._booked[request]
        del self._active[name]
