"""Show the progress of long work: a bar on a terminal and in a notebook, a line a minute in a file."""

import logging
import time

from tqdm.auto import tqdm


logger = logging.getLogger(__name__)


# Seconds between two looks of the bar, and between two lines where there is no terminal.
_BAR_INTERVAL, _LINE_INTERVAL = 0.1, 60


def describe_seconds(seconds: float) -> str:
    """For example "14.1 s", "2:05 min" or "1:02:05 h"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{tqdm.format_interval(seconds).lstrip('0')} {'min' if seconds < 3600 else 'h'}"


class Progress:
    """The progress of one stage of work. It may be used in a `with` statement.

    On a terminal and in a notebook it is a bar that appears after a second and is gone at the end. Elsewhere it is a record of
    `logging` a minute, of level INFO, which the commands print and a library user does not see by default.

    Args:
        name: what is done.
        total: number of units; `None` if it is not known.
        unit: what is counted.
        images_per_unit: for the images per second.
        is_shown: show anything; no in all processes of a machine but one.
        has_bar: show a bar on a terminal; otherwise lines there as well.
    """

    def __init__(
        self,
        name: str,
        total: int | None = None,
        unit: str = "images",
        *,
        images_per_unit: int = 1,
        is_shown: bool = True,
        has_bar: bool = True,
    ):
        self.name, self.total, self.unit, self.images_per_unit = name, total, unit, images_per_unit
        self.is_shown, self.count, self.note = is_shown, 0, ""
        self._first, self._start = 0, time.perf_counter()
        self._last_shown = self._start
        in_format = name.replace("{", "{{").replace("}", "}}")
        self._bar = tqdm(
            total=total,
            bar_format="{desc}" if total is None else f"{in_format} {{bar}} {{desc}}",
            # Without a value, tqdm shows nothing if there is no terminal.
            disable=None if is_shown and has_bar else True,
            leave=False,
            delay=1,
            mininterval=0,
            miniters=1,
            dynamic_ncols=True,
        )

    def skip(self, count: int) -> None:
        """Count units that were done before, in another run."""
        self.count = self._first = self.count + count

    def update(self, count: int = 1, note: str | None = None) -> None:
        """Count units that were done; `note` is shown behind the numbers from now on."""
        self.count += count
        self.note = self.note if note is None else note
        now, has_bar = time.perf_counter(), not self._bar.disable
        if not self.is_shown or now - self._last_shown < (_BAR_INTERVAL if has_bar else _LINE_INTERVAL):
            return
        self._last_shown, text = now, self._describe()
        if has_bar:
            self._bar.set_description_str(f"{self.name} {text}" if self.total is None else text, refresh=False)
            self._bar.update(self.count - self._bar.n)
        else:
            logger.info("%s: %s", self.name, text)

    def _describe(self) -> str:
        total = "" if self.total is None else f"/{self.total:,}"
        parts, done = [f"{self.count:,}{total} {self.unit}"], self.count - self._first
        if done:
            parts.append(self._rate())
        if done and self.total is not None:
            seconds = (self.total - self.count) * self.seconds / done
            parts.append(f"{tqdm.format_interval(seconds)} left")
        return ", ".join([*parts, *filter(None, [self.note])])

    def _rate(self) -> str:
        rate = (self.count - self._first) * self.images_per_unit / max(self.seconds, 1e-9)
        return f"{rate:,.{0 if rate >= 10 else 1}f} images/s"

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def finish(self) -> None:
        """End with a record of what was done and how long it took."""
        self.close()
        if self.is_shown:
            rate = self._rate() if self.count > self._first else ""
            parts = [f"{self.count:,} {self.unit}", describe_seconds(self.seconds), rate, self.note]
            logger.info("%s: %s", self.name, ", ".join(filter(None, parts)))

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()
