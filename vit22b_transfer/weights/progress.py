"""How far a conversion has come: a bar on a terminal, nothing elsewhere."""

import rich.console
import rich.progress


class Progress:
    """Shows bytes done, their rate and the time left; a context manager."""

    def __init__(self, label: str, total: int):
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(),
            rich.progress.TransferSpeedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=(console := rich.console.Console(stderr=True)),
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=total)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def add(self, count: int) -> None:
        """Counts `count` bytes more as done."""
        self._bar.update(self._task, advance=count)
