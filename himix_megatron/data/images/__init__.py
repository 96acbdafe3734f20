"""Image bytes to pixels as the vision tower wants them."""
