"""The training loop's manners: stopping, dying, hanging, judging losses, accounting for time."""
