from hypothesis import given
from hypothesis import strategies as st

from daemon.services.crashes import CrashLoop


def test_backs_off_and_gives_up() -> None:
    loop = CrashLoop(limit=4, first=2.0, longest=5.0, stable=600.0)
    assert [loop.after(1.0) for _ in range(4)] == [2.0, 4.0, 5.0, None]


def test_a_healthy_run_forgives() -> None:
    loop = CrashLoop(limit=2, first=2.0)
    assert loop.after(1.0) == 2.0
    assert loop.after(700.0) == 2.0
    assert loop.after(1.0) is None


@given(st.lists(st.floats(0, 1e6), max_size=200), st.integers(1, 3000), st.floats(0.01, 10), st.floats(10, 1000))
def test_waits_grow_within_bounds_and_short_runs_end_it(
    lives: list[float], limit: int, first: float, longest: float
) -> None:
    loop = CrashLoop(limit=limit, first=first, longest=longest, stable=600.0)
    row, before = 0, 0.0
    for lived in lives:
        row = 1 if lived >= 600.0 else row + 1
        delay = loop.after(lived)
        assert (delay is None) == (row >= limit)
        if delay is None:
            break
        assert first <= delay <= longest
        assert row == 1 or delay >= before
        before = delay
