"""What the command line shows while it works."""

from __future__ import annotations

import sys

from tqdm import tqdm


class Bars:
    """Progress on stderr: one bar at a time, a new one whenever something else begins.

    Not in `__main__`, for other processes get it pickled, and a package's `__main__` is not there by that name.
    """

    def __init__(self):
        self.bar: tqdm | None = None
        self.label = ""

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None

    def __call__(self, label: str, done: int, total: int) -> None:
        if self.bar is None or self.label != label or done <= self.bar.n:
            self.close()
            self.label = label
            self.bar = tqdm(total=total, desc=label, file=sys.stderr, dynamic_ncols=True)
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.close()
