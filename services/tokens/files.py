"""A model's files: `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja`.

As the Hugging Face hub has them, in a folder or in its cache on this machine. Nothing is fetched.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import msgspec

from kvplane.services.tokens import proof
from kvplane.services.tokens.errors import Unusable
from kvplane.services.tokens.model import MEMORY_BYTES, Model
from kvplane.services.tokens.template import Template
from kvplane.services.tokens.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"
CONFIGURATION_BYTES = 16 << 20
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}").fullmatch
_SPECIAL = re.compile(r"[a-z]+_token").fullmatch


def load(folder: Path, memory: int = MEMORY_BYTES) -> Model:
    """The model of a folder, tried (`proof`): takes a second. Raises `Unusable`."""
    if not folder.is_dir():
        raise Unusable(f"there is no folder {folder}")
    if not (folder / TOKENIZER).is_file():
        raise Unusable(
            f"{folder} has no {TOKENIZER}: only tokenizers of that form are used here, for others engines are asked"
        )
    configuration = {**_read(folder / "special_tokens_map.json"), **_read(folder / "tokenizer_config.json")}
    text = _template(folder, configuration)
    special = {name: _content(value) for name, value in configuration.items() if _SPECIAL(name) and _content(value)}
    model = Model(Template(text, special) if text else None, Tokenizer(folder / TOKENIZER), memory)
    proof.tried(model)
    return model


def in_hub_cache(name: str) -> Path | None:
    """The folder of a model of this name in the hub's cache, its newest snapshot; none if it is not there."""
    if not _HUB_NAME(name):
        return None
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    model = cache / ("models--" + name.replace("/", "--"))
    try:
        snapshots = [each for each in (model / "snapshots").iterdir() if (each / TOKENIZER).is_file()]
        return max(snapshots, key=lambda each: each.stat().st_mtime, default=None)
    except OSError:
        return None


def _read(file: Path) -> dict[str, Any]:
    try:
        if not file.is_file():
            return {}
        if file.stat().st_size > CONFIGURATION_BYTES:
            raise Unusable(f"{file} has more than {CONFIGURATION_BYTES:,} bytes")
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise Unusable(f"{file} can't be read: {error.strerror or error}") from None
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise Unusable(f"{file} is no JSON object: {error}") from None


def _template(folder: Path, configuration: dict[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise Unusable(f"{file} can't be read: {error}") from None
    found = configuration.get("chat_template")
    if isinstance(found, str):
        return found
    if found is not None:
        # Which of them is taken depends on the request's tools and on settings of the engine.
        raise Unusable(f"{folder} has several chat templates: only one is used here")
    return ""


def _content(value: object) -> str:
    """A special token is its text, or an object with it."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""
