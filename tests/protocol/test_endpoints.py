"""The table of endpoints is what is served, allowed and documented; real answers have the forms that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import msgspec
import pytest
import yaml

from kvplane.events.hashing import format_hash
from kvplane.services.auth.roles import ROLES, permissions
from kvplane.services.history.historian import Historian
from kvplane.services.protocol import document
from kvplane.services.protocol.endpoints import ENDPOINTS, PLAIN, of_subject
from kvplane.services.rpc.server import serving
from kvplane.services.simulation.simnode import NodeConfig

if TYPE_CHECKING:
    from tests.support.fleet import Fleet

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = document.schemas()


def test_every_role_may_do_what_it_could_when_this_was_written() -> None:
    """A change of the table that gives somebody more or less must be meant: tests/data/permissions.json changes with it."""
    allowed = {
        role: {
            # A key's consumers have many names.
            what: sorted({re.sub(r"KEY-\d+", "KEY-*", subject) for subject in subjects})
            for what, subjects in permissions(role, "fleet", "KEY", "a/b.c" if role == "node" else "")._asdict().items()
        }
        for role in ROLES
    }
    assert allowed == json.loads((ROOT / "tests" / "data" / "permissions.json").read_text())


def test_a_subject_leads_to_its_endpoint() -> None:
    for spec in ENDPOINTS:
        assert of_subject(spec.subject.replace("{", "").replace("}", "").join(("kv.f.", ""))) is spec
        assert of_subject(spec.pattern("some-fleet")) is spec
    for stranger in ("route", "kv.f", "kv.f.routes", "kv.f.route.x", "kv.f.access.w", "$SRV.PING", "x.f.route"):
        assert of_subject(stranger) is None
    assert len({(spec.server, spec.name) for spec in ENDPOINTS}) == len(ENDPOINTS)
    assert len({spec.subject for spec in ENDPOINTS}) == len(ENDPOINTS)


def test_a_service_that_answers_not_what_the_table_says_does_not_start() -> None:
    answers = {"route": print, "complete": print, "status": print}
    with pytest.raises(ValueError, match="not of the same names"):
        serving("router", "f", "w", answers)
    with pytest.raises(ValueError, match="not of the same names"):
        serving("router", "f", "w", {**answers, "flush": print, "more": print})


def test_the_documents_are_those_of_the_table() -> None:
    written = (ROOT / "docs" / "asyncapi.yaml").read_text()
    assert yaml.safe_load(written) == document.asyncapi()
    assert written.endswith(document.yaml(document.asyncapi()))
    assert (ROOT / "docs" / "subjects.md").read_text() == document.markdown()


def _references(data: object) -> set[str]:
    match data:
        case {"$ref": str(reference)}:
            return {reference}
        case dict():
            return set().union(*map(_references, data.values()))
        case list():
            return set().union(*map(_references, data))
        case _:
            return set()


def test_the_asyncapi_document_refers_to_what_is_there_and_its_schemas_are_schemas() -> None:
    whole = document.asyncapi()
    for reference in _references(whole):
        part: Any = whole
        for word in reference.removeprefix("#/").split("/"):
            part = part[word]
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for channel in whole["channels"].values():
        words = {word[1:-1] for word in (channel["address"] or "").split(".") if word.startswith("{")}
        assert words == set(channel.get("parameters", {}))
    assert len(whole["operations"]) == len(ENDPOINTS) + len(document.PUBLISHED)


def _check(name: str, data: Any) -> None:
    """The data has the form of this name, and no field that its schema doesn't know."""
    whole = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": SCHEMAS}}
    jsonschema.Draft202012Validator(whole).validate(data)
    assert data.keys() <= SCHEMAS[name]["properties"].keys()


