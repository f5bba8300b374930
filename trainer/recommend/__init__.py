"""Recommends the LoRA of a run to use, and its strength.

Every snapshot is drawn at several strengths, and so is the base model: the same prompts, which the run has not trained
on, from the same noise. All images are scored by the training reward and by a held-out reward; `choice.py` states the
rule of choice. Everything lands in the run's folder, see `files.py`.
"""
