"""The nodes' schemas, one file a node; `comfy/` touches ComfyUI, and `runs/` holds runs as a graph sees them."""


async def comfy_entrypoint():
    """The extension ComfyUI asks for. ComfyUI is imported here, so that this package can be imported without it."""
    from comfy_api.latest import ComfyExtension, io

    from .apply_lora import ApplyLoRA
    from .comfy.folders import register_rewards_folder
    from .comfy.routes import register_routes
    from .neuron_inspector import NeuronInspector
    from .reward_model import RewardModel
    from .score_images import ScoreImages
    from .shapes_model import ShapesModel
    from .temporal_critic import TemporalCritic
    from .train import Train

    register_rewards_folder()
    register_routes()

    class Extension(ComfyExtension):
        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            return [RewardModel, TemporalCritic, Train, NeuronInspector, ApplyLoRA, ScoreImages, ShapesModel]

    return Extension()
