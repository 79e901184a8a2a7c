"""Commands of a gateway's keys: `key add`, `key list`, `key remove`. They need no fleet that runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from kvplane.projections.tenants import Limits
from kvplane.services.cli import show
from kvplane.services.cli.ask import Json, show_json
from kvplane.services.cli.show import Column
from kvplane.services.protocol.errors import BadRequest
from kvplane.services.tenancy.keys import changing, read_keys

key = App(name="key", help="Keys of gateways: who may use which models, and how much.")

DEFAULT = Path("kvplane-keys.json")
KeysFile = Annotated[Path, Parameter(name="--keys", env_var="KVPLANE_KEYS")]
_MOST = 1 << 53


@key.command
def add(
    name: str,
    *,
    models: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    requests_per_minute: int = 0,
    tokens_per_minute: int = 0,
    concurrent: int = 0,
    replace: Annotated[bool, Parameter(negative="")] = False,
    keys: KeysFile = DEFAULT,
) -> None:
    """Make a key. Its secret is written to standard output, this once; the file has a hash of it only.

    Parameters
    ----------
    name
        The tenant's name, under which its requests are on the log.
    models
        Models that the key is for; default is all.
    requests_per_minute
        Most requests a minute, over all gateways; 0 is no limit.
    tokens_per_minute
        Most tokens a minute of prompts and answers, over all gateways; 0 is no limit.
    concurrent
        Most requests at once, over all gateways; 0 is no limit.
    replace
        Make a new secret for a name that is there, with these models and limits; the old secret is worth nothing then.
    keys
        The file of keys; it is made if it is not there.
    """
    limits = Limits(requests_per_minute, tokens_per_minute, concurrent)
    for option, value in msgspec.structs.asdict(limits).items():
        if not 0 <= value <= _MOST:
            raise BadRequest(f"--{option.replace('_', '-')} is {value}; it must not be negative, and 0 is no limit")
    with changing(keys) as held:
        secret = held.add(name, limits, list(models), replace=replace)
        held.save()
    _say(f"The key {name!r} is in {keys}. Its secret is shown this once:")
    sys.stdout.write(f"{secret}\n")
    _say_reload()


@key.command
def remove(name: str, *, keys: KeysFile = DEFAULT) -> None:
    """Take a key back.

    Parameters
    ----------
    name
        The key's name.
    keys
        The file of keys.
    """
    read_keys(keys)
    with changing(keys) as held:
        held.remove(name)
        held.save()
    _say(f"The key {name!r} is worth nothing once the gateways have read {keys} again.")
    _say_reload()


@key.command(name="list")
def list_keys(*, keys: KeysFile = DEFAULT, json: Json = False) -> None:
    """List the keys of a file, and what each may.

    Parameters
    ----------
    keys
        The file of keys.
    json
        Print JSON.
    """
    held = read_keys(keys).all
    if json:
        show_json({"keys": [_plain(each) for each in held]})
        return
    show.table(
        [
            Column("key"), Column("requests/min", number=True), Column("tokens/min", number=True),
            Column("at once", number=True), Column("models"), Column("made", spare=1),
        ],
        [
            [
                each.name, *(f"{most:,}" if most else "-" for most in msgspec.structs.astuple(each.limits)),
                ", ".join(each.models) or "all", each.made[:10],
            ]
            for each in sorted(held, key=lambda each: each.name)
        ],
    )  # fmt: skip


def _plain(each: object) -> dict[str, object]:
    fields: dict[str, object] = msgspec.structs.asdict(each)  # type: ignore[arg-type]
    del fields["sha256"]
    return fields


def _say(sentence: str) -> None:
    show.say(sentence, error=True)


def _say_reload() -> None:
    _say("Gateways that run with this file read it again on SIGHUP (`kill -HUP`).")
