"""The fleet's subjects as documents, made from the table of endpoints and the Structs: docs/subjects.md and docs/asyncapi.yaml.

JSON schemas are of the JSON that people write. In MessagePack, which programs write, block hashes are one byte string of
little-endian u64 instead of a list.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, get_args, get_origin

import msgspec

from kvplane.events import types
from kvplane.services.protocol import messages
from kvplane.services.protocol.endpoints import ENDPOINTS, Spec

JSON = dict[str, Any]

_REFERENCE = "#/components/schemas/{name}"
_PACKED = ("hashes", "stored", "evicted")
_HASH: JSON = {
    "title": "Hash",
    "description": "Hash of a block: 16 hex digits, 0x and hex digits, or a decimal number.",
    "anyOf": [{"type": "string", "pattern": "^[0-9A-Za-z]+$"}, {"type": "integer", "minimum": 0}],
}
_ERROR: JSON = {
    "title": "Error",
    "description": "What is answered instead, with the header `Nats-Service-Error-Code`. `code` is for programs.",
    "type": "object",
    "properties": {"code": {"type": "string"}, "error": {"type": "string"}},
    "required": ["code", "error"],
}
_WORDS = {
    "role": "`coordinator` or `router`",
    "fleet": "Name of the fleet.",
    "node": "Name of a node, percent-encoded, the dot encoded as well.",
    "model": "Name of a model, percent-encoded, the dot encoded as well.",
    "writer": "A writer's name of itself, as its status and `nats micro info` show it.",
    "historian": "A historian's name of itself, as its status and `nats micro info` show it.",
}
_INTRODUCTION = """\
Everything in kvplane is a subject of NATS, and every NATS client can ask: JSON is answered in JSON, MessagePack in MessagePack.
An error has the header `Nats-Service-Error-Code` and the body `{"code", "error"}`. Names in subjects are percent-encoded. The
role `admin` may ask everything."""


class Published(NamedTuple):
    """A subject that services publish on and that nobody answers."""

    name: str
    subject: str
    form: Any
    says: str
    stored: bool


PUBLISHED: tuple[Published, ...] = (
    Published("node", "node.{node}", types.NodeEvent, "A node joins, leaves, is lost; one event a commit.", stored=True),
    Published("cache", "cache.{node}", types.CacheEvent, "What a node holds; a placement is alone in its commit.", stored=True),
    Published("session", "session.{model}", types.SessionEvent, "Which node a session belongs on.", stored=True),
    Published("access", "access.{writer}", types.AccessEvent, "Requests that were routed, and how they ended.", stored=True),
    Published("control", "control", types.ControlEvent, "The policy, and the log's format.", stored=True),
    Published("heartbeat", "pulse.{node}", messages.Heartbeat, "A node's heartbeat, in MessagePack only.", stored=False),
    Published("checkpoint", "checkpoint.{role}.{writer}", messages.Checkpoint, "A replica's digest, in MessagePack only.",
              stored=False),
)  # fmt: skip


def _kinds(form: Any) -> tuple[Any, ...]:  # noqa: ANN401 - a type form
    return get_args(form) if get_origin(form) is not dict and get_args(form) else (form,)


def _name(form: Any) -> str:  # noqa: ANN401 - a type form
    """Name of a Struct's schema; empty for an answer whose fields depend on what is asked."""
    return form.__name__ if isinstance(form, type) and issubclass(form, msgspec.Struct) else ""


def schemas() -> dict[str, JSON]:
    """JSON schemas of all that travels, by name."""
    forms = [form for spec in ENDPOINTS for form in (spec.request, spec.answer) if _name(form)]
    forms += [kind for subject in PUBLISHED for kind in _kinds(subject.form)]
    _, components = msgspec.json.schema_components(dict.fromkeys(forms), ref_template=_REFERENCE)
    reference = {"$ref": _REFERENCE.format(name="Hash")}
    for schema in components.values():
        properties: JSON = schema.get("properties", {})
        for field in _PACKED:
            if "contentEncoding" in json.dumps(properties.get(field)):
                packed = {"type": "array", "items": reference, "maxItems": types.HASHES_LIMIT}
                nullable = "anyOf" in properties[field]
                kept = {key: value for key, value in properties[field].items() if key in {"default", "description"}}
                if kept.get("default") == "":
                    kept["default"] = []
                properties[field] = {"anyOf": [packed, {"type": "null"}], **kept} if nullable else {**packed, **kept}
        if "parent" in properties:
            properties["parent"] = {"anyOf": [reference, {"type": "null"}], "default": None}
    return {"Hash": _HASH, "Error": _ERROR, **dict(sorted(components.items()))}


def _words(subject: str) -> list[str]:
    return ["fleet", *(word[1:-1] for word in subject.split(".") if word.startswith("{"))]


def _channel(subject: str, says: str, sent: dict[str, JSON]) -> JSON:
    parameters = {word: {"description": _WORDS[word]} for word in _words(subject)}
    return {"address": f"kv.{{fleet}}.{subject}", "description": says, "parameters": parameters, "messages": sent}


def _message(form: Any) -> JSON:  # noqa: ANN401 - a type form
    name = _name(form)
    return {"payload": {"$ref": _REFERENCE.format(name=name)} if name else {"type": "object"}}


