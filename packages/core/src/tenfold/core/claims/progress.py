"""What a run is doing: a live line on a terminal, one plain line per measurement elsewhere."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)


class RunProgress:
    """Progress of claims functions, on stderr. A context manager."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[key]}", style="dim", markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> "RunProgress":
        self._bar.start()
        return self

    def __exit__(self, *_):
        self._bar.stop()

    def begin(self, title: str) -> None:
        """A claims function starts."""
        self._title, self._planned, self._done, self._fresh = title, 0, 0, []
        self._task = self._bar.add_task(title, total=None, left="", key="")

    def plan(self, n: int) -> None:
        """`n` more measurements are to come in this function."""
        self._planned += n
        self._bar.update(self._task, total=self._planned)

    def measuring(self, key: str) -> None:
        """A measurement starts."""
        self._bar.update(self._task, key=key)

    def measured(self, key: str, seconds: float, stored: bool) -> None:
        """A measurement ended, or was `stored` before and is used again."""
        self._done += 1
        if not stored:
            self._fresh.append(seconds)
        left = ""
        if self._fresh and self._planned > self._done:
            left = f"about {duration((self._planned - self._done) * sum(self._fresh) / len(self._fresh))} left"
        self._bar.update(self._task, completed=self._done, left=left)
        if not self.console.is_terminal:
            count = f"{self._done}/{self._planned}" if self._planned else f"{self._done}"
            how = "kept from before" if stored else duration(seconds)
            self.say(f"{self._title}  {count}  {key}: {how}")

    def end(self) -> None:
        """The claims function ended, well or not."""
        self._bar.update(self._task, total=max(self._done, 1), left="", key="")
        self._bar.stop_task(self._task)

    def say(self, text: str) -> None:
        """A line above the progress."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s` or `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
