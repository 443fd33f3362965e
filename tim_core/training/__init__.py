"""Training: nothing in inference imports it."""
