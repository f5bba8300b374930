"""Memory: what running out of it looks like, how much of it there is, and how many rows fit."""
