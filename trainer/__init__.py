"""The trainer: runs the algorithms of comfy_tdpo and saves the results in a run folder."""
