"""Base models: what is read from a user's files, and what is made of it."""
