"""No login of a URL is ever printed or logged, in any form, whoever says it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import structlog
from structlog.testing import capture_logs

from kvplane.events.errors import BadServer, LogUnavailable
from kvplane.events.log.connection import connected
from kvplane.events.log.waiting import place_of
from kvplane.events.logins import without_logins
from kvplane.services.cli import fail
from kvplane.services.diagnosis.examine import _server
from kvplane.services.embedded.server import start_server
from kvplane.services.process import logs
from kvplane.services.process.terminal import show_uncaught
from tests.support.ports import free_port
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


async def test_a_reconnection_is_logged_without_the_login(tmp_path: Path) -> None:
    port = free_port()
    logs.configure("debug")
    with capture_logs() as lines:
        running = await start_server(tmp_path / "data", port=port)
        async with connected([f"nats://kv:secret@127.0.0.1:{port}"], "test"):
            await running.stop()
            running = await start_server(tmp_path / "data", port=port)
            await until(lambda: any(line["event"] == "nats_reconnected" for line in lines), 30)
        await running.stop()
    (line,) = [line for line in lines if line["event"] == "nats_reconnected"]
    assert line["server"] == f"127.0.0.1:{port}"
    assert "secret" not in str(lines)


@pytest.mark.parametrize("form", ["text", "json"])
def test_whatever_is_logged_has_no_login(capfd: pytest.CaptureFixture[str], form: str) -> None:
    logs.configure("info", form)  # type: ignore[arg-type]
    urls = ["nats://kv:secret@host:4222", "tls://secret@host"]
    log = structlog.get_logger("kvplane.test")
    try:
        raise ValueError(urls[0])  # noqa: TRY301 - its traceback is looked at
    except ValueError as error:
        log.exception("failed", url=urls[0], several=urls, more={"at": (urls[1],)}, reason=error)
    err = capfd.readouterr().err
    assert err.count("//host") >= 5
    assert "secret" not in err


def test_neither_has_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fail(LogUnavailable("nobody is at nats://kv:secret@host:4222, nor at tls://secret@[::1]:1"))
    try:
        raise RuntimeError("nats://kv:secret@host")  # noqa: TRY301 - the same
    except RuntimeError as error:
        show_uncaught(type(error), error, error.__traceback__)
    err = capsys.readouterr().err
    assert "nobody is at nats://host:4222, nor at tls://[::1]:1" in err
    assert "secret" not in err
    assert sys.excepthook is not show_uncaught


@pytest.mark.parametrize(
    "url",
    ["nats://kv:se/cret@host:4222", "nats://kv:4222#secret@host", "kv:4222?secret@host", "nats://kv:1/secret@h@host"],
)
def test_a_login_that_ends_the_host_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(BadServer) as caught:
        place_of(url)
    assert "cret" not in str(caught.value)
    assert "%2F for /" in str(caught.value)


def test_what_has_no_login_stays() -> None:
    for text in ("https://host/users/@me", "me@home", "a://b c@d", "nats://host:4222"):
        assert without_logins(text) == text


async def test_the_monitoring_port_is_shown_without_its_login_and_secret_path() -> None:
    found = await _server(f"http://kv:secret@127.0.0.1:{free_port()}/secret-path")
    assert "secret" not in str(found)
    assert "connection refused" in found["error"]
