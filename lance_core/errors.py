"""What a user of Lance is told when something is not as it should be."""


class LanceError(ValueError):
    """A mistake in the input, told in one sentence: what is wrong, where, and what to do about it."""


class LanceWarning(UserWarning):
    """Something was changed or may disappoint, but the request goes on."""
