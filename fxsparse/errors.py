"""The error that every refusal of a user's request raises."""


class FxsparseError(ValueError):
    """A request that cannot be carried out: the message says what, where and what to do."""
