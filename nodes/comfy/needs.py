"""Every name of ComfyUI that this pack uses, and how it is called.

Each line is an expression: a call with an underscore for each argument, or a name that is only read. Methods of its
objects are called on their class. A test finds every use in our sources in this list, and each line of the list in
every ComfyUI at hand.
"""

from importlib import import_module
from typing import Any

MODULES = (
    "comfy.hooks",
    "comfy.latent_formats",
    "comfy.lora",
    "comfy.lora_convert",
    "comfy.model_management",
    "comfy.model_patcher",
    "comfy.patcher_extension",
    "comfy.sd",
    "comfy.sd1_clip",
    "comfy.supported_models",
    "comfy.supported_models_base",
    "comfy.utils",
    "comfy_api.latest",
    "comfy_execution.graph",
    "comfy_execution.graph_utils",
    "folder_paths",
    "server",
)

NEEDS = """
comfy.hooks.HookGroup.combine_all_hooks(_)
comfy.hooks.HookKeyframe(_, start_percent=_, guarantee_steps=_)
comfy.hooks.HookKeyframeGroup.add(self, _)
comfy.hooks.load_hook_lora_for_models(_, _, _, _, _)
comfy.latent_formats.SD15(scale_factor=_)
comfy.latent_formats.SD15.process_out(self, _)
comfy.lora.calculate_weight(_, _, _)
comfy.lora_convert.convert_lora(_)
comfy.model_management.free_memory(_, _)
comfy.model_management.get_torch_device()
comfy.model_management.soft_empty_cache()
comfy.model_management.throw_exception_if_processing_interrupted
comfy.model_management.unet_offload_device()
comfy.model_management.unload_all_models()
comfy.model_patcher.ModelPatcher(_, load_device=_, offload_device=_)
comfy.model_patcher.ModelPatcher.add_patches(self, _, _, _)
comfy.model_patcher.ModelPatcher.add_wrapper_with_key(self, _, _, _)
comfy.model_patcher.ModelPatcher.clone(self)
comfy.model_patcher.ModelPatcher.get_model_object(self, _)
comfy.model_patcher.ModelPatcher.use_ejected(self)
comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
comfy.sd.CLIP(_, model_options=_)
comfy.sd.CLIP.encode_from_tokens(self, _, return_pooled=_, return_dict=_)
comfy.sd.CLIP.tokenize(self, _, tokenizer_options=_)
comfy.sd.VAE(sd=_, config=_, dtype=_)
comfy.sd.VAE.throw_exception_if_invalid(self)
comfy.sd.load_lora_for_models(_, _, _, _, _)
comfy.sd1_clip.SD1ClipModel(clip_model=_)
comfy.sd1_clip.SD1Tokenizer(tokenizer=_)
comfy.sd1_clip.SDClipModel(textmodel_json_config=_, max_length=_, special_tokens=_, return_projected_pooled=_)
comfy.sd1_clip.SDTokenizer(tokenizer_path=_, max_length=_, embedding_size=_)
comfy.supported_models.Flux
comfy.supported_models.SD15(_)
comfy.supported_models.SD15.get_model(self, _, device=_)
comfy.supported_models.SD15.set_inference_dtype(self, _, _)
comfy.supported_models.SD3(_)
comfy.supported_models.SD3.get_model(self, _, device=_)
comfy.supported_models.SD3.set_inference_dtype(self, _, _)
comfy.supported_models.SDXL
comfy.supported_models_base.ClipTarget(_, _)
comfy.utils.ProgressBar(_)
comfy.utils.ProgressBar.update_absolute(self, _, _)
comfy.utils.flux_to_diffusers(_)
comfy.utils.mmdit_to_diffusers(_)
comfy.utils.unet_to_diffusers(_)
comfy_api.latest.ComfyExtension
comfy_api.latest.io.Clip.Input(_, tooltip=_)
comfy_api.latest.io.Clip.Output(_, display_name=_, tooltip=_)
comfy_api.latest.io.Combo.Input(_, _, default=_, optional=_, tooltip=_)
comfy_api.latest.io.ComfyNode
comfy_api.latest.io.Custom(_)
comfy_api.latest.io.Float.Input(_, default=_, min=_, max=_, step=_, round=_, tooltip=_)
comfy_api.latest.io.Float.Output(_, display_name=_, is_output_list=_, tooltip=_)
comfy_api.latest.io.Hidden.dynprompt
comfy_api.latest.io.Hidden.extra_pnginfo
comfy_api.latest.io.Hidden.unique_id
comfy_api.latest.io.Image.Input(_, optional=_, tooltip=_)
comfy_api.latest.io.Image.Output(_, display_name=_, tooltip=_)
comfy_api.latest.io.Int.Input(_, default=_, min=_, max=_, step=_, optional=_, tooltip=_)
comfy_api.latest.io.LoraModel.Output(_, display_name=_, tooltip=_)
comfy_api.latest.io.Model.Input(_, tooltip=_)
comfy_api.latest.io.Model.Output(_, display_name=_, tooltip=_)
comfy_api.latest.io.NodeOutput(_, _, _, _, ui=_)
comfy_api.latest.io.Schema(node_id=_, display_name=_, category=_, description=_, is_output_node=_, hidden=_, inputs=_, outputs=_)
comfy_api.latest.io.String.Input(_, default=_, multiline=_, optional=_, tooltip=_)
comfy_api.latest.io.String.Output(_, display_name=_, is_output_list=_, tooltip=_)
comfy_api.latest.io.Vae.Input(_, tooltip=_)
comfy_api.latest.io.Vae.Output(_, display_name=_, tooltip=_)
comfy_execution.graph.DynamicPrompt.get_display_node_id(self, _)
comfy_execution.graph_utils.ExecutionBlocker(_)
folder_paths.add_model_folder_path(_, _)
folder_paths.get_filename_list(_)
folder_paths.get_folder_paths(_)
folder_paths.get_full_path(_, _)
folder_paths.get_output_directory()
folder_paths.get_temp_directory()
folder_paths.models_dir
server.PromptServer.instance.loop
server.PromptServer.instance.prompt_queue.set_flag(_, _)
server.PromptServer.instance.routes
server.PromptServer.instance.send_sync(_, _)
"""  # noqa: E501


def names() -> list[str]:
    """The dotted names in the list."""
    return [line.partition("(")[0] for line in NEEDS.split("\n") if line]


def missing_names() -> list[str]:
    """Those that this ComfyUI does not have."""
    return [name for name in names() if not _has(name)]


def _has(name: str) -> bool:
    try:
        find(name)
    except (ImportError, AttributeError):
        return False
    return True


def find(name: str) -> Any:
    """What a dotted name in the list stands for; ImportError or AttributeError if there is nothing of that name."""
    module = max((module for module in MODULES if name.startswith(f"{module}.")), key=len)
    found = import_module(module)
    for part in name.removeprefix(f"{module}.").split("."):
        found = getattr(found, part)
    return found
