"""What an engine says of itself over HTTP: its models, its blocks, its version, where its events are, and its load.

vLLM: `/v1/models`, `/version`, `/kv_event_sources` (0.32), `/metrics` with `vllm:cache_config_info`. SGLang: `/v1/models`,
`/server_info` (before 2026 `/get_server_info`), `/metrics` with `--enable-metrics`.
"""

from __future__ import annotations

import json
from math import inf
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import aiohttp
import anyio
import msgspec
from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families

from kvplane.services.engines.sockets import host_of, reachable
from kvplane.services.protocol.errors import EngineUnfit
from kvplane.services.rpc.unanswered import Unanswered, why

if TYPE_CHECKING:
    from collections.abc import Iterable

Kind = Literal["vllm", "sglang"]
"""Engines that can be attached."""
KINDS: tuple[Kind, ...] = ("vllm", "sglang")

ANSWER_SECONDS = 5.0
ASK_AGAIN_SECONDS = 60.0
"""After so long an engine is asked again for what it did not have."""
MOST = 2.0**53
"""Larger numbers of an engine's are no counts."""
MOST_RANKS = 4096
_REFUSED = {401, 403}
"""Statuses of who wants a key, or another one."""
_PASSING = {404, 408, 425, 429}
"""Statuses below 500 that pass by themselves; 404 does where it is that of something before the engine."""
_GIVE = "give --engine the address of the engine's OpenAI-compatible API, such as http://127.0.0.1:8000"

_WANTED = (
    "vllm:cache_config_info", "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:prefix_cache_queries",
    "process_start_time_seconds", "vllm:engine_sleep_state",
    "sglang:num_running_reqs", "sglang:num_queue_reqs",
    "vllm:prefix_cache_hits_total", "vllm:generation_tokens_total", "vllm:request_success_total",
    "sglang:prompt_tokens_total", "sglang:cached_tokens_total", "sglang:generation_tokens_total", "sglang:num_requests_total",
)  # fmt: skip
TURN_ON = {
    "vllm": """start vLLM with --enable-prefix-caching --kv-events-config '{"enable_kv_cache_events": true, """
    """"publisher": "zmq", "endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558"}'""",
    "sglang": """start SGLang with --kv-events-config '{"publisher": "zmq", "endpoint": "tcp://*:5557", """
    """"replay_endpoint": "tcp://*:5558"}'""",
}


class Source(Struct, frozen=True, kw_only=True):
    """Where one data-parallel rank of an engine publishes. `replay` is empty where there is no replay endpoint."""

    rank: int
    events: str
    replay: str = ""


class Facts(Struct, frozen=True, kw_only=True):
    """An engine as it was started. Sizes in tokens and blocks; `started` differs between its lives, empty when unknown."""

    models: list[str]
    """The base model and its other names, then its LoRAs."""
    loras_from: int = 0
    """Place in `models` where LoRAs begin; 0 without any, or where events do not name them."""
    version: str = ""
    block_size: int = 0
    capacity_blocks: int = 0
    started: str = ""
    sources: list[Source] = []
    caching: bool = True
    """Whether it reuses what it has computed for earlier requests."""
    refused: str = ""
    """Why something of this could not be asked for; empty when all could."""


class Served(NamedTuple):
    """What an engine has done since it began: tokens that it computed, prompts' and answers', and for how many requests."""

    tokens: float
    requests: float


class Gauges(Struct, frozen=True, kw_only=True):
    """An engine's load now."""

    active: int = 0
    waiting: int = 0
    started: str = ""
    served: Served | None = None
    """None where the engine does not say."""
    asleep: bool = False
    """It takes no steps, and holds nothing of its cache for sure (vLLM's `/sleep`)."""


class Health(NamedTuple):
    """How an engine is. Unless it is well, `reason` is what is wrong; `final` is whether it can't become well where it is."""

    well: bool
    reason: str = ""
    final: bool = False


Samples = dict[str, list[tuple[dict[str, str], float]]]


def samples(text: str) -> Samples:
    """The samples of a Prometheus page that are used here, by name."""
    lines = [line for line in text.splitlines() if line.startswith(_WANTED)]
    found: Samples = {}
    try:
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            for sample in family.samples:
                # NaN, infinities and what no counter can be are unknown.
                if 0 <= (value := float(sample.value)) <= MOST:
                    found.setdefault(sample.name, []).append((dict(sample.labels), value))
    except (ValueError, KeyError, IndexError):
        return {}
    return found


