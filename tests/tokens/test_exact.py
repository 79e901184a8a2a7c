"""Tokens that are found from what is new are those of the whole text, whatever became of a conversation in between."""

from __future__ import annotations

import copy
import json
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplane.events.hashing import block_hashes
from kvplane.services.tokens.conversation import chat
from kvplane.services.tokens.files import load
from kvplane.services.tokens.model import CHECKED, Model
from kvplane.services.tokens.prefixes import Hasher
from tests.support.reference_tokens import COUNTS, FORGETS, KINDS, PLAIN, TEMPLATES, Reference, folder_of

if TYPE_CHECKING:
    from kvplane.services.tokens.model import Known

TEXTS = (
    "Hi", "", " ", "a\n\n", "the other thing is there " * 12, "x" * 700, "caf\u00e9 \u4f60\u597d \U0001f600",
    "<|im_start|>user\nfake", "half <|im_", "start|> half", '{"a": "\\u00e9"}', "<think>", "\u200b",
)  # fmt: skip
HASHERS = (Hasher(4), Hasher(16), Hasher(16, salt="s"), Hasher(16, lora="l"))
TOOLS = [{"type": "function", "function": {"name": "look", "description": "é", "parameters": {"type": "object"}}}]


@cache
def _files() -> Path:
    return Path(tempfile.mkdtemp(prefix="kvplane-tokens-"))


@cache
def tried(kind: str, template: str) -> tuple[Model, Reference]:
    folder = folder_of(_files(), kind, TEMPLATES[template])
    return load(folder), Reference(folder)


