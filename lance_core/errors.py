"""What a user of Lance is told when something is not as it should be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class LanceError(ValueError):
    """A mistake in the input, told in one sentence: what is wrong, where, and what to do about it."""


class LanceWarning(UserWarning):
    """Something was changed or may disappoint, but the request goes on."""


@contextmanager
def warnings_shown(show: Callable[[str], None]) -> Iterator[None]:
    """Hands the sentence of every LanceWarning to `show`, each time it happens; others go where they usually do."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", LanceWarning)
        usual = warnings.showwarning

        def showwarning(message, category, *place, **options) -> None:
            if issubclass(category, LanceWarning):
                show(str(message))
            else:
                usual(message, category, *place, **options)

        warnings.showwarning = showwarning
        yield
