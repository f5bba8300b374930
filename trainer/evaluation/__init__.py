"""Evaluates runs: their snapshots, drawn on prompts of one's choice and scored by rewards of one's choice.

The base model and every snapshot of every run are drawn from the same noise, whatever the run's seed. Runs that differ
in nothing but their seed are one set-up, whose results have intervals. Everything lands in one folder, see `files.py`.
"""
