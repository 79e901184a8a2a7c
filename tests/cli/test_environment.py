"""What comes from the environment: the options that say so, and nothing that others put there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from docs.reference.environment import make, options
from kvplane.services.cli import app
from tests.support.commands import asked, run, up

PAGE = Path(__file__).resolve().parents[2] / "docs" / "environment.md"
# What a container finds of a Service called kvplane, whose port is named nats.
KUBERNETES = {
    "KVPLANE_SERVICE_HOST": "10.96.0.1",
    "KVPLANE_SERVICE_PORT": "4222",
    "KVPLANE_SERVICE_PORT_NATS": "4222",
    "KVPLANE_PORT": "tcp://10.96.0.1:4222",
    "KVPLANE_PORT_4222_TCP": "tcp://10.96.0.1:4222",
    "KVPLANE_PORT_4222_TCP_PROTO": "tcp",
    "KVPLANE_PORT_4222_TCP_PORT": "4222",
    "KVPLANE_PORT_4222_TCP_ADDR": "10.96.0.1",
}
TAKEN = re.compile(r"_SERVICE_HOST|_SERVICE_PORT(_.*)?|_PORT|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?")
SERVICES = ("up", "router", "gateway", "coordinator", "historian", "simnode", "attach vllm", "attach sglang")
CONNECTION = {f"KVPLANE_{name}" for name in ("SERVER", "FLEET", "CREDENTIALS", "CA", "LOG_LEVEL", "LOG_FORMAT")}
FOUND = list(options(app))


def test_the_page_is_made_from_the_options() -> None:
    # Made again with: python -m docs.reference.environment > docs/environment.md
    assert make() == PAGE.read_text()


def test_no_variable_is_one_that_kubernetes_sets() -> None:
    ends = {each.variable.removeprefix("KVPLANE") for each in FOUND}
    assert "_SERVER" in ends
    assert {end for end in ends if re.search(f"({TAKEN.pattern})$", end)} == set()
    assert all(TAKEN.fullmatch(name.removeprefix("KVPLANE")) for name in KUBERNETES)


def test_every_option_of_what_runs_on_comes_from_the_environment() -> None:
    for service in SERVICES:
        command = app
        for name in service.split():
            command = command[name]
        for argument in command.assemble_argument_collection():
            if argument.field_info.is_keyword and not argument.children:
                assert argument.parameter.env_var, f"{service} {argument.name}"
        assert {each.variable for each in FOUND if each.command == service} >= CONNECTION


def test_of_commands_that_ask_only_where_and_as_whom_they_ask() -> None:
    asking = {each.variable for each in FOUND if each.command not in SERVICES} - CONNECTION
    assert asking == {"KVPLANE_AUTH", "KVPLANE_HISTORY", "KVPLANE_MONITOR", "KVPLANE_API_KEY", "KVPLANE_KEYS"}


def test_help_names_each_variable_once() -> None:
    for command in (["up"], ["node", "list"], ["attach", "vllm"]):
        shown = re.findall(r"\[env var: ([^\]]*)\]", run(*command, "--help", COLUMNS="400").stdout)
        assert len(shown) >= len(CONNECTION)
        assert [names for names in shown if "," in names] == []


def test_an_option_of_a_question_is_not_read() -> None:
    done = run("policy", "list", KVPLANE_JSON="1")
    assert done.returncode == 0
    with pytest.raises(json.JSONDecodeError):
        json.loads(done.stdout)


def test_up_starts_beside_a_service_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KUBERNETES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KVPLANE_SIMULATE", "2")
    monkeypatch.setenv("KVPLANE_HTTP", "off")
    with up(tmp_path) as (url, _):
        assert [row["node"] for row in asked(url, "node", "list")["nodes"]] == ["sim-1", "sim-2"]


def test_the_port_comes_from_its_variable() -> None:
    done = run("up", KVPLANE_PORT_NUMBER="banana")
    assert done.returncode == 2
    assert "KVPLANE_PORT_NUMBER" in " ".join((done.stdout + done.stderr).split())
