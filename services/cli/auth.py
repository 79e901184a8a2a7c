"""Commands of credentials: `auth init`, `auth add`, `auth list`, `auth remove`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from kvplane.events.errors import BadCredentials
from kvplane.services.auth.folder import ALONE, DEFAULT, FIRST, SOON, AuthFolder, role_of
from kvplane.services.cli.ask import Json, show_json

if TYPE_CHECKING:
    from kvplane.services.auth.users import User

# Only what says so comes from the environment: KVPLANE_SERVER has URLs for those that connect, and here are names.
auth = App(name="auth", help="Make and take back credentials: who may log in, and what each may do.", config=())

Fleet = Annotated[str, Parameter(name="--fleet", env_var="KVPLANE_FLEET")]
Auth = Annotated[Path, Parameter(name="--auth", env_var="KVPLANE_AUTH")]


@auth.command
def init(
    folder: Path = DEFAULT,
    *,
    server: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    also: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    server_path: str | None = None,
    fleet: Fleet = "default",
    renew: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Make a folder of credentials: a CA, certificates, and a seed for each role. What is there is kept.

    Parameters
    ----------
    folder
        The folder. Whoever has it is admin of the fleet.
    server
        Names of the NATS servers, as clients and other servers call them; default is one, on this machine.
    also
        Further host names or addresses that certificates are for.
    server_path
        Where a server sees its own folder; default is /etc/nats/auth for servers that are named, else where it lies now.
    fleet
        Name of the fleet; a folder may hold several.
    renew
        Make the servers' certificates anew.
    """
    held = AuthFolder(folder)
    held.set_servers(server, also=also, seen=server_path)
    added = [role for role in FIRST if held.add(fleet, role)]
    made = held.save(renew=renew)
    console = _console()
    for role in added:
        console.print(f"made {held.seed_file(fleet, role)}")
    for name in made:
        console.print(f"made the certificate of {name}")
    if not added and not made:
        console.print("all of it was there already; nothing was changed but the servers' configuration, written anew")
    _warn(held, console)
    console.print()
    _say_servers(held, console)
    seed = held.seed_file(fleet, "client")
    console.print(
        f"Log in:  kvplane route sim --prompt hello --ca {held.ca} --credentials {seed}\n"
        f"Nodes:   kvplane auth add node NAME --auth {folder}"
    )


@auth.command
def add(
    role: str,
    name: str = "",
    *,
    auth: Auth = DEFAULT,
    fleet: Fleet = "default",
    replace: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Let another user in: a node by its name, or one more client, router, ... of a name of its own.

    Parameters
    ----------
    role
        admin, coordinator, router, historian, node or client.
    name
        Name of the node; with other roles, a name to tell several apart.
    auth
        The folder of credentials.
    fleet
        Name of the fleet.
    replace
        Make a new seed for one that is there; the old one is worth nothing then.
    """
    held = AuthFolder.existing(auth)
    which = role_of(role)
    if not held.add(fleet, which, name, replace=replace):
        raise BadCredentials(
            f"{held.seed_file(fleet, which, name)} was made already and is kept; --replace makes a new one"
        )
    held.save()
    console = _console()
    console.print(f"made {held.seed_file(fleet, which, name)}")
    _say_reload(held, console)


@auth.command
def remove(role: str, name: str = "", *, auth: Auth = DEFAULT, fleet: Fleet = "default") -> None:
    """Take credentials back. Servers that read their configuration again end the user's connections.

    Parameters
    ----------
    role
        The user's role.
    name
        The user's name.
    auth
        The folder of credentials.
    fleet
        Name of the fleet.
    """
    held = AuthFolder.existing(auth)
    held.remove(fleet, role_of(role), name)
    held.save()
    console = _console()
    console.print(f"{role}{'/' if name else ''}{name} may log in no more")
    _say_reload(held, console)


@auth.command(name="list")
def list_users(*, auth: Auth = DEFAULT, json: Json = False) -> None:
    """List who may log in, and when certificates end.

    Parameters
    ----------
    auth
        The folder of credentials.
    json
        Print JSON.
    """
    held = AuthFolder.existing(auth)
    ends = held.ends()
    if json:
        show_json({
            "users": [_plain(held, user) for user in held.users],
            "certificates": {name: end.isoformat() for name, end in ends.items()},
        })  # fmt: skip
        return
    table = Table.grid(padding=(0, 2))
    for user in held.users:
        table.add_row(user.fleet, user.label, user.key, user.made[:10])
    console = Console(soft_wrap=True)
    console.print(table)
    for name, end in ends.items():
        console.print(f"certificate {name}: until {end:%Y-%m-%d}", highlight=False)
    _warn(held, _console())


def _plain(held: AuthFolder, user: User) -> dict[str, Any]:
    seed = held.seed_file(user.fleet, user.role, user.name)
    return {
        "fleet": user.fleet, "role": user.role, "name": user.name, "key": user.key, "made": user.made,
        "seed": str(seed) if seed.exists() else None,
    }  # fmt: skip


def _console() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


def _warn(held: AuthFolder, console: Console) -> None:
    for name, end in held.ends().items():
        if end - datetime.now(UTC) < SOON:
            renewed = (
                "clients must be given a new one" if name == "ca.pem" else "`kvplane auth init --renew` makes a new one"
            )
            console.print(f"[bold yellow]The certificate {name} ends on {end:%Y-%m-%d}; {renewed}.[/]")


def _say_servers(held: AuthFolder, console: Console) -> None:
    for server in held.servers:
        place = held.server_folder(server.name)
        if server.name == ALONE:
            console.print(f"Start:   kvplane up --auth {held.path}")
            console.print(f"Or, with a server of your own, put a link to {place} beside its configuration, named auth")
        else:
            console.print(f"Server {server.name}: give it {place}, as {server.seen}")
    console.print(
        'In a server\'s configuration: include "auth/client.conf"; inside cluster {}: include "auth/cluster.conf"'
    )
    if [server.name for server in held.servers] != [ALONE]:
        _say_reload(held, console)


def _say_reload(held: AuthFolder, console: Console) -> None:
    several = "every server" if len(held.servers) > 1 else "the server"
    console.print(
        f"Now let {several} read it again: SIGHUP to nats-server (`kill -HUP`, `nats-server --signal reload`, or in compose "
        "`kill -s HUP`); a server that runs on another machine needs its folder under servers/ first"
    )
