"""What NATS servers read: `client.conf` and `monitor.conf` at the top level, `cluster.conf` inside `cluster {}`.

A server takes an include from the folder of the file that holds it, always, but certificates from its working directory; so
their paths are written whole, as the server sees them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from kvplane.services.auth.roles import permissions

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import PurePosixPath

    from kvplane.services.auth.users import User

CLIENT, CLUSTER, MONITOR = "client.conf", "cluster.conf", "monitor.conf"
CA, CERTIFICATE, KEY = "ca.pem", "server.pem", "server.key"
_HEAD = "# Written by `kvplane auth`; it is written anew with every change of credentials.\n"


def client_configuration(users: Iterable[User], seen: PurePosixPath) -> str:
    """TLS and users, for the top level. `seen` is where the server sees the files beside this one."""
    entries = "".join(_user(user) for user in users)
    return f"""{_HEAD}tls {{
  cert_file: {_quoted(seen / CERTIFICATE)}
  key_file: {_quoted(seen / KEY)}
  timeout: 5
}}
authorization {{
  timeout: 5
  users: [
{entries}  ]
}}
"""


def cluster_configuration(seen: PurePosixPath) -> str:
    """TLS of routes, both ways: a server is let in by its certificate, and only servers have one of this CA."""
    return f"""{_HEAD}tls {{
  cert_file: {_quoted(seen / CERTIFICATE)}
  key_file: {_quoted(seen / KEY)}
  ca_file: {_quoted(seen / CA)}
  verify: true
  timeout: 5
}}
"""


def monitor_configuration(secret: str) -> str:
    """What stands before every path of the monitoring port, which asks nobody who he is and shows every inbox."""
    return f"{_HEAD}http_base_path: {_quoted(f'/{secret}')}\n"


def _user(user: User) -> str:
    allowed = permissions(user.role, user.fleet, user.key, user.name)
    return f"""    # {json.dumps(user.label)} of fleet {user.fleet}
    {{ nkey: {user.key}, permissions: {{
      publish: {{ allow: {_list(allowed.publish)} }}
      subscribe: {{ allow: {_list(allowed.subscribe)} }}
    }} }}
"""


def _list(subjects: Iterable[str]) -> str:
    return "[" + ", ".join(_quoted(subject) for subject in subjects) + "]"


def _quoted(value: object) -> str:
    return json.dumps(str(value), ensure_ascii=False)
