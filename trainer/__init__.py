"""The trainer: runs the algorithms of comfy_tdpo and keeps what comes of it in a run folder."""
