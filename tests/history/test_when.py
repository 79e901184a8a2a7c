"""Moments as people write them."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane.services.history.when import read_as, resolved, when
from kvplane.services.protocol.errors import BadRequest

NOW = datetime(2026, 3, 1, 1, 30, tzinfo=timezone(timedelta(hours=2)))
"""It is still February in UTC."""


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("5", 5), (" 12345 ", 12345), ("12,345", 12345), ("20260131", 20260131),
        ("now", "2026-02-28T23:30:00"), ("today", "2026-02-28T00:00:00"), ("Yesterday", "2026-02-27T00:00:00"),
        ("10m", "2026-02-28T23:20:00"), ("10 min", "2026-02-28T23:20:00"), ("2h", "2026-02-28T21:30:00"),
        ("2h ago", "2026-02-28T21:30:00"), ("-2h", "2026-02-28T21:30:00"), ("1h30m", "2026-02-28T22:00:00"),
        ("1.5h", "2026-02-28T22:00:00"), ("3d", "2026-02-25T23:30:00"), ("2w", "2026-02-14T23:30:00"),
        ("45s", "2026-02-28T23:29:15"),
        ("2026-01-31", "2026-01-31T00:00:00"), ("2026-01-31T12:00", "2026-01-31T12:00:00"),
        ("2026-01-31 12:00:00.5", "2026-01-31T12:00:00.500000"), ("2026-01-31T12:00:00Z", "2026-01-31T12:00:00"),
        ("2026-01-31T12:00:00+02:00", "2026-01-31T10:00:00"), ("2026-01-31 12:00:00.123 UTC", "2026-01-31T12:00:00.123000"),
    ],
)  # fmt: skip
def test_what_is_written_is_what_is_meant(text: str, moment: int | str) -> None:
    found = when(text, NOW)
    assert (found.isoformat() if isinstance(found, datetime) else found) == moment


@pytest.mark.parametrize(
    "text", ["", "lately", "10x", "m", "1,2", "2026-13-01", "99999999999d", "999999999w", "-5", "5.5", "٣", "٣h", "0x10",
             "9999-12-31T23:59:59-01:00", "10m 5", "1" * 21, "now or never", "12:"],
)  # fmt: skip
def test_what_can_not_be_read_says_what_can(text: str) -> None:
    with pytest.raises(BadRequest, match="write a sequence, a time such as"):
        when(text, NOW)


@given(st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1)))  # noqa: DTZ001 - UTC without a zone, as in the history
def test_what_kvplane_shows_can_be_asked_for(shown_time: datetime) -> None:
    shown = f"{shown_time:%Y-%m-%d %H:%M:%S.%f}"[:-3] + " UTC"
    found = when(shown, NOW)
    assert isinstance(found, datetime)
    assert timedelta(0) <= shown_time - found < timedelta(milliseconds=1)
    assert when(shown_time.isoformat(), NOW) == shown_time
    assert when(shown_time.replace(tzinfo=UTC).isoformat(), NOW) == shown_time


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2026-01-31T12:00 local", "2026-01-31T11:00:00+00:00"), ("2026-07-31 12:00local", "2026-07-31T10:00:00+00:00"),
        ("2026-01-31 Local", "2026-01-30T23:00:00+00:00"), ("today local", "2026-02-28T23:00:00+00:00"),
        ("yesterday  LOCAL", "2026-02-27T23:00:00+00:00"),
        # What is no time of a zone's stays, and is refused where it is read.
        ("local", "local"), ("5 local", "5 local"), ("2h local", "2h local"),
        ("2026-01-31T12:00Z local", "2026-01-31T12:00Z local"),
        ("2026-01-31T12:00", "2026-01-31T12:00"),
    ],
)  # fmt: skip
def test_local_is_the_zone_of_who_asks(monkeypatch: pytest.MonkeyPatch, text: str, utc: str) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert resolved(text, datetime(2026, 3, 1, 0, 30)) == utc  # noqa: DTZ001 - what the clock shows
    finally:
        monkeypatch.undo()
        time.tzset()
    if utc == text and "local" in text:
        with pytest.raises(BadRequest):
            when(text, NOW)


@pytest.mark.parametrize("text", ["2026-01-31T12:00", "2026-01-31", "yesterday", "20260131T1200"])
def test_a_time_of_no_zone_says_that_it_is_utc(text: str) -> None:
    assert read_as(text, NOW).endswith(" UTC, since no zone is given; write +02:00 or local behind it for another")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2026-01-31T12:00+02:00", "2026-01-31 10:00:00 UTC"), ("2026-01-31T12:00Z", "2026-01-31 12:00:00 UTC"),
        ("2026-01-31 12:00 UTC", "2026-01-31 12:00:00 UTC"), ("2h", "2026-02-28 21:30:00 UTC"),
        ("now", "2026-02-28 23:30:00 UTC"),
        ("5", ""),
    ],
)  # fmt: skip
def test_a_time_of_a_zone_says_only_when_it_is(text: str, said: str) -> None:
    assert read_as(text, NOW) == said
