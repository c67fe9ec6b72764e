from __future__ import annotations

import sys
from types import FrameType

from hypothesis import given
from hypothesis import strategies as st

from daemon.index import Fact, absent
from daemon.settle import Movements, Settler


def fact(path: str = "a", size: int = 1) -> Fact:
    return Fact(path, size, 0, 0)


def test_a_file_that_stands_still_is_due_after_the_settle_time() -> None:
    settler = Settler(2.0)
    assert settler.observe(fact(), 10.0)
    assert settler.next_due(10.5) == 1.5
    assert settler.due(11.9) == []
    assert settler.due(12.0) == [fact()]


def test_the_same_look_does_not_start_the_clock_anew() -> None:
    settler = Settler(2.0)
    settler.observe(fact(), 10.0)
    assert not settler.observe(fact(), 11.5)
    assert settler.due(12.0) == [fact()]


def test_a_change_starts_the_clock_anew() -> None:
    settler = Settler(2.0)
    settler.observe(fact(size=1), 10.0)
    assert settler.observe(fact(size=2), 11.5)
    assert settler.due(12.0) == []
    assert settler.next_due(12.0) == 1.5
    assert settler.due(13.5) == [fact(size=2)]


def test_what_was_due_is_given_once_until_it_is_observed_again() -> None:
    settler = Settler(2.0)
    settler.observe(fact(), 0.0)
    assert settler.due(2.0) == [fact()]
    assert settler.due(99.0) == []
    assert settler.next_due(99.0) is None
    assert len(settler) == 1
    settler.observe(fact(), 100.0)
    assert settler.due(101.0) == []
    assert settler.due(102.0) == [fact()]


def test_a_forgotten_path_is_never_due_and_starts_afresh() -> None:
    settler = Settler(2.0)
    settler.observe(fact(), 0.0)
    settler.forget("a")
    assert settler.next_due(0.0) is None
    settler.observe(fact(), 1.0)
    assert settler.due(2.5) == []
    assert settler.due(3.0) == [fact()]


def test_an_absent_file_settles_too() -> None:
    settler = Settler(1.0)
    settler.observe(fact(), 0.0)
    assert settler.observe(absent("a"), 0.5)
    assert settler.due(1.5) == [absent("a")]
    assert not absent("a").exists


def test_those_who_are_due_come_in_their_order() -> None:
    settler = Settler(1.0)
    for number in range(5):
        settler.observe(fact(str(number)), number / 10)
    assert [one.path for one in settler.due(9.0)] == ["0", "1", "2", "3", "4"]


def test_twenty_thousand_paths_cost_no_quadratic_work() -> None:
    """Counted in calls, not in seconds: those depend on what else the machine does."""

    def calls(count: int) -> int:
        settler, counted = Settler(1.0), 0

        def count_call(_frame: FrameType, event: str, _argument: object) -> None:
            nonlocal counted
            counted += event in ("call", "c_call")

        sys.setprofile(count_call)
        try:
            for round_number in range(3):
                for number in range(count):
                    settler.observe(fact(str(number), round_number), round_number / 10)
            while settler.next_due(5.0) is not None:
                for one in settler.due(5.0):
                    settler.forget(one.path)
        finally:
            sys.setprofile(None)
        assert len(settler) == 0
        return counted

    # Ten times the paths may cost ten times the calls and a logarithm, not a hundred times.
    assert calls(20_000) < 20 * calls(2_000)


@given(
    st.lists(
        st.tuples(st.sampled_from(["observe", "forget", "due"]), st.sampled_from("abc"), st.integers(0, 2)),
        max_size=60,
    ),
)
def test_nothing_is_due_that_changed_within_the_settle_time_and_nothing_is_left(
    operations: list[tuple[str, str, int]],
) -> None:
    settler = Settler(3.0)
    latest: dict[str, tuple[Fact, float]] = {}
    now = 0.0
    for operation, path, size in operations:
        now += 1.0
        if operation == "observe":
            one = fact(path, size)
            if path not in latest or latest[path][0] != one:
                latest[path] = (one, now)
            settler.observe(one, now)
        elif operation == "forget":
            settler.forget(path)
            latest.pop(path, None)
        else:
            expected = sorted(p for p, (_, since) in latest.items() if now - since >= 3.0)
            got = settler.due(now)
            assert sorted(one.path for one in got) == expected
            for one in got:
                assert latest.pop(one.path)[0] == one
                settler.forget(one.path)
    assert sorted(settler.paths()) == sorted(latest)
    assert {one.path for one in settler.due(now + 3.0)} == set(latest)


def test_quiet_counts_from_the_last_movement_below_a_folder() -> None:
    movements = Movements()
    assert movements.quiet_for("Sessions/anna", 5.0) == float("inf")
    movements.note("Sessions/anna/captions/a.txt", 10.0)
    movements.note("Sessions/bert/b.jpg", 12.0)
    assert movements.quiet_for("Sessions/anna", 15.0) == 5.0
    assert movements.quiet_for("Sessions/anna/captions", 15.0) == 5.0
    assert movements.quiet_for("Sessions/bert", 15.0) == 3.0
    assert movements.quiet_for("", 15.0) == 3.0
    assert movements.quiet_for("Models", 15.0) == float("inf")


def test_deep_folders_share_the_time_of_the_one_above() -> None:
    movements = Movements()
    movements.note("a/b/c/d/e/f.jpg", 1.0)
    assert movements.quiet_for("a/b/c/d/other", 3.0) == 2.0


def test_the_memory_of_movements_is_bounded_and_never_says_quieter_than_it_was() -> None:
    movements = Movements(at_most=100)
    for number in range(1000):
        movements.note(f"s{number}/a.jpg", float(number))
    for number in (0, 500, 999):
        assert movements.quiet_for(f"s{number}", 1000.0) <= 1000.0 - number
    assert movements.quiet_for("s999", 1000.0) == 1.0
    assert len(movements._times) <= 101