def _of_rank(rows: Iterable[tuple[dict[str, str], float]], rank: int) -> list[tuple[dict[str, str], float]]:
    """Samples of one data-parallel rank, or all when none names its rank."""
    given = list(rows)
    mine = [row for row in given if row[0].get("engine", row[0].get("dp_rank")) == str(rank)]
    return mine or ([] if any("engine" in row[0] or "dp_rank" in row[0] for row in given) else given)


def started(found: Samples) -> str:
    """When the engine began, as it says itself: the same text for as long as it lives."""
    for name in ("process_start_time_seconds", "vllm:prefix_cache_queries_created"):
        rows = found.get(name)
        if rows:
            return f"{rows[0][1]:.3f}"
    return ""


def gauges(found: Samples, rank: int) -> Gauges:
    """Load of one rank."""

    def total(*names: str) -> int:
        return int(sum(value for name in names for _, value in _of_rank(found.get(name, ()), rank)))

    def served(asked: str, cached: str, answered: str, ended: str) -> Served | None:
        if asked not in found or ended not in found:
            return None
        return Served(total(asked) - total(cached) + total(answered), total(ended) + running + waiting)

    waiting = total("vllm:num_requests_waiting", "sglang:num_queue_reqs")
    running = total("vllm:num_requests_running", "sglang:num_running_reqs")
    done = served(
        "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:generation_tokens_total",
        "vllm:request_success_total",
    ) or served(
        "sglang:prompt_tokens_total", "sglang:cached_tokens_total", "sglang:generation_tokens_total",
        "sglang:num_requests_total",
    )  # fmt: skip
    states = _of_rank(found.get("vllm:engine_sleep_state", ()), rank)
    asleep = any(labels.get("sleep_state") == "awake" and not value for labels, value in states)
    return Gauges(active=running + waiting, waiting=waiting, started=started(found), served=done, asleep=asleep)


