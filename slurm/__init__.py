"""Running on a cluster: the batch scripts, and what submits and watches them."""
