"""Commands that ask a running fleet: `node`, `policy`, `route`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from cyclopts import App, Parameter

from kvplane.events.errors import BadHashes
from kvplane.events.hashing import pack_hashes, parse_hash
from kvplane.services.cli import show
from kvplane.services.cli.common import COMMON, Common, run_async, start
from kvplane.services.cli.show import Column
from kvplane.services.cli.words import words
from kvplane.services.process.terminal import json_text
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import BadRequest
from kvplane.services.routing.choice import parse
from kvplane.services.rpc.client import ASK_SECONDS, ask

if TYPE_CHECKING:
    from collections.abc import Sequence

CONNECT_SECONDS = 1.0
"""How long a command waits for a server that is not there."""
LEASE_SECONDS = 60.0
"""How long a request that was asked for with `--record` counts as load when nobody completes it."""

node = App(name="node", help="See and change the nodes of the fleet.")
policy = App(name="policy", help="Change how routers decide.")
policy.command(
    "kvplane.services.cli.report:report_policies",
    name="report",
    help="Measure every policy, and write it down as Markdown.",
)

Json = Annotated[bool, Parameter(name="--json", negative="")]


def question(common: Common, endpoint: str, request: msgspec.Struct, *, seconds: float = ASK_SECONDS) -> dict[str, Any]:
    """Ask an endpoint of the fleet and return its answer as plain data."""
    start(common, quiet=True)

    async def run() -> dict[str, Any]:
        async with common.connected("kvplane-cli", seconds=CONNECT_SECONDS) as client:
            answer: dict[str, Any] = await ask(client, f"kv.{common.fleet}.{endpoint}", request, seconds=seconds)
            return answer

    return run_async(run)


def show_json(data: object) -> None:
    """Print data as JSON on standard output."""
    encoded = msgspec.json.encode(data, enc_hook=str)
    sys.stdout.write(json_text(msgspec.json.format(encoded, indent=2)) + "\n")


@node.command(name="list")
def list_nodes(*, model: str = "", json: Json = False, common: Common = COMMON) -> None:
    """List the nodes with their state, cache and load.

    Parameters
    ----------
    model
        Only nodes that serve this model.
    json
        Print JSON.
    """
    answer = question(common, "coordinator.node.list", messages.ListRequest(model=model))
    if json:
        show_json(answer)
        return
    show_nodes(answer["nodes"], f"fleet {answer['fleet']} at sequence {answer['sequence']}")
    if not answer["nodes"]:
        show.say("No nodes yet: `kvplane simnode NAME` runs a simulated one.", error=True)


NODE_COLUMNS = (
    Column("node"), Column("state"), Column("models", spare=4), Column("cache", spare=6),
    Column("blocks", number=True, spare=1), Column("active", number=True, spare=2), Column("sessions", number=True, spare=3),
    Column("reason", spare=5),
)  # fmt: skip


def show_nodes(rows: Sequence[dict[str, Any]], title: str = "") -> None:
    """Print nodes with state, cache and load."""
    columns = NODE_COLUMNS if any(row["reason"] for row in rows) else NODE_COLUMNS[:-1]
    show.table(
        columns,
        [
            [
                row["node"], row["state"], ", ".join(row["models"]), row["cache_mode"],
                f"{row['held_blocks'].get('gpu', 0):,} / {row['capacity_blocks'].get('gpu', 0):,}",
                f"{row['active']:,.10g} / {row['max_active'] or '-'}", f"{row['sessions']:,}", row["reason"],
            ][: len(columns)]
            for row in rows
        ],
        title=title,
    )  # fmt: skip


@node.command
def register(
    name: str,
    *,
    address: str,
    model: Annotated[tuple[str, ...], Parameter(consume_multiple=True)],
    block_size: int,
    capacity_blocks: int,
    cache_mode: Literal["reported", "managed"] = "reported",
    max_active: int = 0,
    replace: bool = False,
    json: Json = False,
    common: Common = COMMON,
) -> None:
    """Register a node; its cache starts empty.

    Parameters
    ----------
    name
        Name of the node.
    address
        Where its clients reach it.
    model
        Model that it serves; further ones are other names for it.
    block_size
        Tokens a block.
    capacity_blocks
        Blocks that it can hold on the GPU.
    cache_mode
        Who owns eviction: the engine, which reports it, or the coordinator.
    max_active
        Most requests at once; 0 is no limit.
    replace
        Register although a node of this name is alive, because it restarted.
    json
        Print JSON.
    """
    request = messages.RegisterRequest(
        node=name, address=address, models=list(model), block_size=block_size,
        capacity_blocks={"gpu": capacity_blocks}, cache_mode=cache_mode, max_active=max_active, replace=replace,
    )  # fmt: skip
    _print_answer(question(common, "coordinator.node.register", request), json=json)


@node.command
def cordon(name: str, *, reason: str = "", json: Json = False, common: Common = COMMON) -> None:
    """Keep new requests from a node; what runs there goes on.

    Parameters
    ----------
    name
        Name of the node.
    reason
        Why; it is recorded.
    json
        Print JSON.
    """
    _print_answer(
        question(common, "coordinator.node.cordon", messages.NodeRequest(node=name, reason=reason)), json=json
    )


@node.command
def uncordon(name: str, *, json: Json = False, common: Common = COMMON) -> None:
    """Let a node take requests again.

    Parameters
    ----------
    name
        Name of the node.
    json
        Print JSON.
    """
    _print_answer(question(common, "coordinator.node.uncordon", messages.NodeRequest(node=name)), json=json)


@node.command
def remove(name: str, *, reason: str = "", json: Json = False, common: Common = COMMON) -> None:
    """Take a node out of the fleet, with its blocks and sessions.

    Parameters
    ----------
    name
        Name of the node.
    reason
        Why; it is recorded.
    json
        Print JSON.
    """
    _print_answer(
        question(common, "coordinator.node.remove", messages.NodeRequest(node=name, reason=reason)), json=json
    )


@policy.command(name="list")
def list_policies(*, json: Json = False) -> None:
    """Show the built-in policies and their parameters.

    Parameters
    ----------
    json
        Print JSON.
    """
    from kvplane.services.routing.holding import HOLD  # noqa: PLC0415 - as the next
    from kvplane.services.routing.policies import POLICIES  # noqa: PLC0415 - policies compute with NumPy

    if json:
        show_json(
            {
                name: {
                    "summary": known.summary,
                    "parameters": {key: value._asdict() for key, value in (known.parameters or {}).items()},
                }
                for name, known in POLICIES.items()
            }
        )
        return
    rows: list[list[str]] = []
    for name, known in POLICIES.items():
        rows.append([name, "-", known.summary])
        for key, value in (known.parameters or {}).items():
            rows.append([f"{name}:{key}", f"{value.default:g} {value.unit}", value.meaning])
    rows.append(["every policy", "-", "has these as well"])
    rows += [[f"*:{key}", f"{value.default:g} {value.unit}", value.meaning] for key, value in HOLD.items()]
    show.table([Column("policy:parameter"), Column("default"), Column("what it does", prose=True)], rows)


@policy.command(name="set")
def set_policy(name: str, *parameter: str, json: Json = False, common: Common = COMMON) -> None:
    """Change the policy of all routers, from the same commit on.

    Parameters
    ----------
    name
        A policy that `kvplane policy list` shows, or module:attr; with its parameters, if any, as in ttft:crowd_weight=4.
    parameter
        Further parameters, as in session_seconds=0.5. Those that are not given have their defaults.
    json
        Print JSON.
    """
    choice = parse(name, *parameter)
    request = messages.PolicyRequest(policy=choice.policy, parameters=choice.parameters)
    _print_answer(question(common, "coordinator.policy.set", request), json=json)


def route(
    model: str,
    *,
    prompt: str | None = None,
    tokens: str | None = None,
    hashes: str | None = None,
    tokens_count: int | None = None,
    session: str = "",
    adapter: str = "",
    salt: str = "",
    exclude: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    record: bool = False,
    lease_seconds: float = LEASE_SECONDS,
    json: Json = False,
    common: Common = COMMON,
) -> None:
    """Ask where a request should go, and why.

    This is a dry run: nothing is recorded and no load is counted, unless `--record` says so.

    Parameters
    ----------
    model
        Model that the request is for.
    prompt
        The prompt as text, for models whose tokenizer is known.
    tokens
        The prompt as token ids, with commas: 1,2,3.
    hashes
        The prompt as block hashes, decimal or hex, with commas.
    tokens_count
        Length of the prompt in tokens, with --hashes.
    session
        Session that the request belongs to.
    adapter
        LoRA adapter, which separates caches.
    salt
        Cache salt, which separates tenants.
    exclude
        Nodes that must not be chosen.
    record
        Record the decision and count its load, as for a request that is sent, until somebody completes it or its lease is over.
    lease_seconds
        How long a request that is recorded counts as load when nobody completes it; 900 at the most.
    json
        Print JSON.
    """
    if not 0 < lease_seconds <= messages.LEASE_LIMIT:
        raise BadRequest(
            f"--lease-seconds is {lease_seconds:g}; it must be more than 0, and {messages.LEASE_LIMIT} at most"
        )
    request = messages.RouteRequest(
        model=model, prompt=prompt, tokens=_numbers(tokens), hashes=_hashes(hashes), tokens_count=tokens_count,
        session=session, adapter=adapter, salt=salt, exclude=list(exclude), dry_run=not record,
        lease_seconds=lease_seconds if record else 0,
    )  # fmt: skip
    answer = question(common, "route", request)
    if json:
        show_json(answer)
        return
    tokens = f"{answer['matched_tokens']} of {answer['tokens']} tokens"
    matched = f"{answer['matched_blocks']} of {answer['blocks']} blocks ({tokens})"
    rows = [
        ("request", answer["request"]),
        ("node", f"{answer['node']} at {answer['address']}"),
        ("match", f"{answer['kind']}: {matched}"),
        ("session", answer.get("session") or "none"),
        ("policy", f"{answer['policy']}, cost {answer['cost']:.6g}, at sequence {answer['applied']}"),
        ("fallbacks", ", ".join(answer.get("fallbacks", [])) or "none"),
    ]
    if answer.get("degraded"):
        rows.append(("degraded", "the log is away; this decision waits to be recorded"))
    show.pairs(rows)
    if record:
        note = f"recorded: it counts as load until it is completed, or for {lease_seconds:g} s"
    else:
        note = "a dry run: nothing was recorded, and no load is counted; --record does both"
    show.say(note, error=True)


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise BadRequest("--tokens must be token ids with commas, such as 1,2,3") from None


def _hashes(text: str | None) -> bytes | None:
    if text is None:
        return None
    try:
        return pack_hashes(parse_hash(part) for part in text.split(",") if part.strip())
    except BadHashes as error:
        raise BadRequest(str(error)) from None


def _print_answer(answer: dict[str, Any], *, json: bool) -> None:
    if json:
        show_json(answer)
    elif answer.get("changed") is False:
        show.say("nothing to change")
    else:
        show.pairs([(key, words(value)) for key, value in answer.items() if key != "changed"])
