"""Which sample is in which step, pack and rank, and how it becomes a batch."""
