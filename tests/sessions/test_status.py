from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from sessions.status import SessionStatus, duration, render, same_but_time, size

NOW = datetime(2026, 11, 23, 20, 31, 5, tzinfo=UTC)


def test_it_says_all_that_matters() -> None:
    trouble = [f"t{n}" for n in range(12)]
    status = SessionStatus(
        "zwx", "training, 5 of 10", 3, 3, 2, waits=["one"], models=["m"], trouble=trouble, hints=["Blurred: a.jpg."]
    )
    text = render(status, NOW, timedelta(minutes=10))
    assert "zwx" in text.splitlines()[0]
    assert "training, 5 of 10" in text
    assert "3: 3 cropped, 2 captioned" in text
    assert "t7" in text
    assert "t8" not in text
    assert "and 4 more" in text
    assert "2026-11-23 20:31:05 UTC; stale if older than 20:41" in text
    assert "Look at    Blurred: a.jpg." in text
    assert "Notes" not in text


def test_only_the_time_may_differ() -> None:
    status = SessionStatus("zwx", "idle")
    first = render(status, NOW, timedelta(minutes=10))
    later = render(status, NOW + timedelta(hours=1), timedelta(minutes=10))
    other = render(SessionStatus("zwx", "training"), NOW, timedelta(minutes=10))
    assert first != later
    assert same_but_time(first, later)
    assert not same_but_time(first, other)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (11100, "3 h 5 min"), (7200, "2 h")],
)
def test_duration(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(("count", "said"), [(12, "12 bytes"), (2_130_000_000, "2.1 GB"), (1500, "1.5 kB")])
def test_size(count: int, said: str) -> None:
    assert size(count) == said
