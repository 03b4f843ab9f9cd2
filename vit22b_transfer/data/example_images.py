"""The images of examples of a task, by their place in a split: for pages and checks."""

from vit22b_transfer import UserError
from vit22b_transfer.data import tasks as registered
from vit22b_transfer.data.indexed_source import IndexedSource
from vit22b_transfer.data.records import Record


def records_of(task_name: str, split: str) -> list[Record]:
    """All records of a split, images unread.

    Raises:
      UserError: if the task has no such split, its files are not there, or its source
        is none of `data.sources` or like them.
    """
    registered.find_provider(task_name, split)
    source = registered.task_named(task_name).source
    if not isinstance(source, IndexedSource):
        raise UserError(
            f"the source of task {task_name!r}, a {type(source).__name__}, does not "
            "tell which image an example has."
        )
    return [source.record(split, n) for n in range(source.num_records(split))]