class Engine:
    """An engine's HTTP endpoints. Use as an asynchronous context manager."""

    def __init__(self, kind: Kind, url: str, *, key: str = "") -> None:
        self.kind: Kind = kind
        self.url = url.rstrip("/")
        self._key = key
        self.host = host_of(self.url)
        self._session: aiohttp.ClientSession | None = None
        self._not_told = ""
        """What it refused to tell, in a sentence."""
        self._ask_sleep_at = -inf

    async def __aenter__(self) -> Self:
        """Open."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS), headers=headers)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        if self._session is not None:
            await self._session.close()

    @property
    def http(self) -> aiohttp.ClientSession:
        """The open session."""
        if self._session is None:
            raise RuntimeError("not opened")
        return self._session

    async def _get(self, path: str) -> tuple[int, str]:
        try:
            async with self.http.get(self.url + path) as answer:
                return answer.status, await answer.text()
        except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
            raise EngineUnfit(
                f"the engine does not answer at {self.url}{path} ({type(error).__name__}); {_GIVE}"
            ) from error

    async def _json(self, *paths: str) -> Any:  # noqa: ANN401 - whatever it answers
        for path in paths:
            status, text = await self._get(path)
            self._told(path, status)
            if status == 200:
                try:
                    return json.loads(text)
                except (ValueError, RecursionError):
                    continue
        return None

    def _told(self, path: str, status: int) -> None:
        if status in _REFUSED and not self._not_told:
            self._not_told = self._refused(path, status)

    async def healthy(self) -> bool | None:
        """Whether the engine says that it is well; none when it is there and takes too long to say so."""
        try:
            async with self.http.get(self.url + "/health") as answer:
                return answer.status == 200
        except TimeoutError:
            return None
        except (aiohttp.ClientError, OSError):
            return False

    async def health(self, seconds: float = ANSWER_SECONDS) -> Health:
        """How the engine is, and what is wrong when it is not well. What keeps silent for `seconds` is not.

        One that is well lists its models as well.
        """
        found = await self._health("/health", seconds)
        return await self._health("/v1/models", seconds) if found.well else found

    async def _health(self, path: str, seconds: float) -> Health:
        where = self.url + path
        try:
            timeout = aiohttp.ClientTimeout(total=seconds)
            async with self.http.get(where, timeout=timeout) as answer:
                status = answer.status
        except TimeoutError:
            return Health(well=False, reason=f"{where} does not answer in {seconds:g} s")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reason, final = await why(self.url, error)
            return Health(well=False, reason=reason, final=final)
        if status == 200:
            return Health(well=True)
        if status in _REFUSED:
            return Health(well=False, reason=self._refused(path, status), final=True)
        reason = f"{where} answers {status}"
        if status == 404:
            other = "/v1/models" if path == "/health" else "/health"
            reason += f", and {self.url}{other} {await self._status(other)}"
            if self.url.endswith("/v1"):
                reason += "; leave the /v1 out"
        return Health(well=False, reason=reason, final=status < 500 and status not in _PASSING - {404})

    def _refused(self, path: str, status: int) -> str:
        """That a key is asked for, in a sentence."""
        if self._key:
            return f"{self.url}{path} answers {status}: it does not take the key that was given; give its own with --api-key"
        return (
            f"{self.url}{path} answers {status}: it asks for a key; give --api-key, or KVPLANE_API_KEY in the environment, "
            "which others can't see"
        )

    async def _status(self, path: str) -> str:
        try:
            return f"answers {(await self._get(path))[0]}"
        except EngineUnfit:
            return "does not answer"

    async def load(self, rank: int = 0) -> Gauges:
        """Load of one rank now; zeros where the engine shows none. Raises `EngineUnfit` when it does not answer."""
        status, text = await self._get("/metrics")
        found = gauges(samples(text), rank) if status == 200 else Gauges()
        return found if found.asleep or not await self._sleeps() else msgspec.structs.replace(found, asleep=True)

    async def _sleeps(self) -> bool:
        """What `/is_sleeping` says, where there is such an endpoint: older vLLM, and pauses that no metric shows."""
        now = anyio.current_time()
        if self.kind != "vllm" or now < self._ask_sleep_at:
            return False
        status, text = await self._get("/is_sleeping")
        if status != 200:
            self._ask_sleep_at = now + ASK_AGAIN_SECONDS
            return False
        try:
            return _fields(json.loads(text)).get("is_sleeping") is True
        except (ValueError, RecursionError):
            return False

    async def models(self) -> tuple[list[str], int]:
        """Its models, LoRAs last, and the place where LoRAs begin as in `Facts`. Raises `EngineUnfit` as `facts` does."""
        try:
            status, text = await self._get("/v1/models")
        except EngineUnfit as error:
            found_out: Unanswered = await why(self.url, error.__cause__ or error)
            raise EngineUnfit(f"{self.url}/v1/models does not answer: {found_out.reason}; {_GIVE}") from None
        try:
            parents = {str(model["id"]): model.get("parent") for model in json.loads(text)["data"]}
        except (ValueError, KeyError, TypeError, AttributeError):
            if status in _REFUSED:
                raise EngineUnfit(self._refused("/v1/models", status)) from None
            raise EngineUnfit(f"{self.url}/v1/models lists no models (it answers {status}); {_GIVE}") from None
        bases = sum(parent is None for parent in parents.values())
        return (
            sorted(parents, key=lambda model: parents[model] is not None),
            bases if bases < len(parents) and self.kind != "sglang" else 0,
        )

    async def facts(self) -> Facts:
        """Everything that can be asked. Raises `EngineUnfit` when it does not answer."""
        models, loras_from = await self.models()
        self._not_told = ""
        status, text = await self._get("/metrics")
        self._told("/metrics", status)
        found = samples(text) if status == 200 else {}
        if self.kind == "sglang":
            return await self._sglang(models, found)
        version = await self._json("/version")
        config = [labels for labels, _ in found.get("vllm:cache_config_info", ())]
        return Facts(
            models=models,
            loras_from=loras_from,
            version=str(version.get("version", "")) if isinstance(version, dict) else "",
            block_size=_number(config[0].get("block_size")) if config else 0,
            # One block of the pool is never used.
            capacity_blocks=max(0, _number(config[0].get("num_gpu_blocks")) - 1) if config else 0,
            started=started(found),
            sources=_sources(await self._json("/kv_event_sources")),
            caching=not config or config[0].get("enable_prefix_caching") != "False",
            refused=self._not_told,
        )

    async def _sglang(self, models: list[str], found: Samples) -> Facts:
        info = await self._json("/server_info", "/get_server_info")
        info = _fields(info)
        events = _fields(info.get("kv_events"))
        size = _number(events.get("block_size") or info.get("page_size"))
        tokens = _number(info.get("max_total_num_tokens"))
        states = info.get("internal_states")
        for state in states if isinstance(states, list) else ():
            tokens = tokens or _number(_fields(_fields(state).get("memory_usage")).get("token_capacity"))
        return Facts(
            models=models, version=str(info.get("version", "")), block_size=size,
            capacity_blocks=tokens // size if size else 0, started=started(found), sources=_sglang_sources(info),
            refused=self._not_told,
        )  # fmt: skip


def _number(text: object) -> int:
    """A size or rank that an engine tells; 0 for what is none."""
    try:
        number = float(str(text))
    except ValueError:
        return 0
    return int(number) if 0 <= number <= MOST else 0


def _fields(told: object) -> dict[str, Any]:
    return told if isinstance(told, dict) else {}


def _sources(publishers: object) -> list[Source]:
    """Sources of vLLM's `/kv_event_sources`: publishers by rank or as a list, their ports shifted already."""
    if isinstance(publishers, dict):
        numbered = [(_number(rank), source) for rank, source in publishers.items()]
    elif isinstance(publishers, list):
        numbered = [(_rank(source), source) for source in publishers]
    else:
        return []
    return [
        Source(rank=rank, events=str(source.get("endpoint")), replay=str(source.get("replay_endpoint") or ""))
        for rank, source in sorted(numbered, key=lambda one: one[0])
        if isinstance(source, dict) and source.get("publisher", "zmq") == "zmq" and source.get("endpoint")
    ]


