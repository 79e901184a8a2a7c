"""Requests that fit their schema nearly, or in an extreme way; made from it, so that a new field is attacked as well."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import msgspec

from kvplane.services.protocol.document import schemas

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

Schema = dict[str, Any]

FAR = (1 << 31, 1 << 53, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 10**30, -1, -(1 << 63), -(10**30), 10**400)
FLOATS = (math.inf, -math.inf, math.nan, 1e308, 5e-324, -0.0, -1.5)
TEXTS = (
    "", "\0", "\x1b[2J", "\u202eabc", "\ud800", "a\nb", "*", ">", "a.b", " ", "%zz", "%00", "../../x", "x" * 129, "y" * 5000,
    "\U0001f600" * 200, "é", "1e999", "NaN", "'; DROP TABLE x; --", "__class__", "module:attr", "x,y", "$SYS.>", "_INBOX.>",
)  # fmt: skip
LARGE = 9_000
"""Elements of a list that has many."""
DEEP = 3000
"""Levels of what is nested deeply."""


def deep(levels: int = DEEP) -> Any:
    """A list in a list in a list."""
    made: list[Any] = []
    for _ in range(levels):
        made = [made]
    return made


WRONG: tuple[Any, ...] = (None, True, [], {}, [None], {"a": {"b": {}}}, "text", 7, 1.5, {"type": "x"}, [[]], {"": ""})
"""Values of any type, most of which are of a wrong one."""


class Hostile:
    """Makes requests from the schemas of what travels; the same for the same `rng`."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.schemas: dict[str, Schema] = schemas()

    def plain(self, schema: Schema, known: dict[str, Any]) -> Any:
        """A value that fits; `known` has those of some fields."""
        schema = self._meant(schema)
        if "anyOf" in schema:
            return self.plain(self.rng.choice(schema["anyOf"]), known)
        if "enum" in schema:
            return self.rng.choice(schema["enum"])
        match schema.get("type"):
            case "object":
                properties = schema.get("properties", {})
                needed = schema.get("required", [])
                some = {name for name in properties if name in needed or (name in known and self.rng.random() < 0.5)}
                return {name: known[name] if name in known else self.plain(properties[name], known) for name in some}
            case "array":
                return []
            case "integer":
                return int(schema.get("minimum", 1))
            case "number":
                return float(schema.get("minimum", 0.0))
            case "boolean":
                return False
            case "null":
                return None
        return "a"

    def extreme(self, schema: Schema) -> Any:
        """A value at a bound of its schema, beyond it, or of another type."""
        rng = self.rng
        schema = self._meant(schema)
        if rng.random() < 0.15:
            return deep() if rng.random() < 0.1 else rng.choice(WRONG)
        if "anyOf" in schema:
            return self.extreme(rng.choice(schema["anyOf"]))
        if "enum" in schema:
            return rng.choice([*schema["enum"], "none of them", ""])
        match schema.get("type"):
            case "integer":
                bounds = [int(schema[key]) for key in ("minimum", "maximum") if key in schema]
                return rng.choice([*FAR, *(bound + by for bound in bounds for by in (-1, 0, 1))])
            case "number":
                return rng.choice([*FLOATS, *FAR, *(schema[key] for key in ("minimum", "maximum") if key in schema)])
            case "array":
                one = schema.get("items", {})
                count = rng.choice([1, 2, 17, LARGE] if rng.random() < 0.1 else [1, 2, 17])
                return [self.extreme(one)] * count if count == LARGE else [self.extreme(one) for _ in range(count)]
            case "object":
                inner = schema.get("additionalProperties", {})
                inner = inner if isinstance(inner, dict) else {}
                if rng.random() < 0.1:
                    return {f"k{at}": 1 for at in range(5000)}
                return {rng.choice(["gpu", "cpu", *TEXTS[:20]]): self.extreme(inner) for _ in range(3)}
            case "string":
                longest = int(schema.get("maxLength", 512))
                return rng.choice([*TEXTS, *("x" * (longest + by) for by in (0, 1) if longest < 1 << 18)])
        return rng.choice([*WRONG, *FAR])

    def request(self, form: str | Schema, known: dict[str, Any]) -> Any:
        """A request of a form, or of a schema, with up to three of its fields extreme, one more, or one less."""
        rng = self.rng
        schema = self._meant(self.schemas[form] if isinstance(form, str) else form)
        if rng.random() < 0.03:
            return rng.choice([*WRONG, deep()])
        made: dict[str, Any] = self.plain(schema, known)
        properties: dict[str, Schema] = schema.get("properties", {})
        for name in rng.choices(list(properties), k=rng.choice([0, 1, 1, 1, 2, 3])) if properties else ():
            made[name] = self.extreme(properties[name])
        if made and rng.random() < 0.04:
            del made[rng.choice(list(made))]
        if rng.random() < 0.02:
            made[rng.choice(TEXTS)] = 1
        return made

    def _meant(self, schema: Schema) -> Schema:
        while "$ref" in schema:
            schema = self.schemas[schema["$ref"].rpartition("/")[2]]
        return schema


def bodies(request: Any) -> Iterator[bytes]:
    """A request as JSON and as MessagePack, as far as each can say it."""
    try:
        # Python's own writes NaN, Infinity, lone surrogates and integers of any length.
        yield json.dumps(request).encode()
    except (RecursionError, ValueError):
        yield b'{"a":' * DEEP + b"1" + b"}" * DEEP
    try:
        yield msgspec.msgpack.encode(request)
    except (RecursionError, ValueError, OverflowError, UnicodeEncodeError):
        yield b"\x91" * DEEP + b"\xc0"
