"""The list of jobs that workers take theirs from: which worker does what next."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from convexlm.decoding.task import Task
    from convexlm.decoding.work import Batch, Load, Sizes


class _Item:
    """A checkpoint on the list."""

    def __init__(self, load: Load, tasks: Sequence[Task]) -> None:
        self.load = load
        self.tasks = {task.number: task for task in tasks}
        self.taken = False
        self.planned = False

    def take(self) -> Batch | None:
        task = next((task for task in self.tasks.values() if task.ready), None)
        return task.take() if task else None

    @property
    def left(self) -> int:
        """Sentences that wait for a worker."""
        if self.planned:
            return sum(task.ready for task in self.tasks.values())
        return sum(len(task.store.ids) - len(task.store.records) for task in self.tasks.values())


class JobList:
    """Gives out batches so that no worker is idle while there are any, and loads a checkpoint no oftener than needed.

    A worker stays with its checkpoint while that has batches to give out: all its test sets, directions and searches.
    Then it takes the next checkpoint that nobody has taken; when there is none, it helps with the one that has most
    left to do. So the workers begin on different checkpoints, and the last one is shared by all.

    Args:
        entries: the checkpoints in order, each with its unfinished jobs.
    """

    def __init__(self, entries: Sequence[tuple[Load, Sequence[Task]]]) -> None:
        self._items = [_Item(load, tasks) for load, tasks in entries]
        self._at: dict[int, int] = {}

    def next(self, worker: int) -> int | Batch | None:
        """What an idle worker is to do: open the checkpoint of that number, decode a batch, or wait (None)."""
        here = self._at.get(worker)
        if here is not None:
            if not self._items[here].planned:
                return None
            if batch := self._items[here].take():
                return batch
        there = next((number for number, item in enumerate(self._items) if not item.taken), None)
        if there is None:
            there = max(range(len(self._items)), key=lambda number: self._items[number].left)
            if there == here or not self._items[there].left:
                return None
        self._items[there].taken = True
        self._at[worker] = there
        return there

    def load(self, number: int) -> Load:
        """What a worker needs to hear to open that checkpoint."""
        return self._items[number].load

    def opened(self, number: int, sizes: Mapping[int, Sizes]) -> None:
        """A worker has that checkpoint open; the first one tells the sizes of its prompts."""
        item = self._items[number]
        if not item.planned:
            item.planned = True
            for task in item.tasks.values():
                task.open(sizes[task.number])

    def complete(self, batch: Batch) -> None:
        """A batch is done."""
        self._task(batch).complete(batch)

    def lost(self, worker: int, batch: Batch | None) -> None:
        """A worker is gone, and with it what it had not yet told of its batch."""
        here = self._at.pop(worker, None)
        if here is not None and here not in self._at.values() and not self._items[here].planned:
            self._items[here].taken = False
        if batch is not None:
            self._task(batch).put_back(batch)

    def waits(self, batch: Batch) -> bool:
        """Whether that batch is to be given out again."""
        return self._task(batch).waits(batch)

    @property
    def waiting(self) -> bool:
        """Whether there is anything to give out."""
        return any(item.left for item in self._items)

    def _task(self, batch: Batch) -> Task:
        return next(item.tasks[batch.job] for item in self._items if batch.job in item.tasks)
