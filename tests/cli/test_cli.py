"""The command line as a person meets it: in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvplane.services.embedded.server import server_binary
from tests.support.commands import asked, run, up
from tests.support.ports import free_port
from tests.support.processes import alive, children

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with up(tmp_path_factory.mktemp("up"), "--simulate", "3") as (found, _):
        yield found


@pytest.mark.parametrize(
    "command",
    [[], ["up"], ["router"], ["coordinator"], ["simnode"], ["node"], ["node", "list"], ["route"], ["events", "tail"],
     ["state"], ["policy", "set"], ["demo"]],
    ids=" ".join,
)  # fmt: skip
def test_every_command_explains_itself(command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0
    assert "Usage: kvplane" in done.stdout
    assert len(done.stdout.splitlines()) > 5


def test_nodes_are_listed_for_people_and_for_programs(url: str) -> None:
    listing = asked(url, "node", "list")
    assert [row["node"] for row in listing["nodes"]] == ["sim-1", "sim-2", "sim-3"]
    table = run("node", "list", "--server", url)
    assert table.returncode == 0
    assert "sim-2" in table.stdout
    assert "0 / 4,096" in table.stdout


def test_a_route_is_asked_without_being_recorded_unless_wanted(url: str) -> None:
    prompt = ["--prompt", "Which of the three nodes is mine, I wonder?"]
    before = asked(url, "state")["sequence"]
    answer = asked(url, "route", "sim", *prompt)
    assert answer["node"].startswith("sim-")
    assert answer["kind"] == "miss"
    assert asked(url, "state")["sequence"] == before
    recorded = asked(url, "route", "sim", *prompt, "--record", "--session", "mine")
    assert recorded["session"] == "new"
    deadline = time.monotonic() + 5
    while asked(url, "state")["sequence"] == before and time.monotonic() < deadline:
        pass
    tail = run("events", "tail", "--no-follow", "--json", "--from", str(before + 1), "--server", url)
    events = [json.loads(line) for line in tail.stdout.splitlines()]
    # The one that was to be recorded, and not the one before it.
    (routed,) = [event for event in events if event["type"].startswith("RequestRouted")]
    assert (routed["request"], routed["node"], routed["session"]) == (recorded["request"], recorded["node"], "mine")
    assert len(routed["hashes"]) == recorded["blocks"]


def test_a_node_is_cordoned_and_uncordoned(url: str) -> None:
    assert asked(url, "node", "cordon", "sim-3", "--reason", "maintenance")["changed"] is True
    assert asked(url, "node", "cordon", "sim-3")["changed"] is False
    states = {row["node"]: row["state"] for row in asked(url, "node", "list")["nodes"]}
    assert states == {"sim-1": "up", "sim-2": "up", "sim-3": "cordoned"}
    for _ in range(3):
        assert asked(url, "route", "sim", "--tokens", "1,2,3")["node"] != "sim-3"
    assert asked(url, "node", "uncordon", "sim-3")["changed"] is True


def test_a_node_can_be_registered_by_hand_once(url: str) -> None:
    options = ["--address", "http://x", "--model", "m", "--block-size", "16", "--capacity-blocks", "100"]
    assert asked(url, "node", "register", "by.hand", *options)["epoch"] > 0
    again = run("node", "register", "by.hand", *options, "--server", url)
    assert again.returncode == 1
    assert "registered already" in again.stderr
    assert "[node_exists]" in again.stderr
    assert asked(url, "node", "remove", "by.hand")["changed"] is True


def test_any_nats_client_can_ask_in_json(url: str) -> None:
    """A socket and the NATS text protocol: what `nats req` does, without a client library."""
    host, port = url.removeprefix("nats://").split(":")
    body = b'{"model": "sim", "tokens": [1, 2, 3], "dry_run": true}'
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b'CONNECT {"verbose":false,"headers":true}\r\nSUB inbox 1\r\n')
        connection.sendall(b"PUB kv.default.route inbox %d\r\n%s\r\nPING\r\n" % (len(body), body))
        received = b""
        while b"}\r\n" not in received.partition(b"MSG inbox")[2]:
            received += connection.recv(4096)
    answer = json.loads(received.partition(b"MSG inbox")[2].split(b"\r\n")[1])
    assert answer["node"].startswith("sim-")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["route", "nope", "--prompt", "x"], 1, "no node serves model 'nope'"),
        (["route", "sim"], 1, "give one of hashes, tokens and prompt"),
        (["route", "sim", "--tokens", "1,b"], 1, "--tokens must be token ids"),
        (["route", "sim", "--hashes", "0xzz"], 1, "is no block hash"),
        (["node", "cordon", "sim *.>"], 1, "is not registered"),
        (["node", "cordon", ""], 1, "node is empty"),
        (["policy", "set", "magic"], 1, "is not one of round_robin"),
        (["policy", "set", "ttft", "speed=fast"], 1, "'speed=fast' in 'ttft speed=fast' is no parameter"),
        (["policy", "set", "ttft:speed=1"], 1, "policy ttft has no parameter 'speed'; it has uncached_weight"),
        (["policy", "set", "ttft:slow_share=0.1", "slow_share=0.2"], 1, "gives slow_share twice"),
        (["router", "--policy-module", "no_such_module"], 1, "--policy-module 'no_such_module' can't be imported"),
        (["state", "--fleet", "no.such"], 1, "fleet name 'no.such' must be"),
        (["state", "--fleet", "other"], 1, "has no log yet"),
        (["node", "list", "--fleet", "other"], 1, "no service answers"),
        (["demo", "--trace", "no-such-file"], 1, "can't be read"),
        (["demo", "--limit", "0"], 1, "--limit is 0"),
        (["simnode"], 1, "name at least one node"),
        (["up", "--port", "banana"], 2, "banana"),
        (["unknown"], 2, "unknown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_nonsense_is_answered_with_a_sentence(url: str, arguments: list[str], code: int, says: str) -> None:
    done = run(*arguments, KVPLANE_SERVER=url)
    assert done.returncode == code, done.stderr
    assert says in " ".join((done.stderr + done.stdout).split())
    assert "Traceback" not in done.stderr


def test_a_policy_is_written_in_one_word_or_apart(url: str) -> None:
    for words, given in (
        (["ttft:crowd_weight=4,slow_share=0.5"], {"crowd_weight": 4.0, "slow_share": 0.5}),
        (["ttft", "crowd_weight=5", "slow_share=0.25"], {"crowd_weight": 5.0, "slow_share": 0.25}),
        (["ttft:crowd_weight=6", "slow_share=0.125"], {"crowd_weight": 6.0, "slow_share": 0.125}),
        (["ttft"], {}),
    ):
        sequence = asked(url, "policy", "set", *words)["sequence"]
        state = asked(url, "state")
        assert state["sequence"] >= sequence
        assert (state["policy"], state["parameters"]) == ("ttft", given)


def test_no_server_is_one_sentence() -> None:
    done = run("node", "list", "--server", f"nats://127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert "no NATS server answers" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_taken_port_is_one_sentence(url: str, tmp_path: Path) -> None:
    port = url.rpartition(":")[2]
    done = run("up", "--port", port, "--data", str(tmp_path), "--bare")
    assert done.returncode == 1
    assert f"port {port} is taken" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_can_not_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = run("up", "--port", str(free_port()), "--data", str(tmp_path / "file" / "data"))
    assert done.returncode == 1
    assert "the data folder can't be written" in done.stderr


def test_a_trace_with_a_bad_line_names_the_line(tmp_path: Path) -> None:
    good = '{"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [1, 2]}\n'
    path = tmp_path / "trace.jsonl"
    path.write_text(good + '{"timestamp": 0, "input_length": -1}\n')
    done = run("demo", "--trace", str(path))
    assert done.returncode == 1
    assert "trace.jsonl, line 2" in done.stderr


def test_what_up_held_is_there_again_after_a_stop_and_after_a_kill(tmp_path: Path) -> None:
    digests = []
    for attempt in range(3):
        with up(tmp_path) as (found, process):
            if attempt == 0:
                options = ["--address", "x", "--model", "m", "--block-size", "16", "--capacity-blocks", "8"]
                asked(found, "node", "register", "a", *options)
            digests.append(asked(found, "state")["digest"])
            if attempt == 1:
                started = [process.pid, *children(process.pid)]
                for each in started:
                    os.kill(each, signal.SIGKILL)
                process.wait()
                while any(alive(each) for each in started):
                    time.sleep(0.01)
    assert len(set(digests)) == 1


def test_the_configuration_for_servers_of_ones_own_is_valid() -> None:
    config = Path(__file__).resolve().parents[2] / "compose" / "nats" / "single.conf"
    done = subprocess.run([server_binary(), "-t", "-c", str(config)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "sync_interval: always" in config.read_text()
