"""What is seen of a run while it trains, which pictures are held out, and when losses have exploded: the pure parts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from handlers.train.auto import Base, make_plan
from handlers.train.board import Board
from handlers.train.charts import write_loss_curve
from handlers.train.divergence import RECENT, USUAL, Diverged, Verdict, Watch, refusal_of
from handlers.train.holdout import how_many, split
from handlers.train.place import Place
from handlers.train.plan import Plan
from handlers.train.viewers import Row, Viewer, Viewers
from handlers.train.wandb_run import WandbRun
from sessions.refusal import Refusal
from sessions.spec import parse_spec
from tests.daemon_process import until
from tests.events import Shown, shown_in

SD15 = Base("sd15", "sd1", 512, miniature=False)


def pictures(count: int) -> list[dict[str, Any]]:
    return [{"source": f"/s/zwx ({number}).jpg", "sha256": f"{number:064x}"} for number in range(count)]


def fold(losses: Sequence[float], nothing: float = 1.0) -> Verdict | None:
    """The first verdict over the losses of a stage."""
    watch = Watch(nothing)
    return next((found for step, loss in enumerate(losses, 1) if (found := watch.note(step, loss))), None)


# Losses of ordinary runs: one picture a step at random noise levels is lognormal with deviations up to about 1.5.
spreads = st.floats(0.0, 1.5)
levels = st.floats(1e-4, 0.3)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    spread=spreads,
    level=levels,
    trend=st.floats(-3.0, 0.7),
    steps=st.integers(1, 1500),
    outliers=st.floats(0.0, 0.1),
)
def test_ordinary_runs_are_never_stopped(
    *, seed: int, spread: float, level: float, trend: float, steps: int, outliers: float
) -> None:
    """Falling, or twice as high at the end, whatever the noise levels add, with single steps a thousandfold."""
    draw = random.Random(seed)
    losses = [
        min(2.0, level * draw.lognormvariate(0, spread))
        * 2.718 ** (trend * step / steps)
        * (1000.0 if draw.random() < outliers else 1.0)
        for step in range(steps)
    ]
    assert fold([min(loss, 1e6) for loss in losses]) is None


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    spread=st.floats(0.0, 1.2),
    level=st.floats(1e-3, 0.3),
    well=st.integers(0, 800),
    growth=st.floats(1.05, 3.0),
)
def test_losses_that_explode_stop_the_run_soon_and_name_when_it_was_well(
    seed: int, spread: float, level: float, well: int, growth: float
) -> None:
    draw = random.Random(seed)
    usual = [min(1.0, level * draw.lognormvariate(0, spread)) for _ in range(well)]
    # Grows by so much a step up to ten thousand times; then it stays there.
    wild = [level * draw.lognormvariate(0, spread) * min(growth ** min(step, 200), 1e4) for step in range(1000)]
    # Worse than predicting nothing, where too few steps came before to know what is usual.
    wild = [max(loss, 8.0) if step > 300 else loss for step, loss in enumerate(wild)]
    found = fold([*usual, *wild])
    assert found is not None
    assert found.good_until <= well + 350
    assert found.good_until >= well - 2 * RECENT


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), cut=st.integers(0, 300), step_up=st.integers(100, 250))
def test_a_resumed_watch_knows_what_an_undisturbed_one_knows(seed: int, cut: int, step_up: int) -> None:
    draw = random.Random(seed)
    losses = [draw.lognormvariate(-3, 1) * (200.0 if step >= step_up else 1.0) for step in range(300)]
    whole, rows = Watch(), list(enumerate(losses, 1))
    expected = [whole.note(*row) for row in rows]
    resumed = Watch(past=rows[:cut])
    assert [resumed.note(*row) for row in rows[cut:]] == expected[cut:]
    assert any(expected)


def test_a_collapse_to_rubbish_stops_though_no_loss_is_large() -> None:
    """A model that draws only noise costs about 1 a step: no explosion by itself, and far from what was usual."""
    draw = random.Random(1)
    usual = [draw.lognormvariate(-3.2, 1.2) for _ in range(200)]
    found = fold([*usual, *(1.0 + draw.gauss(0, 0.05) for _ in range(100))])
    assert found is not None
    assert found.usual is not None
    assert 190 <= found.good_until <= 210
    assert fold([*usual[:USUAL], *usual]) is None


def test_a_model_that_falls_to_pieces_at_once_is_stopped_too() -> None:
    """What is usual was never seen: the second step costs what predicting nothing costs, and so do all others."""
    draw = random.Random(2)
    found = fold([0.005, *(1.0 + draw.gauss(0, 0.1) for _ in range(100))])
    assert found is not None
    assert found.level == pytest.approx(1.0, abs=0.1)
    assert found.usual is None
    assert found.good_until <= 2


def test_class_pictures_raise_what_is_worthless() -> None:
    assert fold([7.0] * 40) is not None
    assert fold([7.0] * 40, nothing=2.0) is None


def test_what_is_said_names_step_rate_and_what_to_write() -> None:
    told = refusal_of(Verdict(1.31, 0.09, 812), "stage 2 of 2: UNet", "unet", 2e-4, 850)
    assert isinstance(told, Diverged)
    assert told.code == "diverged"
    assert told.good_until == 812
    assert "step 850" in told.what
    assert "15 times" in told.what
    assert "from about step 813 on" in told.what
    assert "a learning rate of 0.0002" in told.what
    assert "unet.learning_rate than 0.0002 into train.yaml, say 4e-05" in told.advice


@pytest.mark.parametrize(("count", "held"), [(3, 0), (20, 0), (39, 0), (40, 4), (57, 5), (80, 8), (5000, 8)])
def test_only_who_has_many_pictures_has_some_to_spare(count: int, held: int) -> None:
    assert how_many("auto", count, "auto") == held
    assert how_many("auto", count, "filename") == 0
    assert how_many(0, count, "auto") == 0


def test_a_number_of_pictures_may_leave_too_few() -> None:
    assert how_many(2, 5, "auto") == 2
    with pytest.raises(Refusal, match="validation: 3 leaves 2 of 5 pictures"):
        how_many(3, 5, "auto")


@given(count=st.integers(3, 60), held=st.integers(0, 8), seed=st.integers(0, 2**32 - 1), order=st.randoms())
def test_the_same_pictures_are_held_out_whatever_their_order(
    count: int, held: int, seed: int, order: random.Random
) -> None:
    held = min(held, count - 3)
    given_pictures = pictures(count)
    trained, out = split(given_pictures, held, seed)
    assert len(out) == held
    assert sorted(picture["source"] for picture in (*trained, *out)) == sorted(p["source"] for p in given_pictures)
    shuffled = list(given_pictures)
    order.shuffle(shuffled)
    assert {p["source"] for p in split(shuffled, held, seed)[1]} == {p["source"] for p in out}


def test_steps_that_count_pictures_count_those_that_are_trained_on() -> None:
    def plan(text: str) -> Plan:
        return make_plan(parse_spec(text), SD15, pictures(40), "5e55", "fp32")

    assert plan("").validation == 4
    assert plan('unet: {steps: "10/image"}').unet_steps == 360
    assert plan('unet: {steps: "10/image"}\nvalidation: 0').unet_steps == 400


def row_of(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "stage": 1, "loss": 1 / step, "learning_rate": 1e-6, "seconds": 0.5, "at": 1e9 + step, **more}


@pytest.fixture
def session(tmp_path: Path) -> Path:
    folder = tmp_path / "Sessions" / "dog"
    folder.mkdir(parents=True)
    (tmp_path / "Sessions" / "dog" / ".fastsd").mkdir()
    (folder / ".fastsd" / "session.json").write_text(json.dumps({"id": "abcd1234"}))
    return folder


def place_of(session: Path) -> Place:
    return Place(session, session.parent.parent, "abcd1234")


def test_tensorboard_shows_each_step_once_after_a_kill(session: Path) -> None:
    """A first process dies in the middle of a record; the second resumes from an earlier step."""
    grid = session / "samples.jpg"
    Image.new("RGB", (80, 40), "red").save(grid)
    first = Board(place_of(session), "r1")
    first.begin([], {})
    rates = {"unet": 2e-6, "text_encoder": 1e-6}
    first.note([row_of(step, rates=rates) for step in range(1, 10)])
    first.show(4, grid)
    (file,) = (session / "runs" / "r1").glob("events*")
    file.write_bytes(file.read_bytes()[:-7])
    moved = session.with_name("renamed")
    session.rename(moved)
    second = Board(place_of(moved), "r1")
    second.begin([row_of(step) for step in range(1, 7)], {4: moved / "samples.jpg"})
    second.note([row_of(step, validation_loss=0.25, memory=2_000_000_000) for step in range(7, 9)])
    second.show(8, moved / "samples.jpg")
    found = shown_in(moved / "runs" / "r1")
    assert [step for step, _ in found.curves["loss/train"]] == list(range(1, 9))
    assert found.curves["loss/train"][3] == (4, 0.25)
    assert found.curves["loss/held out"] == [(7, 0.25), (8, 0.25)]
    assert found.curves["memory in GB"] == [(7, 2.0), (8, 2.0)]
    assert found.pictures == [(4, 80, 40), (8, 80, 40)]
    assert found.times[:2] == [1e9 + 1, 1e9 + 2]
    assert found.begins_with_a_void_mark, "for a TensorBoard that has read the file that is gone"
    assert [path.stat().st_size > 0 for path in sorted((moved / "runs" / "r1").glob("events*"))] == [False, True]
    Board(place_of(moved), "r1").begin([row_of(1)], {})
    assert [path.stat().st_size > 0 for path in sorted((moved / "runs" / "r1").glob("events*"))] == [False, True]
    assert shown_in(moved / "runs" / "r1").curves["loss/train"] == [(1, 1.0)]


def test_the_rates_of_all_that_is_trained_are_shown(session: Path) -> None:
    board = Board(place_of(session), "r1")
    board.begin([row_of(1, rates={"unet": 0.25, "text_encoder": 0.5})], {})
    found: Shown = shown_in(session / "runs" / "r1")
    assert found.curves["learning rate/unet"] == [(1, 0.25)]
    assert found.curves["learning rate/text_encoder"] == [(1, 0.5)]


class Failing:
    """A viewer whose network goes after the second call."""

    def __init__(self, calls_before: int) -> None:
        self.left = calls_before
        self.heard: list[int] = []

    def begin(self, rows: Sequence[Row], _samples: Mapping[int, Path], /) -> None:
        self.note(rows)

    def note(self, rows: Sequence[Row]) -> None:
        if not self.left:
            raise ConnectionError("no route\nto host")
        self.left -= 1
        self.heard += [row["step"] for row in rows]

    def show(self, _step: int, _sample: Path, /) -> None:
        self.note([])

    def close(self) -> None:
        self.note([])


def absent() -> Viewer:
    raise ImportError("the package x is not installed")


def test_a_viewer_that_fails_is_told_of_once_and_the_others_go_on() -> None:
    failing, well = Failing(2), Failing(100)
    told: list[str] = []
    makers: dict[str, Callable[[], Viewer]] = {"W": lambda: failing, "T": lambda: well, "X": absent}
    viewers = Viewers(makers, told.append)
    viewers.begin([row_of(1)], {})
    for step in range(2, 6):
        viewers.note(row_of(step))
        viewers.flush()
    viewers.close()
    assert failing.heard == [1, 2]
    assert well.heard == [1, 2, 3, 4, 5]
    assert told == [
        "X shows nothing of this run: the package x is not installed",
        "W shows no more of this run (ConnectionError: no route to host); the training goes on",
    ]


def test_wandb_offline_keeps_every_step_and_nothing_in_the_tree(
    session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    from tests.events import wandb_steps

    before = sorted(session.rglob("*"))
    folder = tmp_path / "cache" / "wandb"
    run = WandbRun("fastsd", "abcd1234-r1", "dog r1", plan={"base": "miniature"}, folder=folder)
    run.begin([row_of(step) for step in range(1, 4)], {})
    run.note([row_of(4, validation_loss=0.5)])
    run.close()
    (file,) = folder.rglob("*.wandb")
    # Its own process writes the file, and may be a moment behind.
    until(lambda: len(wandb_steps(file)) >= 4, "wandb has written all steps", 60)
    found = wandb_steps(file)
    assert [step for step, _ in found] == [1, 2, 3, 4]
    assert found[3][1]["loss/held out"] == 0.5
    assert sorted(session.rglob("*")) == before


def test_held_out_pictures_have_a_line_in_the_loss_curve(tmp_path: Path) -> None:
    rows = [row_of(step, **({"validation_loss": 3.0} if step % 5 == 0 else {})) for step in range(1, 31)]
    write_loss_curve(tmp_path / "with.png", rows)
    write_loss_curve(tmp_path / "without.png", [{**row, "validation_loss": None} for row in rows])
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()
