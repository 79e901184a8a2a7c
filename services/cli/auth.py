"""Commands of credentials: `auth init`, `auth add`, `auth list`, `auth remove`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from kvplane.events.errors import BadCredentials
from kvplane.services.auth.folder import ALONE, DEFAULT, FIRST, SOON, AuthFolder, role_of
from kvplane.services.cli import show
from kvplane.services.cli.ask import Json, show_json
from kvplane.services.cli.show import Column, Styled

if TYPE_CHECKING:
    from kvplane.services.auth.users import User

auth = App(name="auth", help="Make and take back credentials: who may log in, and what each may do.")

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
    with AuthFolder.changing(folder, create=True) as held:
        held.set_servers(server, also=also, seen=server_path)
        added = [role for role in FIRST if held.add(fleet, role)]
        made = held.save(renew=renew)
    for role in added:
        _say(f"made {held.seed_file(fleet, role)}")
    for name in made:
        _say(f"made the certificate of {name}")
    if not added and not made:
        _say("all of it was there already; nothing was changed but the servers' configuration, written anew")
    _warn(held)
    _say("")
    _say_servers(held)
    seed = held.seed_file(fleet, "client")
    _say(f"Log in:  kvplane route sim --prompt hello --ca {held.ca} --credentials {seed}")
    _say(f"Nodes:   kvplane auth add node NAME --auth {folder}")


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
    which = role_of(role)
    with AuthFolder.changing(auth) as held:
        if not held.add(fleet, which, name, replace=replace):
            raise BadCredentials(
                f"{held.seed_file(fleet, which, name)} was made already and is kept; --replace makes a new one"
            )
        held.save()
    _say(f"made {held.seed_file(fleet, which, name)}")
    _say_reload(held)


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
    which = role_of(role)
    with AuthFolder.changing(auth) as held:
        held.remove(fleet, which, name)
        held.save()
    _say(f"{role}{'/' if name else ''}{name} may log in no more")
    _say_reload(held)


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
            "problems": held.problems(),
        })  # fmt: skip
        return
    show.table(
        [Column("fleet", spare=1), Column("user"), Column("key"), Column("made", spare=2)],
        [[user.fleet, user.label, user.key, user.made[:10]] for user in held.users],
    )
    show.say("")
    show.table(
        [Column("certificate"), Column("ends")],
        [[name, f"{end:%Y-%m-%d}"] for name, end in ends.items()],
    )
    _warn(held)


def _plain(held: AuthFolder, user: User) -> dict[str, Any]:
    seed = held.seed_file(user.fleet, user.role, user.name)
    return {
        "fleet": user.fleet, "role": user.role, "name": user.name, "key": user.key, "made": user.made,
        "seed": str(seed) if seed.exists() else None,
    }  # fmt: skip


def _say(sentence: str) -> None:
    """Commands that are to be copied stay on their line."""
    show.say(sentence, error=True, wrap=False)


def _warn(held: AuthFolder) -> None:
    for problem in held.problems():
        show.say(Styled(f"{problem[0].upper()}{problem[1:]}.", "bold yellow"), error=True)
    for name, end in held.ends().items():
        if end - datetime.now(UTC) < SOON:
            renewed = (
                "clients must be given a new one" if name == "ca.pem" else "`kvplane auth init --renew` makes a new one"
            )
            show.say(Styled(f"The certificate {name} ends on {end:%Y-%m-%d}; {renewed}.", "bold yellow"), error=True)


def _say_servers(held: AuthFolder) -> None:
    for server in held.servers:
        place = held.server_folder(server.name)
        if server.name == ALONE:
            _say(f"Start:   kvplane up --auth {held.path}")
            _say(f"Or, with a server of your own, put a link to {place} beside its configuration, named auth")
        else:
            _say(f"Server {server.name}: give it {place}, as {server.seen}")
    _say('In a server\'s configuration: include "auth/client.conf"; inside cluster {}: include "auth/cluster.conf"')
    _say('With a monitoring port (http): include "auth/monitor.conf", which puts a secret path before all of its own')
    if [server.name for server in held.servers] != [ALONE]:
        _say_reload(held)


def _say_reload(held: AuthFolder) -> None:
    several = "every server" if len(held.servers) > 1 else "the server"
    _say(
        f"Now let {several} read it again: SIGHUP to nats-server (`kill -HUP`, `nats-server --signal reload`, or in compose "
        "`kill -s HUP`); a server that runs on another machine needs its folder under servers/ first"
    )
