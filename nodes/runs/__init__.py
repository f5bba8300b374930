"""The graph's view of runs; nothing here imports ComfyUI."""
