"""Everything that uses ComfyUI: models in and out, LoRAs, folders, routes, and the code that runs on its executor.

`import comfy` imports ComfyUI's own package, here as elsewhere; this package is comfy_tdpo.nodes.comfy.
"""
