"""The command `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from msgspec import to_builtins

from kvplane.events.errors import BadCredentials
from kvplane.services.auth.folder import AuthFolder
from kvplane.services.cli import show
from kvplane.services.cli.ask import CONNECT_SECONDS, Json, show_json
from kvplane.services.cli.common import COMMON, Common, run_async, start
from kvplane.services.cli.show import Column, Styled
from kvplane.services.diagnosis.doctor import Finding, judge
from kvplane.services.diagnosis.examine import examine

if TYPE_CHECKING:
    from collections.abc import Sequence

Monitor = Annotated[tuple[str, ...], Parameter(env_var="KVPLANE_MONITOR", negative="")]

_COLOURS = {"ok": "green", "unseen": "dim", "warning": "yellow", "problem": "bold red"}


def doctor(*, monitor: Monitor = (), json: Json = False, common: Common = COMMON) -> int:
    """Look whether all is well: log, servers, clocks, replicas and their digests, history, nodes.

    Exit code 1 when there is a problem. What can't be seen from here is called unseen, and is no problem.

    Parameters
    ----------
    monitor
        Monitoring endpoint of a server, such as http://127.0.0.1:8222; it says whether the server is durable, and how full.
    json
        Print JSON.
    """
    start(common, quiet=True)
    findings = [*run_async(_examine, monitor, common), *_credentials(common)]
    if json:
        show_json(to_builtins(findings))
    else:
        show.table(
            [Column("state"), Column("of"), Column("what is seen", prose=True)],
            [
                [Styled(finding.level, _COLOURS[finding.level]), Styled(finding.what, "bold"), finding.message]
                for finding in findings
            ],
        )
    return 1 if any(finding.level == "problem" for finding in findings) else 0


def _credentials(common: Common) -> list[Finding]:
    """What is to be said of the folder of credentials, if it is where the seed lies that is used here."""
    if common.credentials is None:
        return []
    folder = Path(common.credentials).absolute().parents[2]
    try:
        problems = AuthFolder.existing(folder).problems()
    except BadCredentials:
        # An admin elsewhere has it.
        return []
    return [Finding("problem", "credentials", problem) for problem in problems] or [
        Finding("ok", "credentials", f"seeds and servers' configurations in {folder} are of the users that it names")
    ]


async def _examine(monitors: Sequence[str], common: Common) -> list[Finding]:
    async with common.connected("kvplane-doctor", seconds=CONNECT_SECONDS) as client:
        return judge(await examine(client, common.fleet, monitors))