def _rank(source: object) -> int:
    return _number(source.get("data_parallel_rank", source.get("dp_rank"))) if isinstance(source, dict) else 0


def _sglang_sources(info: dict[str, Any]) -> list[Source]:
    try:
        config = _fields(json.loads(info.get("kv_events_config") or "{}"))
    except (ValueError, TypeError, RecursionError):
        return []
    endpoint = str(config.get("endpoint") or "tcp://*:5557") if config.get("publisher") == "zmq" else ""
    replay = str(config.get("replay_endpoint") or "")
    publishers = _fields(info.get("kv_events")).get("publishers")
    if isinstance(publishers, list) and publishers:
        # Addresses to connect to, each rank's own host.
        return [
            Source(
                rank=_rank(one), events=f"connect:{one['endpoint']}",
                replay=str(one.get("replay_endpoint") or "")
                or reachable(shifted(replay, _rank(one)), host_of(str(one["endpoint"]))),
            )
            for one in sorted(publishers, key=_rank)
            if isinstance(one, dict) and one.get("endpoint")
        ]  # fmt: skip
    ranks = min(_number(info.get("dp_size")) or 1, MOST_RANKS)
    return [
        Source(rank=rank, events=shifted(endpoint, rank), replay=shifted(replay, rank))
        for rank in range(ranks)
        if endpoint
    ]


def shifted(endpoint: str, rank: int) -> str:
    """An endpoint of rank 0 as another rank has it: engines shift TCP ports by the rank."""
    base, colon, port = endpoint.rpartition(":")
    return f"{base}{colon}{int(port) + rank}" if endpoint.startswith("tcp://") and port.isdigit() else endpoint


def check(kind: Kind, facts: Facts, sources: list[Source]) -> None:
    """Raise `EngineUnfit` for what keeps an engine from being a node."""
    if not facts.models:
        raise EngineUnfit("the engine serves no model")
    if not facts.caching:
        raise EngineUnfit("the engine keeps nothing for later requests; start it with --enable-prefix-caching")
    if facts.refused and not (sources and facts.block_size and facts.capacity_blocks):
        raise EngineUnfit(facts.refused)
    if not sources:
        raise EngineUnfit(
            f"the engine publishes no cache events, or does not say where: {TURN_ON[kind]}, or give --events"
        )
    if not facts.block_size:
        raise EngineUnfit(
            "the engine does not say how long its blocks are; "
            + ("leave its metrics on (no --disable-log-stats)" if kind == "vllm" else "use an SGLang with /server_info")
            + ", or give --block-size"
        )
    if not facts.capacity_blocks:
        raise EngineUnfit("the engine does not say how many blocks its cache holds; give --capacity-blocks")
