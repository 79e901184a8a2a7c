"""How policies are written: one form, everywhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane.services.protocol.errors import BadRequest
from kvplane.services.routing.choice import parse

names = st.from_regex(r"[a-z_][a-z_0-9.]{0,12}", fullmatch=True)
policies = st.one_of(names, st.builds("{}:{}".format, names, names))
parameters = st.dictionaries(names, st.floats(allow_nan=False, allow_infinity=False), max_size=4)


@given(policies, parameters, st.integers(0, 4))
def test_what_is_written_is_read_in_one_word_or_apart(policy: str, given_: dict[str, float], apart: int) -> None:
    pairs = [f"{name}={value!r}" for name, value in given_.items()]
    head, more = pairs[apart:], pairs[:apart]
    text = f"{policy}:{','.join(head)}" if head else policy
    choice = parse(text, *more)
    assert (choice.policy, choice.parameters) == (policy, given_)
    assert choice.text == " ".join([text, *more])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("ttft:a=1,b",), "'b' in 'ttft:a=1,b' is no parameter; write name=number, as in ttft:crowd_weight=4"),
        (("ttft:a=one",), "'a=one' in 'ttft:a=one' is no parameter"),
        (("ttft:=1",), "'=1' in 'ttft:=1' is no parameter"),
        (("ttft:a=inf",), "'a=inf' in 'ttft:a=inf' is no parameter"),
        (("ttft:a=1,",), "'' in 'ttft:a=1,' is no parameter"),
        (("ttft:a=1,a=2",), "'ttft:a=1,a=2' gives a twice"),
        (("ttft:a=1", "a=2"), "'ttft:a=1 a=2' gives a twice"),
        (("ttft", "fast"), "'fast' in 'ttft fast' is no parameter"),
        (("ttft", ""), "'' in 'ttft ' is no parameter"),
    ],
)
def test_what_is_no_parameter_is_told_where_it_stands(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(BadRequest) as error:
        parse(*words)
    assert str(error.value).startswith(says)
