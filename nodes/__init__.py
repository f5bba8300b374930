"""ComfyUI's nodes for the trainer. There are none in this version yet."""


async def comfy_entrypoint():
    """The extension ComfyUI asks for. ComfyUI is imported here, so that this package can be imported without it."""
    from comfy_api.latest import ComfyExtension, io

    class Extension(ComfyExtension):
        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            return []

    return Extension()