def grown(drawn: random.Random, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation after somebody has done something."""
    more = copy.deepcopy(messages)
    what = drawn.random()
    if not more or more[-1]["role"] == "assistant":
        return [*more, {"role": "user", "content": drawn.choice(TEXTS)}]
    if what < 0.1 and len(more) > 2:
        return more[: drawn.randint(1, len(more) - 1)]
    if what < 0.15:
        more[drawn.randrange(len(more))]["content"] = drawn.choice(TEXTS)
        return more
    if what < 0.18:
        return [*more, {"role": "system", "content": drawn.choice(TEXTS)}]
    answer: dict[str, Any] = {"role": "assistant", "content": drawn.choice(TEXTS)}
    if drawn.random() < 0.4:
        answer["reasoning_content"] = drawn.choice(TEXTS)
    if what < 0.6:
        calls = drawn.randint(1, 2)
        arguments = json.dumps({"of": drawn.choice(TEXTS)})
        answer["tool_calls"] = [
            {"id": f"c{at}", "type": "function", "function": {"name": "look", "arguments": arguments}}
            for at in range(calls)
        ]
        results = [{"role": "tool", "tool_call_id": f"c{at}", "content": drawn.choice(TEXTS)} for at in range(calls)]
        return [*more, answer, *results]
    return [*more, answer, {"role": "user", "content": drawn.choice(TEXTS)}]


def agree(known: Known, ids: list[int], hasher: Hasher) -> None:
    assert known.tokens == len(ids)
    assert known.hashes == block_hashes(ids, hasher.block_size, lora=hasher.lora, salt=hasher.salt)


@given(
    st.integers(min_value=0),
    st.sampled_from([("words", "plain"), ("words", "forgets"), ("words", "counts"), ("deepseek", "forgets")]),
    st.sampled_from((3_000, 1 << 20)),
)
@settings(max_examples=20, deadline=None)
def test_tokens_are_those_of_the_whole_text(seed: int, what: tuple[str, str], memory: int) -> None:
    """Conversations that go on, fork, are changed behind their end, and are forgotten for want of memory."""
    drawn = random.Random(seed)
    known_model, reference = tried(*what)
    model = Model(known_model.template, known_model.tokenizer, memory)
    model.by_new_messages = known_model.by_new_messages
    conversations: list[list[dict[str, Any]]] = [[{"role": "system", "content": drawn.choice(TEXTS)}], []]
    for _ in range(25):
        at = drawn.randrange(len(conversations))
        conversations[at] = messages = grown(drawn, conversations[at])
        if drawn.random() < 0.1:
            conversations.append(messages)
        body: dict[str, Any] = {"model": "m", "messages": messages}
        if at:
            body["tools"] = TOOLS
        if drawn.random() < 0.1:
            body["chat_template_kwargs"] = {"enable_thinking": True}
        hasher = drawn.choice(HASHERS)
        agree(model.now(model.begin_chat(chat(json.dumps(body).encode()), hasher)), reference.ids(body), hasher)
        assert model.held_bytes <= memory
    assert not model.differed


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_prompt_as_text_begins_as_the_tokenizer_begins_it(kind: str) -> None:
    model, reference = tried(kind, "forgets")
    for text in (*TEXTS[:5], "<|im_start|>" + "the other thing " * 60 + "<|im_end|>" + "and " * 99):
        for _ in range(2):
            agree(model.now(model.begin_text(text, HASHERS[0])), reference.ids({"prompt": text}), HASHERS[0])


def test_of_a_conversation_that_goes_on_only_what_is_new_is_tokenised() -> None:
    known_model, _ = tried("deepseek", "forgets")
    model = Model(known_model.template, known_model.tokenizer)
    model.by_new_messages = known_model.by_new_messages
    messages: list[dict[str, Any]] = [{"role": "user", "content": "there " * 4_000}]
    sizes = []
    for _ in range(6):
        work = model.begin_chat(chat(json.dumps({"messages": messages}).encode()), HASHERS[1])
        sizes.append(work.size)
        model.now(work)
        messages += [
            {"role": "assistant", "content": "so " * 200},
            {"role": "tool", "tool_call_id": "c", "content": "so " * 100},
        ]
    assert sizes[0] > 24_000
    assert max(sizes[1:]) < 1_500
    # And no more than that is rendered, but for the first.
    assert model.whole == 1


def test_what_two_conversations_begin_with_is_known_from_the_first() -> None:
    known_model, _ = tried("deepseek", "forgets")
    model = Model(known_model.template, known_model.tokenizer)
    sizes = []
    for question in ("one", "two"):
        messages = [{"role": "system", "content": "there " * 4_000}, {"role": "user", "content": question}]
        work = model.begin_chat(chat(json.dumps({"messages": messages}).encode()), HASHERS[1])
        sizes.append(work.size)
        model.now(work)
    assert sizes[0] > 24_000
    assert sizes[1] < 300


@pytest.mark.parametrize(
    ("template", "roles"), [(PLAIN, {"assistant", "tool", "user"}), (FORGETS, {"assistant", "tool"}), (COUNTS, set())]
)
def test_what_a_template_looks_back_at_is_found_out(template: str, roles: set[str]) -> None:
    """Messages that change what comes before them are never rendered without it."""
    name = next(name for name, text in TEMPLATES.items() if text == template)
    assert tried("words", name)[0].by_new_messages == roles


def test_a_template_that_deceives_is_noticed_in_use() -> None:
    """It behaves with all that it is tried with: conversations so long are not among them."""
    deceiving = PLAIN.replace("{{- '<s>' -}}", "{{- '<s>' -}}{%- if messages | length > 60 %}{{- 'x' }}{%- endif %}")
    folder = folder_of(_files(), "words", deceiving)
    model, reference = load(folder), Reference(folder)
    assert model.by_new_messages == {"assistant", "tool", "user"}
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
    wrong = []
    for _ in range(2 * CHECKED):
        body = {"messages": messages}
        known = model.now(model.begin_chat(chat(json.dumps(body).encode()), HASHERS[0]))
        wrong.append(known.tokens != len(reference.ids(body)))
        messages = [*messages, {"role": "assistant", "content": "a"}, {"role": "user", "content": "so"}]
    assert 0 < sum(wrong) < CHECKED
    assert not any(wrong[CHECKED + 1 :])
    assert model.differed == 1
