"""Whether a model's tokens are found here as its engines find them. Pure.

Before a model is used: its template and tokenizer are tried with conversations that are meant to break what this package relies
on (`tried`), and an engine is asked about `questions`. While it is used: `Evidence` counts what answers say of the prompt's
length, and what an engine says to a few of the real requests.
"""

from __future__ import annotations

import json
import random
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from kvplane.services.tokens.conversation import chat
from kvplane.services.tokens.errors import Elsewhere

if TYPE_CHECKING:
    from kvplane.services.tokens.model import Model

QUESTIONS = 32
"""Requests that an engine is asked about before its model is believed."""
CONVERSATIONS = 60
EARLY, EARLY_EACH, LATER_EACH = 200, 10, 1000
"""Of the first so many requests an engine is asked about one in so many, later about one in so many."""
RECENT, MOST_WRONG = 100, 3
"""So many of so many last requests may have had another length than was thought; with more the model falls back."""
_TEXTS = (
    "Hello", "  spaces before and after  ", "line\n\nline\n", "", "caf\u00e9 \u4f60\u597d \U0001f600 e\u0301",
    '{"json": [1, 2]}',
    "```python\nprint('x')\n```", "<think>not thought</think>", "</s> <s> [INST]", "a" * 300, "\ttabs\t", "</tool_call>",
    "1234567890",    "\u200bzero width", "<b>&amp;\"quotes\"'</b>",
)  # fmt: skip


def _function(name: str, drawn: random.Random) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {"path": {"type": "string", "description": drawn.choice(_TEXTS)}, "n": {"type": "integer"}},
        "required": ["path"],
    }
    found: dict[str, Any] = {"parameters": parameters, "name": name}
    if drawn.random() < 0.8:
        found["description"] = drawn.choice(_TEXTS)
    return {"function": found, "type": "function"}


def conversation(drawn: random.Random, *, turns: int) -> dict[str, Any]:
    """A request that a client could send, with whatever templates treat in ways of their own."""

    def content() -> object:
        text = " ".join(drawn.choices(_TEXTS, k=drawn.randint(1, 3)))
        return (
            [{"type": "text", "text": text}, {"type": "text", "text": drawn.choice(_TEXTS)}]
            if drawn.random() < 0.15
            else text
        )

    tools = drawn.random() < 0.6
    thinks = drawn.random() < 0.5
    messages: list[dict[str, Any]] = []
    if drawn.random() < 0.7:
        messages.append({"role": "system", "content": content()})
    for turn in range(turns):
        messages.append({"role": "user", "content": content()})
        calls = 0
        while tools and drawn.random() < 0.6 and calls < 4:
            calls += 1
            several = drawn.randint(1, 2)
            answer: dict[str, Any] = {
                "role": "assistant", "content": drawn.choice((None, "", drawn.choice(_TEXTS))),
                "tool_calls": [
                    {"id": f"call-{turn}-{calls}-{each}", "type": "function",
                     "function": {"name": "read", "arguments": json.dumps({"path": drawn.choice(_TEXTS), "n": each})}}
                    for each in range(several)
                ],
            }  # fmt: skip
            if thinks:
                answer["reasoning_content"] = drawn.choice(_TEXTS)
            messages.append(answer)
            messages.extend(
                {"role": "tool", "tool_call_id": f"call-{turn}-{calls}-{each}", "content": content()}
                for each in range(several)
            )
        if turn < turns - 1:
            answer = {"role": "assistant", "content": drawn.choice(_TEXTS)}
            if thinks:
                answer["reasoning_content"] = drawn.choice(_TEXTS)
            messages.append(answer)
        elif not calls:
            break
    body: dict[str, Any] = {"messages": messages}
    if tools:
        body["tools"] = [_function(name, drawn) for name in ("read", "write")]
    if drawn.random() < 0.2:
        body["chat_template_kwargs"] = {"enable_thinking": drawn.random() < 0.5}
    if drawn.random() < 0.1:
        body["reasoning_effort"] = drawn.choice(("low", "high"))
    return body


def questions(model: str) -> list[tuple[str, bytes]]:
    """Paths and bodies that an engine is asked about."""
    drawn = random.Random(7)  # noqa: S311 - the same ones each time
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", conversation(drawn, turns=1 + at % 4)) for at in range(QUESTIONS)
    ]
    asked += [("/v1/completions", {"prompt": text + "\n" + text}) for text in _TEXTS[:4]]
    return [
        (path, json.dumps({"model": model, "max_tokens": 1, **body}, ensure_ascii=at % 2 == 0).encode())
        for at, (path, body) in enumerate(asked)
    ]


def tried(model: Model) -> None:
    """Find out where the model's texts may be cut, and of which roles new messages may be rendered alone."""
    if model.template is None or model.template.by_date:
        model.tokenizer.choose([])
        return
    drawn = random.Random(11)  # noqa: S311 - the same ones each time
    asked = [chat(msgspec.json.encode(conversation(drawn, turns=1 + at % 5))) for at in range(CONVERSATIONS)]
    samples, broken = [], set()
    for each in asked:
        try:
            text, more = model.parts_of(each)
        except Elsewhere:
            continue
        samples.append(text)
        broken |= more
    model.tokenizer.choose(samples)
    useful = {"assistant", "tool", "user"} - broken
    model.by_new_messages = frozenset(useful) if {"assistant", "tool"} <= useful else frozenset()


class Evidence:
    """What answers tell of a model in use."""

    def __init__(self) -> None:
        self.requests = 0
        self._wrong: deque[bool] = deque(maxlen=RECENT)

    def ask(self) -> bool:
        """Whether an engine is asked about the next request as well."""
        self.requests += 1
        return self.requests % (EARLY_EACH if self.requests <= EARLY else LATER_EACH) == 1

    def told(self, thought: int, prompt_tokens: int) -> bool:
        """An engine has counted a prompt. True: too many have had another length than was thought."""
        if prompt_tokens >= 0:
            self._wrong.append(prompt_tokens != thought)
        return sum(self._wrong) > MOST_WRONG
