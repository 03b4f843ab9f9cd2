"""Progress of long work: a bar on a terminal, else a plain line now and then."""

import datetime
import threading
import time

import rich.console
import rich.filesize
import rich.progress

_SECONDS_BETWEEN_LINES = 10.0


def console(*, quiet: bool = False, stderr: bool = False) -> rich.console.Console:
    """A console for lines as they are: no colours of ours, no wrapping."""
    return rich.console.Console(
        highlight=False, soft_wrap=True, quiet=quiet, stderr=stderr
    )


class Progress:
    """Shows what is done, how much of it a second and the time left; a context manager.

    total: None if not known in advance. done: what an earlier run had done. unit:
      what is counted; "bytes" are shown as MB or GB. lines: whether lines are printed
      where there is no terminal; whoever printed one prints the end as well. beside:
      another, which is being shown: this one appears below it.
    The speed counts from the first call on, which comes after compiling.
    """

    def __init__(
        self,
        console: rich.console.Console,
        label: str,
        *,
        total: int | None,
        done: int = 0,
        unit: str = "examples",
        lines: bool = True,
        beside: "Progress | None" = None,
    ):
        self._console, self._label, self._unit = console, label, unit
        self._total, self._done, self._lines = total, done, lines
        self._adding = threading.Lock()
        self._shown = time.monotonic()
        self._first: tuple[int, float] | None = None  # what was done, and when
        self._bar, self._report = None, ""
        self._last_line: str | None = None
        self._is_beside = beside is not None and beside.is_bar
        if beside is not None:
            self._bar = beside._bar
        elif console.is_terminal and not console.quiet:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(),
                rich.progress.TextColumn("{task.fields[report]}", markup=False),
                console=console,
                refresh_per_second=2,
            )
        if self._bar is not None:
            self._task = self._bar.add_task(
                label, total=total, completed=done, report=""
            )

    @property
    def is_bar(self) -> bool:
        """Whether a bar is shown; lines printed on the console appear above it."""
        return self._bar is not None

    def __enter__(self) -> "Progress":
        if self._bar is not None and not self._is_beside:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None and self._is_beside:
            self._bar.remove_task(self._task)
        elif self._bar is not None:
            self._bar.stop()
        elif self._last_line is not None:
            self._print()

    def add(self, count: int) -> None:
        """Shows that `count` more are done; several threads may call it."""
        with self._adding:
            self.show(self._done + count)

    def show(self, done: int, report: str | None = None) -> None:
        """Shows that `done` are done; a last batch may be beyond the total.

        report: the text behind the bar from now on, in place of `report()`.
        """
        self._done = done if self._total is None else min(done, self._total)
        if self._first is None:
            self._first = self._done, time.monotonic()
        if self._bar is not None:
            self._report = report or self._report
            shown = self._report or self.report()
            self._bar.update(self._task, completed=self._done, report=shown)
        elif self._lines and time.monotonic() - self._shown >= _SECONDS_BETWEEN_LINES:
            self._print()

    def _print(self) -> None:
        """Prints a line, unless the last one said as many."""
        amount = self._amount(self._done)
        if amount != self._last_line:
            self._last_line, self._shown = amount, time.monotonic()
            self._console.print(f"{self._label}: {self.report()}", markup=False)

    def report(self) -> str:
        """`120/600 examples  35.2 examples/s  ETA 0:00:14`, as far as it is known."""
        text = self._amount(self._done)
        if self._total:
            text = f"{self._amount(self._done, with_unit=False)}/" + self._amount(
                self._total
            )
        first, began = self._first or (self._done, 0.0)
        if self._done > first:
            speed = (self._done - first) / max(time.monotonic() - began, 1e-9)
            text += f"  {self._amount(speed)}/s"
            if self._total is not None:
                left = round((self._total - self._done) / speed)
                text += f"  ETA {datetime.timedelta(seconds=left)}"
        return text

    def _amount(self, count: int | float, *, with_unit: bool = True) -> str:
        if self._unit == "bytes":
            return rich.filesize.decimal(int(count))
        text = str(count) if isinstance(count, int) else f"{count:.1f}"
        return f"{text} {self._unit}" if with_unit else text
