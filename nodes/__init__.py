"""ComfyUI's nodes for the trainer: thin, over plain classes that know nothing of ComfyUI."""


async def comfy_entrypoint():
    """The extension ComfyUI asks for. ComfyUI is imported here, so that this package can be imported without it."""
    from comfy_api.latest import ComfyExtension, io

    from . import reward_files, routes
    from .apply import ApplyLoRA
    from .critic import TemporalCritic
    from .inspector import NeuronInspector
    from .rewards import RewardModel, ScoreImages
    from .shapes import ShapesModel
    from .train import Train

    reward_files.register()
    routes.register()

    class Extension(ComfyExtension):
        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            return [RewardModel, TemporalCritic, Train, NeuronInspector, ApplyLoRA, ScoreImages, ShapesModel]

    return Extension()