def asyncapi() -> JSON:
    """The document of AsyncAPI 3, seen from the fleet's services: they receive requests and send answers."""
    channels: dict[str, JSON] = {}
    operations: dict[str, JSON] = {}
    answers: dict[str, JSON] = {"Error": {"payload": {"$ref": _REFERENCE.format(name="Error")}}}
    for spec in ENDPOINTS:
        key = f"{spec.server}_{spec.name}"
        channels[key] = _channel(spec.subject, spec.says, {"request": _message(spec.request)})
        answer = _name(spec.answer) or f"{spec.name}_answer"
        answers[answer] = _message(spec.answer)
        operations[key] = {
            "action": "receive",
            "title": spec.says,
            "channel": {"$ref": f"#/channels/{key}"},
            "messages": [{"$ref": f"#/channels/{key}/messages/request"}],
            "reply": {
                "channel": {"$ref": "#/channels/inbox"},
                "messages": [{"$ref": f"#/channels/inbox/messages/{each}"} for each in (answer, "Error")],
            },
        }
    for each in PUBLISHED:
        one = [{"$ref": _REFERENCE.format(name=kind.__name__)} for kind in _kinds(each.form)]
        commit = {"type": "array", "items": {"oneOf": one}, "minItems": 1, "maxItems": types.EVENTS_LIMIT}
        channels[each.name] = _channel(
            each.subject, each.says, {"message": {"payload": commit if each.stored else one[0]}}
        )
        operations[each.name] = {
            "action": "receive",
            "title": each.says,
            "channel": {"$ref": f"#/channels/{each.name}"},
            "messages": [{"$ref": f"#/channels/{each.name}/messages/message"}],
        }
    channels["inbox"] = {
        "address": None, "description": "The reply subject that the one who asks has chosen.", "messages": answers,
    }  # fmt: skip
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "kvplane", "version": "1", "description": _INTRODUCTION.replace("\n", " "),
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": operations,
        "components": {"schemas": schemas()},
    }  # fmt: skip


def yaml(data: object) -> str:
    """Plain data as YAML; texts are quoted as in JSON."""
    return "\n".join(_lines(data, "")) + "\n"


def _lines(data: object, indent: str) -> list[str]:
    lines: list[str] = []
    pairs = data.items() if isinstance(data, dict) else ((None, part) for part in data)  # type: ignore[attr-defined]
    for key, value in pairs:
        head = f"{indent}- " if key is None else f"{indent}{_key(key)}: "
        if not isinstance(value, dict | list) or not value:
            lines.append(head + json.dumps(value, ensure_ascii=False))
            continue
        inner = _lines(value, f"{indent}  ")
        if key is None:
            inner[0] = head + inner[0].lstrip(" ")
            lines += inner
        else:
            lines += [head.rstrip(), *inner]
    return lines


def _key(key: str) -> str:
    return key if key.replace("_", "").isalnum() and not key.isdigit() else json.dumps(key)


def markdown() -> str:
    """Every subject in tables, and the JSON schemas."""
    parts = [
        "# Subjects",
        "",
        "Made by `python -m kvplane.services.protocol subjects`; don't edit it.",
        "",
        _INTRODUCTION,
    ]
    for server, title in (("router", "Routers"), ("coordinator", "Coordinators"), ("historian", "Historians"),
                          ("node", "Simulated nodes")):  # fmt: skip
        parts += ["", f"## {title} answer", "", "| subject | | request | answer | roles that may ask | asked again |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        parts += [_row(spec) for spec in ENDPOINTS if spec.server == server]
    parts += [
        "",
        "Asked again: when the answer does not come, kvplane's own clients ask again after half a second.",
        "",
    ]
    parts += ["## The log", "", "Each message is a commit: a list of events. See [architecture](architecture.md).", ""]
    parts += ["| subject | | events |", "|---|---|---|"]
    parts += [_published(each) for each in PUBLISHED if each.stored]
    parts += ["", "## Published, not stored", "", "| subject | | form |", "|---|---|---|"]
    parts += [_published(each) for each in PUBLISHED if not each.stored]
    parts += ["", "## JSON schemas"]
    for name, schema in schemas().items():
        plain = json.dumps(schema, indent=1, ensure_ascii=False).replace("#/components/schemas/", "#")
        parts += ["", f"### {name}", "", "```json", plain, "```"]
    return "\n".join(parts) + "\n"


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})" if name else "depends on the question"


def _row(spec: Spec) -> str:
    answer = "none is needed, or " * spec.unasked + _link(_name(spec.answer))
    who = ", ".join(spec.askers) or "admin only"
    again = "yes" if spec.again else ""
    return f"| `kv.<fleet>.{_shown(spec.subject)}` | {spec.says} | {_link(_name(spec.request))} | {answer} | {who} | {again} |"


def _published(each: Published) -> str:
    kinds = ", ".join(_link(kind.__name__) for kind in _kinds(each.form))
    return f"| `kv.<fleet>.{_shown(each.subject)}` | {each.says} | {kinds} |"


def _shown(subject: str) -> str:
    return subject.replace("{", "<").replace("}", ">")
