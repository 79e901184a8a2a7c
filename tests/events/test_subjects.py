"""Names in subjects: any printable name, one token each, no way out of one's place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane.events.errors import BadName
from kvplane.events.subjects import Place, check_fleet, name_of, place_of, subject, token

printable = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=128).filter(str.isprintable)


@given(printable)
def test_every_printable_name_comes_back(name: str) -> None:
    assert name_of(token(name)) == name


@given(printable)
def test_a_token_is_one_plain_word(name: str) -> None:
    assert not set(token(name)) & set(".*> \t\r\n")
    assert token(name).isascii()


@given(printable, st.sampled_from(["node", "cache", "session", "access"]))
def test_a_subject_leads_back_to_its_topic_and_name(name: str, topic: str) -> None:
    assert place_of("f", subject("f", topic, name)) == Place(topic, name)  # type: ignore[arg-type]


@given(st.text(max_size=40))
def test_a_token_that_is_read_is_the_only_one_for_its_name(encoded: str) -> None:
    """Two subjects for one node would be two sequences of expectations."""
    try:
        name = name_of(encoded)
    except BadName:
        return
    assert token(name) == encoded


@pytest.mark.parametrize("encoded", ["%61", "a%2f", "a.b", "*", ">", "", "%ff", "a b", "%00", "%F0%9F"])
def test_other_spellings_are_refused(encoded: str) -> None:
    with pytest.raises(BadName):
        name_of(encoded)


@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb", "a\x00", "\ud800", "\u200b"])
def test_names_that_nobody_can_read_are_refused(name: str) -> None:
    with pytest.raises(BadName, match="print|empty|limit"):
        token(name)


@pytest.mark.parametrize(
    "wrong",
    ["kv.g.node.a", "kv.f.node", "kv.f.node.a.b", "kv.f.control.x", "kv.f.pulse.a", "kv.f.route", "f.node.a", "", "kv"],
)
def test_what_is_not_on_the_fleets_log_is_told_apart(wrong: str) -> None:
    with pytest.raises(BadName):
        place_of("f", wrong)


@pytest.mark.parametrize("fleet", ["", "a.b", "a b", "a*", ">", "ü", "x" * 65])
def test_a_fleets_name_is_plain(fleet: str) -> None:
    with pytest.raises(BadName, match="fleet name"):
        check_fleet(fleet)
