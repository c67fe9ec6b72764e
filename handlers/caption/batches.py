"""How many pictures at once: from the memory that is free, halved when it was not enough. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from handlers.out_of_memory import is_out_of_memory

Item = TypeVar("Item")
Result = TypeVar("Result")

# Of the memory that is free, so much is counted on: allocators round up, and others live here, too.
_SHARE = 0.85
# A batch of the largest size so many times in a row earns one picture more.
GROW_AFTER = 8


def batch_size(free: int, reserve: int, each: int, most: int) -> int:
    """How many pictures fit: ``(free · 0.85 − reserve) / each``, between 1 and ``most``.

    Args:
        free: bytes that are free where the model computes.
        reserve: bytes that stay free whatever happens.
        each: bytes that one picture takes, see ``picture_bytes``.
        most: more than this is no faster.
    """
    return max(1, min(most, int(free * _SHARE - reserve) // max(each, 1)))


def picture_bytes(*, layers: int, width: int, feed_forward: int, vocabulary: int, tokens: int, element: int) -> int:
    """What one picture takes while the model writes about it: keys and values, hidden states, logits.

    Args:
        layers: of the decoder.
        width: of the decoder.
        feed_forward: width inside its blocks.
        vocabulary: pieces; the logits are float32 and stand there twice.
        tokens: of picture, prompt and answer together.
        element: bytes of a number.
    """
    keys_and_values = 2 * layers * width * tokens * element
    hidden = (6 * width + 2 * feed_forward) * tokens * element
    return keys_and_values + hidden + 2 * vocabulary * 4


@dataclass
class Pace:
    """How large batches are: what fits, but never above the size that the last failure left.

    Attributes:
        most: the largest batch that is worth it.
        ceiling: what proved too much is remembered here: half of it, and one more after ``GROW_AFTER`` good batches.
    """

    most: int
    ceiling: int = field(init=False)
    _good: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.ceiling = self.most

    def size(self, fitting: int) -> int:
        """The next batch's size, where so many pictures fit."""
        return max(1, min(self.ceiling, fitting))

    def went(self, size: int) -> None:
        """A batch of that size was done."""
        if size < self.ceiling or self.ceiling >= self.most:
            return
        self._good += 1
        if self._good >= GROW_AFTER:
            self.ceiling += 1
            self._good = 0

    def ran_out(self, size: int) -> None:
        """Memory ran out at that size."""
        self.ceiling = max(1, size // 2)
        self._good = 0


def in_batches(
    items: Sequence[Item],
    work: Callable[[Sequence[Item]], Sequence[Result]],
    pace: Pace,
    fitting: Callable[[], int],
    recover: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Item, Result | BaseException]]:
    """Do all items in batches as large as memory allows; each comes out once, with its result.

    Where memory runs out the batch is halved and done again. An item that is too much even alone comes out with the
    error; the others go on.

    Args:
        items: what is to do.
        work: does a batch; one result an item.
        pace: remembers what was too much.
        fitting: () → how many items fit now.
        recover: called after memory ran out, to give back what can be given back.

    Raises:
        Exception: whatever ``work`` raises besides running out of memory.
    """
    waiting = deque(items)
    while waiting:
        batch = [waiting[index] for index in range(min(pace.size(fitting()), len(waiting)))]
        failure: BaseException | None = None
        results: Sequence[Result] = ()
        try:
            results = work(batch)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # The frames of the traceback hold the tensors that were too much.
            failure = error.with_traceback(None)
        if failure is not None:
            pace.ran_out(len(batch))
            recover()
            if len(batch) == 1:
                yield waiting.popleft(), failure
            continue
        pace.went(len(batch))
        for result in results:
            yield waiting.popleft(), result
