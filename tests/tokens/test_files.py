"""A model's files as they come: what can't be used is said with a reason."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers

from kvplane.services.tokens.errors import Unusable
from kvplane.services.tokens.files import in_hub_cache, load
from kvplane.services.tokens.tokenizer import Tokenizer as Ours
from tests.support.reference_tokens import PLAIN, SPECIAL, folder_of

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path, "words", PLAIN)


def test_what_is_wrong_with_files_is_said(folder: Path) -> None:
    with pytest.raises(Unusable, match="there is no folder"):
        load(folder / "none")
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(Unusable, match="no Jinja"):
        load(folder)
    (folder / "chat_template.jinja").unlink()
    several = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    with pytest.raises(Unusable, match="several chat templates"):
        load(folder)
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(Unusable, match="no JSON object"):
        load(folder)
    (folder / "tokenizer_config.json").unlink()
    assert load(folder).template is None
    (folder / "tokenizer.json").write_text("")
    with pytest.raises(Unusable, match="0 bytes"):
        load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(Unusable, match=r"no tokenizer\.json"):
        load(folder)


def test_the_hubs_cache_is_looked_through_by_names_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert in_hub_cache("some/model") is None
    (snapshot / "tokenizer.json").write_text("{}")
    assert in_hub_cache("some/model") == snapshot
    for name in ("some/../some/model", "/etc", "some", "../hub/models--some--model", "", "some/model/x"):
        assert in_hub_cache(name) is None


def _chosen(path: Path, *added: AddedToken) -> set[bytes]:
    made = Tokenizer(models.BPE(vocab={chr(at): at for at in range(32, 127)}, merges=[]))
    made.add_tokens(list(added))
    made.save(str(path))
    ours = Ours(path)
    ours.choose(["".join(f"text {token.content} and {token.content}" for token in added) * 3])
    return set(ours.cuts)


@pytest.mark.parametrize(
    ("added", "chosen"),
    [
        ([AddedToken("<a>", normalized=False)], {b"<a>"}),
        ([AddedToken("<a>", normalized=False, rstrip=True)], {b"<a>"}),
        ([AddedToken("<a>", normalized=True)], set()),
        ([AddedToken("<a>", normalized=False, lstrip=True)], set()),
        ([AddedToken("<a>", normalized=False, single_word=True)], set()),
        # The longer one is found first, and what it begins with reaches into the other.
        ([AddedToken("<a>", normalized=False), AddedToken("x<a>", normalized=False)], {b"x<a>"}),
        ([AddedToken("<a>", normalized=False), AddedToken("z<", normalized=False)], {b"z<"}),
    ],
)
def test_texts_are_cut_only_where_the_parts_have_the_tokens_of_the_whole(
    tmp_path: Path, added: list[AddedToken], chosen: set[bytes]
) -> None:
    assert _chosen(tmp_path / "tokenizer.json", *added) == chosen


def test_a_cut_that_breaks_texts_is_found_out_by_trying_it(tmp_path: Path) -> None:
    """Were the file's own word not enough: what is put before a text is put before its parts, too."""
    made = Tokenizer(models.BPE(vocab={chr(at): at for at in range(32, 127)}, merges=[]))
    made.normalizer = normalizers.Prepend("_")
    made.add_tokens([AddedToken("<a>", normalized=True)])
    made.save(str(tmp_path / "tokenizer.json"))
    ours = Ours(tmp_path / "tokenizer.json")
    ours._candidates = ["<a>"]
    ours.choose(["text<a>text<a>"])
    assert ours.cuts == ()


def test_special_tokens_are_cut_before(folder: Path) -> None:
    assert set(load(folder).tokenizer.cuts) <= {text.encode() for text in SPECIAL}
    assert b"<|im_start|>" in load(folder).tokenizer.cuts
