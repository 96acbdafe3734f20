"""Mistakes of a user that are found after parsing: which ranks see them decides how they are reported."""


class RankError(ValueError):
    """A mistake in one rank's own environment or node, which other ranks may not see: each rank that has one reports it."""


class StartError(ValueError):
    """A mistake found when the ranks have met and the model is built: all ranks find it together."""
