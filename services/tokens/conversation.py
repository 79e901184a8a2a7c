"""What an engine makes of a chat request before its template. Pure.

Source: vLLM 0.32, `entrypoints/openai/chat_completion/protocol.py` (fields, tools), `renderers/chat_utils.py` (messages) and
`renderers/hf.py` (developer and system messages). What is not known to be made alike raises `Elsewhere`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec

from kvplane.services.tokens.errors import Elsewhere

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvplane.services.tokens.template import Template

_NOTHING = msgspec.Raw()
_BILLING = "x-anthropic-billing-header"
_SKIPPED_WHEN_EMPTY = frozenset(("text", "refusal"))
_ROLES = frozenset(("system", "developer", "user", "assistant", "tool"))


class Chat(msgspec.Struct, frozen=True, gc=False):
    """The fields of a chat request that its tokens depend on."""

    messages: msgspec.Raw = _NOTHING
    tools: msgspec.Raw = _NOTHING
    tool_choice: msgspec.Raw = _NOTHING
    chat_template_kwargs: msgspec.Raw = _NOTHING
    reasoning_effort: Any = None
    add_generation_prompt: Any = True
    continue_final_message: Any = None
    add_special_tokens: Any = None
    documents: Any = None
    chat_template: Any = None
    truncate_prompt_tokens: Any = None
    kv_transfer_params: Any = None
    mm_processor_kwargs: Any = None
    return_assistant_tokens_mask: Any = None


chat = msgspec.json.Decoder(Chat).decode
split = msgspec.json.Decoder(list[msgspec.Raw]).decode
_message = msgspec.json.Decoder(dict[str, Any]).decode


def check(asked: Chat) -> None:
    """Raise `Elsewhere` for a request with a field that changes its tokens in a way that is not known here."""
    for name in (
        "continue_final_message", "add_special_tokens", "documents", "chat_template", "truncate_prompt_tokens",
        "kv_transfer_params", "mm_processor_kwargs", "return_assistant_tokens_mask",
    ):  # fmt: skip
        if getattr(asked, name):
            raise Elsewhere(f"the request has {name}")
    if asked.add_generation_prompt is not True:
        raise Elsewhere("the request changes add_generation_prompt")
    if asked.reasoning_effort is not None and not isinstance(asked.reasoning_effort, str):
        raise Elsewhere("reasoning_effort is no text")
    # Whether tools are then left out is a setting of the engine's.
    if bytes(asked.tools) and bytes(asked.tool_choice) == b'"none"':
        raise Elsewhere("the request has tools and chooses none")


def variables(asked: Chat) -> dict[str, Any]:
    """What the request gives the template beside messages and tools."""
    raw = bytes(asked.chat_template_kwargs)
    given = msgspec.json.decode(raw) if raw else None
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise Elsewhere("chat_template_kwargs is no object")
    if given.keys() & {
        "chat_template",
        "tokenize",
        "tools",
        "messages",
        "add_generation_prompt",
        "continue_final_message",
    }:
        raise Elsewhere("chat_template_kwargs has an argument of the rendering itself")
    effort = asked.reasoning_effort
    if effort is not None:
        if "enable_thinking" not in given:
            given["enable_thinking"] = effort != "none"
        given["reasoning_effort"] = effort
    else:
        given.setdefault("reasoning_effort", None)
    return given


class Tool(dict[str, Any]):
    """A tool whose JSON is written once: templates write all of them for every text."""

    __slots__ = ("_json",)
    _json: str

    def as_json(self) -> str:
        """Its JSON, as templates write it."""
        if not hasattr(self, "_json"):
            self._json = json.dumps(self, ensure_ascii=False)
        return self._json


def tools(raw: bytes) -> list[Tool] | None:
    """Tools as the engine's own types write them: their order of fields, nothing beside them."""
    if not raw or raw == b"null":
        return None
    given = msgspec.json.decode(raw)
    if not isinstance(given, list) or not given:
        raise Elsewhere("tools is no list")
    return [_tool(each) for each in given]


