"""The command `kvplane attach`: a real engine as a node, for as long as the command runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

from cyclopts import App, Parameter

from kvplane.events.errors import BadName
from kvplane.events.subjects import check_name
from kvplane.services.cli.common import COMMON, Common, Http, run_until_signal, start
from kvplane.services.protocol.errors import BadRequest

if TYPE_CHECKING:
    from kvplane.services.engines.facts import Kind

attach = App(name="attach", help="Make a running engine a node of the fleet, for as long as the command runs.")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Attached:
    """Which engine, and as what."""

    engine: Annotated[str, Parameter(env_var="KVPLANE_ENGINE")]
    """URL of the engine's API, such as http://127.0.0.1:8000."""
    node: Annotated[str, Parameter(env_var="KVPLANE_NODE")]
    """Name of the node; with several data-parallel ranks and no --rank, NAME-dp0, NAME-dp1, ..."""
    api_key: Annotated[str, Parameter(env_var="KVPLANE_API_KEY")] = ""
    """The key that the engine asks for (its own --api-key). Others on this machine can read options: the
    environment is better."""
    rank: Annotated[int | None, Parameter(env_var="KVPLANE_RANK")] = None
    """Attach only this data-parallel rank, as the node of exactly that name; all ranks if not given."""
    events: Annotated[str, Parameter(env_var="KVPLANE_EVENTS")] = ""
    """Where the engine publishes (`endpoint` of its --kv-events-config); asked of the engine if not given. With --rank it is
    where that rank publishes, its port shifted already; without, rank 0. `connect:` or `bind:` before it says what the adapter
    has to do there; without, it connects where there is a `*`, and else listens if it can."""
    replay: Annotated[str, Parameter(env_var="KVPLANE_REPLAY")] = ""
    """Its replay endpoint (`replay_endpoint` of its --kv-events-config), of the same rank as --events; asked of the engine
    with --events not given."""
    address: Annotated[str, Parameter(env_var="KVPLANE_ADDRESS")] = ""
    """Where clients reach the engine; its URL if not given."""
    block_size: Annotated[int, Parameter(env_var="KVPLANE_BLOCK_SIZE")] = 0
    """Tokens a block; asked of the engine if not given."""
    capacity_blocks: Annotated[int, Parameter(env_var="KVPLANE_CAPACITY_BLOCKS")] = 0
    """Blocks that the engine's cache holds; asked of the engine if not given."""
    max_active: Annotated[int, Parameter(env_var="KVPLANE_MAX_ACTIVE")] = 0
    """Most requests at once; 0 is no limit."""
    pulse_seconds: Annotated[float, Parameter(env_var="KVPLANE_PULSE_SECONDS")] = 1.0
    """How often the node heartbeats while the engine is well."""
    wait: Annotated[float, Parameter(env_var="KVPLANE_WAIT")] = 600.0
    """How many seconds to wait for the engine to answer."""
    http: Http = None
    """HOST:PORT of metrics and health (/metrics, /healthz, /readyz), such as 127.0.0.1:9464; default is none."""


@attach.command
def vllm(*, attached: Attached, common: Common = COMMON) -> None:
    """Attach a vLLM engine; each data-parallel rank is a node of its own. With credentials, run it once a rank (--rank).

    Start the engine with `--kv-events-config '{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint":
    "tcp://*:5557", "replay_endpoint": "tcp://*:5558"}'`.
    """
    _attach("vllm", attached, common)


@attach.command
def sglang(*, attached: Attached, common: Common = COMMON) -> None:
    """Attach an SGLang engine; each data-parallel rank is a node of its own. With credentials, run it once a rank (--rank).

    Start the engine with `--enable-metrics --kv-events-config '{"publisher": "zmq", "endpoint": "tcp://*:5557",
    "replay_endpoint": "tcp://*:5558"}'`.
    """
    _attach("sglang", attached, common)


def _attach(kind: Kind, attached: Attached, common: Common) -> None:
    start(common)
    try:
        check_name(attached.node, "--node")
    except BadName as error:
        raise BadRequest(str(error)) from None
    _check_url("--engine", attached.engine)
    if attached.address:
        _check_url("--address", attached.address)
    if not (attached.api_key.isascii() and attached.api_key.isprintable()):
        raise BadRequest("--api-key holds a character that no HTTP header takes; is there a line end in it?")
    if attached.rank is not None and attached.rank < 0:
        raise BadRequest(f"--rank is {attached.rank}; ranks are numbered from 0")
    if min(attached.block_size, attached.capacity_blocks, attached.max_active) < 0 or attached.pulse_seconds <= 0:
        raise BadRequest("sizes must not be negative, and --pulse-seconds must be more than 0")
    run_until_signal(_run, kind, attached, common)


def _check_url(option: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        fits = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        fits = False
    if not fits:
        raise BadRequest(f"{option} is {url[:80]!r}; give a URL, such as http://127.0.0.1:8000")
    if "@" in parts.netloc:
        raise BadRequest(f"{option} holds a login, and a node's address is on the log for all to read; give it without")


async def _run(kind: Kind, attached: Attached, common: Common) -> None:
    # Loaded here, so that the command's help needs no HTTP.
    from kvplane.services.engines.adapters import Adapters  # noqa: PLC0415
    from kvplane.services.engines.attachment import Attachment  # noqa: PLC0415
    from kvplane.services.engines.facts import Engine  # noqa: PLC0415
    from kvplane.services.observability.web import check_address, observing  # noqa: PLC0415

    check_address(attached.http)
    options = asdict(attached)
    url, http, key = options.pop("engine"), options.pop("http"), options.pop("api_key")
    wanted = Attachment(**options, one_login=common.credentials is not None)
    async with Engine(kind, url, key=key) as engine, common.connected("kvplane-attach") as client:
        service = Adapters(client, common.fleet, engine, wanted)
        async with observing(http, service):
            await service.run()
