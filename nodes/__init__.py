"""Node schemas, one file per node; `comfy/` holds all code that uses ComfyUI, `runs/` the graph's view of runs."""


async def comfy_entrypoint():
    """The extension that ComfyUI loads. ComfyUI is imported here, so that this package can be imported without it."""
    from comfy_api.latest import ComfyExtension, io

    from .apply_lora import ApplyLoRA
    from .comfy.folders import register_rewards_folder
    from .comfy.routes import register_routes
    from .neuron_inspector import NeuronInspector
    from .reward_model import RewardModel
    from .score_images import ScoreImages
    from .shapes_model import ShapesModel
    from .taste import Taste
    from .temporal_critic import TemporalCritic
    from .train import Train

    register_rewards_folder()
    register_routes()

    class Extension(ComfyExtension):
        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            return [RewardModel, Taste, TemporalCritic, Train, NeuronInspector, ApplyLoRA, ScoreImages, ShapesModel]

    return Extension()