def _tool(given: object) -> Tool:
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(given, dict) or given.get("type", "function") != "function" or not isinstance(function, dict):
        raise Elsewhere("a tool is no function")
    if given.get("defer_loading") is not None or function.get("defer_loading") is not None:
        raise Elsewhere("a tool is loaded later")
    name, description, parameters = function.get("name"), function.get("description"), function.get("parameters")
    strict = function.get("strict")
    if (
        not isinstance(name, str)
        or not isinstance(description, str | None)
        or not isinstance(parameters, dict | None)
        or not isinstance(strict, bool | None)
    ):
        raise Elsewhere("a tool's function has fields of other types")
    made: dict[str, Any] = {"name": name, "description": description, "parameters": parameters}
    if strict is not None:
        made["strict"] = strict
    return Tool(type="function", function=made)


def message(raw: msgspec.Raw | bytes, *, parts: bool) -> dict[str, Any]:
    """A message as a template gets it. `parts`: its content as a list of parts. Raises `Elsewhere`."""
    given = _message(raw)
    role, content = given.get("role"), given.get("content")
    if role not in _ROLES or not isinstance(content, str | list | None):
        raise Elsewhere("a message has another role, or content of another type")
    if role == "developer" and given.get("tools") is not None:
        raise Elsewhere("a developer message has tools")
    texts = _texts(role, content, parts=parts)
    made: dict[str, Any] = {"role": role}
    if parts and role != "tool":
        made["content"] = [{"type": "text", "text": text} for text in texts]
    else:
        made["content"] = "\n".join(texts if parts else filter(None, texts))
    if role == "assistant":
        _answer(given, made)
    elif role == "tool" and "tool_call_id" in given:
        made["tool_call_id"] = given["tool_call_id"]
    if isinstance(given.get("name"), str):
        made["name"] = given["name"]
    if isinstance(given.get("task"), str):
        made["task"] = given["task"]
    return made


def _answer(given: dict[str, Any], made: dict[str, Any]) -> None:
    calls = given.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            raise Elsewhere("tool_calls is no list")
        if calls:
            made["tool_calls"] = [_call(call) for call in calls]
    reasoning = given.get("reasoning")
    if reasoning is None:
        reasoning = given.get("reasoning_content")
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise Elsewhere("a message's reasoning is no text")
        made["reasoning"] = made["reasoning_content"] = reasoning


def _texts(role: str, content: str | list[Any] | None, *, parts: bool) -> list[str]:
    if content is None:
        return []
    texts = []
    for part in [content] if isinstance(content, str) else content:
        if isinstance(part, str):
            text: object = part
        elif isinstance(part, dict) and part.get("type") in _SKIPPED_WHEN_EMPTY:
            text = part.get(part["type"])
            if parts and part.keys() - {"type", "text"}:
                # A template that takes parts may read them.
                raise Elsewhere("a part of a message has further fields")
        else:
            raise Elsewhere("a part of a message is no text")
        if text is None:
            continue
        if not isinstance(text, str):
            raise Elsewhere("a part of a message is no text")
        if role == "system" and text.startswith(_BILLING):
            text = text.partition("\n")[2]
            if not text:
                continue
        texts.append(text)
    return texts


def _call(call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or call.get("type", "function") != "function" or not isinstance(function, dict):
        raise Elsewhere("a tool call is no function")
    if function.keys() - {"name", "arguments"}:
        raise Elsewhere("a tool call's function has further fields")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments:
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = {}
    # In the order of the engine's own types, which templates that write the whole call show.
    made: dict[str, Any] = {"id": call["id"]} if "id" in call else {}
    made["function"] = {"arguments": arguments if isinstance(arguments, dict) else {}}
    if "name" in function:
        made["function"]["name"] = function["name"]
    return {**made, **{name: value for name, value in call.items() if name not in made}}


def arranged(messages: Sequence[dict[str, Any]], template: Template) -> list[dict[str, Any]]:
    """Messages in the order and with the roles in which the template gets them."""
    if template.developer or all(each["role"] != "developer" for each in messages):
        return list(messages)
    told = [{**each, "role": "system"} if each["role"] == "developer" else each for each in messages]
    systems = [at for at, each in enumerate(told) if each["role"] == "system"]
    if systems == [0]:
        return told
    contents = []
    for at in systems:
        content = told[at]["content"]
        text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
        if text:
            contents.append(text)
    others = [each for each in told if each["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(contents)}, *others]
