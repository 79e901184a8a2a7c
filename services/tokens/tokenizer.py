"""A model's tokenizer, and where its texts may be cut.

Ids are found by `fastokens`, in a hundredth of the time that `tokenizers` takes, where it knows the kind of tokenizer and has
found the same ids for everything that it was tried with; else by `tokenizers`.

A text that is cut right before a special token has the ids of its parts, one after the other, if that token is taken as it
stands: not after normalisation, not with the space before it, not as part of a word, and no other one begins earlier and
reaches into it. Which tokens are such is read from the file (`_cuts`) and tried with texts that are meant to break it
(`choose`): some tokenizers look at what came before.
"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

from fastokens import Tokenizer as Fast
from tokenizers import Tokenizer as Backend

from kvplane.services.tokens.errors import Unusable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LONGEST_FILE = 256 << 20
MOST_CUTS = 8
"""Each costs a search through the text."""
SHORTEST_PIECE = 256
"""Bytes: so long is a part at least, so that not every short message is remembered."""
TRIALS = 120
_TRICKY = (
    " ", "  ", "\n", "\n\n", "\t", "a", "word", " word", "Word's", "e\u0301", "\u00e9", "\u4f60\u597d", "\U0001f600", "1234567",
    "-->", "<", "<|", "|>", "▁", "\u200d", "\u00a0", ".", "…", "ﬁ", "İ", "\r\n", "<unk>", "</s>",
)  # fmt: skip


class Tokenizer:
    """The tokenizer of a `tokenizer.json`. Raises `Unusable`."""

    def __init__(self, file: Path) -> None:
        text = _text(file)
        try:
            self._backend = Backend.from_str(text)
            raw = json.loads(text)
        except Exception as error:  # noqa: BLE001 - the library raises plain exceptions
            raise Unusable(f"{file} is no file of the tokenizers library: {error}") from None
        self._fast = _fast(text)
        self._backend.no_truncation()
        self._backend.no_padding()
        if (raw.get("model") or {}).get("dropout"):
            raise Unusable(f"{file} has dropout: its tokens are random")
        self._candidates, self._special = _cuts(raw)
        self.cuts: tuple[bytes, ...] = ()
        """Texts of the tokens before which a text may be cut; none until `choose`."""
        before = self._backend.encode("", add_special_tokens=True).ids
        probe = self._backend.encode("a", add_special_tokens=True).ids
        alone = self._backend.encode("a", add_special_tokens=False).ids
        self.begin = list(before) if probe == [*before, *alone] else None
        """What a prompt as text begins with (completions); none if something else is added."""

    def choose(self, samples: Sequence[str]) -> None:
        """Try the faster library, and take as cuts the safe tokens that are in the samples: the most frequent ones."""
        if self._fast is not None and not self._alike(samples):
            self._fast = None
        counts = {cut: sum(text.count(cut) for text in samples) for cut in self._candidates}
        found = sorted((cut for cut, count in counts.items() if count), key=lambda cut: (-counts[cut], cut))[:MOST_CUTS]
        self.cuts = tuple(
            cut.encode()
            for cut in found
            if not any(_reaches_into(other, cut) for other in self._special) and self._tried(cut, samples)
        )

    def _alike(self, samples: Sequence[str]) -> bool:
        drawn = random.Random(2)  # noqa: S311 - the same texts each time
        special = self._special[:: max(1, len(self._special) // 32)]
        texts = [
            *samples,
            *("".join(drawn.choices((*_TRICKY, *special), k=drawn.randint(1, 40))) for _ in range(TRIALS)),
        ]
        return self.ids(texts) == self._slow_ids(texts)

    def _tried(self, cut: str, samples: Sequence[str]) -> bool:
        drawn = random.Random(1)  # noqa: S311 - the same texts each time
        texts = [text for text in samples if cut in text][:8]
        for trial in range(TRIALS):
            before, after = ("".join(drawn.choices((*_TRICKY, cut), k=drawn.randint(0, 6))) for _ in range(2))
            if trial < len(texts):
                text = texts[trial]
                half = text.find(cut, len(text) // 2)
                at = half if half >= 0 else text.rfind(cut)
                before, after = text[:at], text[at + len(cut) :]
            whole = self._backend.encode(before + cut + after, add_special_tokens=False).ids
            if whole != [
                *self._backend.encode(before, add_special_tokens=False).ids,
                *self._backend.encode(cut + after, add_special_tokens=False).ids,
            ]:
                return False
        return True

    def pieces(self, text: bytes) -> list[int]:
        """Where a text is cut: the ends of its pieces, in bytes, the last one its length.

        A cut depends on nothing after it, so texts that begin alike are cut alike.
        """
        places: list[int] = []
        for cut in self.cuts:
            at = text.find(cut, 1)
            while at >= 0:
                places.append(at)
                at = text.find(cut, at + len(cut))
        places.sort()
        ends, last = [], 0
        for place in places:
            if place - last >= SHORTEST_PIECE:
                ends.append(place)
                last = place
        ends.append(len(text))
        return ends

    def ids(self, pieces: Sequence[str]) -> list[list[int]]:
        """Token ids of each piece. Raises `Unusable` for what is no text (lone surrogates)."""
        if self._fast is None:
            return self._slow_ids(pieces)
        try:
            return [self._fast.encode(piece).ids for piece in pieces]
        except (TypeError, ValueError, RuntimeError) as error:
            raise Unusable(f"the prompt can't be tokenised here: {error}") from None

    def _slow_ids(self, pieces: Sequence[str]) -> list[list[int]]:
        try:
            return [each.ids for each in self._backend.encode_batch_fast(list(pieces), add_special_tokens=False)]
        except (TypeError, ValueError) as error:
            raise Unusable(f"the prompt is no text: {error}") from None


def _fast(text: str) -> Fast | None:
    """The faster library's tokenizer; none if it does not know the kind."""
    try:
        return Fast.from_json_str(text)
    except Exception:  # noqa: BLE001 - whatever it lacks, the other one is there
        return None


def _text(file: Path) -> str:
    try:
        size = file.stat().st_size
        text = file.read_text(encoding="utf-8") if size <= LONGEST_FILE else ""
    except (OSError, UnicodeError) as error:
        raise Unusable(f"{file} can't be read: {error}") from None
    if not text:
        raise Unusable(f"{file} has {size:,} bytes; it must have some, and the limit is {LONGEST_FILE:,}")
    return text


def _cuts(raw: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Special tokens of a file that are taken as they stand; and all of its special tokens."""
    added = [each for each in raw.get("added_tokens") or [] if each.get("content")]
    alone = [
        each["content"]
        for each in added
        if not each.get("normalized", True) and not each.get("lstrip") and not each.get("single_word")
    ]
    return alone, [each["content"] for each in added]


def _reaches_into(other: str, content: str) -> bool:
    """Whether another token, found further left, can take the beginning of this one."""
    return other != content and (content in other or any(content.startswith(other[at:]) for at in range(1, len(other))))