HASHES = [format_hash(number) for number in (1, 2, 3)]
NODE: dict[str, Any] = {"node": "m"}
REGISTER = {
    **NODE, "address": "nowhere", "models": ["managed"], "block_size": 16, "capacity_blocks": {"gpu": 8},
    "cache_mode": "managed", "replace": True,
}  # fmt: skip
ADMIT = {"model": "managed", "hashes": HASHES, "node": "m"}
# By server and name, in the order in which they can be asked.
ASKED: dict[str, dict[str, Any]] = {
    "coordinator_node_register": REGISTER,
    "coordinator_register_oneself": REGISTER,
    "coordinator_cache_admit": ADMIT,
    "coordinator_admit_to_oneself": ADMIT,
    "coordinator_cache_touch": {**NODE, "hashes": HASHES},
    "coordinator_cache_evict": {**NODE, "hashes": HASHES[2:]},
    "coordinator_cache_lookup": {"model": "managed", "hashes": HASHES},
    "coordinator_node_cordon": {**NODE, "reason": "test"},
    "coordinator_node_uncordon": NODE,
    "coordinator_node_list": {},
    "coordinator_node_last": NODE,
    "coordinator_last_of_oneself": NODE,
    "coordinator_cache_names": NODE,
    "coordinator_names_of_oneself": NODE,
    "router_route": {"model": "sim", "prompt": "hello", "session": "s", "request": "q"},
    "router_complete": {"request": "q", "node": "n"},
    "router_status": {},
    "router_flush": {"digest": True},
    "node_serve": {"request": "q", "hashes": HASHES, "tokens": 49, "output_tokens": 1},
    "coordinator_session_end": {"model": "sim", "session": "s"},
    "coordinator_policy_set": {"policy": "cascade"},
    "coordinator_format_show": {},
    "coordinator_format_raise": {},
    "coordinator_status": {"digest": True},
    "coordinator_status_of_one": {},
    "historian_status": {},
    "historian_status_of_one": {},
    "historian_sql": {"sql": "SELECT 1 AS one"},
    "historian_sequence": {"at": "1"},
    "historian_snapshot": {"at": "1"},
    "historian_state": {"at": "1"},
    "historian_changes": {"first": "1", "second": "2"},
    "historian_explain": {"request": "q"},
    "coordinator_snapshot": {},
    "coordinator_compact": {},
    "coordinator_leave": {**NODE, "epoch": 1},
    "coordinator_node_remove": NODE,
}
NOT_ASKED = {"coordinator_piece", "historian_piece", "historian_sql_next", "historian_whatif"}
"""Those that go on with what another one began, and one that takes an Arrow stream: no JSON."""


@pytest.mark.anyio
async def test_real_requests_and_answers_have_the_forms_of_the_table(fleet: Fleet, tmp_path: Path) -> None:
    coordinator, router = await fleet.coordinator(), await fleet.router()
    await fleet.nodes(NodeConfig(name="n"))
    historian = Historian(await fleet.connect("historian"), "default", tmp_path / "history", servers=[fleet.url])
    await fleet._group.start(historian.run)
    own = {"coordinator": coordinator.writer, "router": router.writer, "historian": historian.id}
    specs = {f"{spec.server}_{spec.name}": spec for spec in ENDPOINTS}
    assert specs.keys() == {*ASKED, *NOT_ASKED}
    for key, asked in ASKED.items():
        spec = specs[key]
        _check(spec.request.__name__, asked)
        if spec.server == "historian":
            await coordinator.replica.reached(router.state.sequence)
            assert await historian.ingest.reached(coordinator.state.sequence, seconds=20)
        name = "n" if spec.server == "node" else "m"
        subject = spec.at("default", own.get(spec.server, "")).replace("*", name)
        message = await fleet.client.request(subject, msgspec.json.encode(asked), timeout=30)
        answer = msgspec.json.decode(message.data)
        assert "Nats-Service-Error-Code" not in (message.headers or {}), (key, answer)
        if spec.answer is not PLAIN:
            _check(spec.answer.__name__, answer)
            as_read = msgspec.msgpack.decode((await fleet.client.request(
                subject, msgspec.msgpack.encode({**asked, "hashes": b""} if "hashes" in asked else asked), timeout=30
            )).data) if spec.again else None  # fmt: skip
            if as_read is not None:
                msgspec.convert(as_read, spec.answer)
    _check("Error", msgspec.json.decode((await fleet.client.request("kv.default.route", b"{}", timeout=5)).data))
