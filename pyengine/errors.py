"""The one exception of our own: a file that cannot be trusted."""


class CheckpointError(ValueError):
    """A model file is missing, truncated, damaged or breaks an invariant; the message names it and says why."""
