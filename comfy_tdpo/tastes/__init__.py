"""Tastes: the choices of one person, kept as votes in a folder, and the small head that predicts them."""
