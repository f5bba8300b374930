"""Runs as a graph sees them; nothing here knows ComfyUI."""
