"""Everything that touches ComfyUI: models in and out, LoRAs, folders, routes, and what runs on its executor.

`import comfy` means ComfyUI's own package, here as everywhere: this one is comfy_tdpo.nodes.comfy.
"""
