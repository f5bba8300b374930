"""Runs under ComfyUI's own Python, not under pytest: prints as JSON how far its models are from ours.

python tests/inside_comfyui.py CHECKOUT QUESTION, a question being one of
shapes|sd2|sd1|decoders|thread|weights|quantised|scaled|needs|refusals|damaged,
lora FILE, baked SNAPSHOT FILE STRENGTH, blended FILE, syntax LINE...
"""

import ast
import asyncio
import copy
import inspect
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from threading import Event
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent
_, CHECKOUT, QUESTION, *FILES = sys.argv
sys.path[:0] = [CHECKOUT, str(ROOT)]
sys.argv[1:] = ["--cpu", "--base-directory", str(Path.cwd())]  # where it makes folders

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

if (Path(CHECKOUT) / "comfy_compatibility").is_dir():  # the fork's own: only so does it have `nodes` and `folder_paths`
    from comfy_compatibility.vanilla import prepare_vanilla_environment

    prepare_vanilla_environment()
else:
    import utils.install_util  # noqa: F401 - as main.py does, before `nodes` puts a folder with another `utils` first

import comfy.lora_convert  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.taesd.taesd  # noqa: E402
import comfy.utils  # noqa: E402
import comfy_api.latest  # noqa: E402
import folder_paths  # noqa: E402
import numpy  # noqa: E402
import torch  # noqa: E402
from aiohttp.web import RouteTableDef  # noqa: E402
from diffusers import StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import comfy_tdpo.nodes  # noqa: E402
from comfy_tdpo.models.components import load_components  # noqa: E402
from comfy_tdpo.models.shipped import CONFIGS  # noqa: E402
from comfy_tdpo.models.stable_diffusion import Autoencoder, ClipText  # noqa: E402
from comfy_tdpo.nodes.comfy import models_in, needs, shapes_out  # noqa: E402
from comfy_tdpo.nodes.comfy.decoder import ComfyDecoder  # noqa: E402
from comfy_tdpo.nodes.comfy.weights_in import check_plain  # noqa: E402
from comfy_tdpo.nodes.runs.prompts import Prompts  # noqa: E402
from comfy_tdpo.shapes import WORLD  # noqa: E402

PROMPTS = ["a red circle", "two blue squares on a green background"]
CPU = torch.device("cpu")


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def shapes() -> dict[str, float]:
    """The world of Shapes as it lies on disk, as native models, and back."""
    ours = load_components(str(WORLD / "pipeline"))
    model, clip, vae = shapes_out.shapes_native()
    latents, timesteps = drawn(2, 4, 8, 8), torch.tensor([10, 700])
    embeds = ClipText(ours.tokenizer, ours.text_encoder)(PROMPTS).parts["states"]
    expected = ours.unet(latents, timesteps, embeds).sample
    encoded = models_in.EncodedPrompts(clip, {prompt: prompt for prompt in PROMPTS}, CPU)
    decoder = ComfyDecoder(vae, model)
    images = Autoencoder(ours.vae)(latents)
    return {
        "text": difference(encoded(PROMPTS).parts["states"], embeds),
        "native unet": difference(model.model.diffusion_model(latents, timesteps, context=embeds), expected),
        "unet from native": difference(models_in.diffusers_unet(model)(latents, timesteps, embeds).sample, expected),
        "decoder": difference(decoder(latents), images),
        "native vae": difference(vae.decode(model.model.process_latent_out(latents)).permute(0, 3, 1, 2), images),
        "alpha_bar": difference(models_in.scheduler_of(model).alphas_cumprod, ours.scheduler.alphas_cumprod),
        "scale of the output": expected.abs().max().item(),
    }


def decoders() -> dict[str, float]:
    """How far our copies of VAEs are from ComfyUI's decoding, where nothing of ComfyUI may be asked by them."""
    model, _, vae = shapes_out.shapes_native()
    half = copy.copy(vae)
    half.first_stage_model, half.vae_dtype = copy.deepcopy(vae.first_stage_model).bfloat16(), torch.bfloat16
    tiny = comfy.taesd.taesd.TAESD()
    draw_weights(tiny)
    small = comfy.sd.VAE(sd=tiny.state_dict(), dtype=torch.float32)
    latents, found = drawn(2, 4, 8, 8), {}
    for name, native in (("KL", vae), ("KL in bf16", half), ("TAESD", small)):
        expected = native.process_output(
            native.first_stage_model.decode(model.model.latent_format.process_out(latents).to(native.vae_dtype)).float()
        )
        decoder = ComfyDecoder(native, model)
        layers = [kind for kind in map(type, decoder.network.modules()) if kind.__module__ == "comfy.ops"]
        with nothing_asked():
            found[name] = difference(decoder(latents), expected)
        found[f"{name}, layers of ComfyUI"] = len(layers)
        found[f"{name}, varies by"] = expected.std().item()
    return found


def thread() -> dict[str, str | None]:
    """How a job ends that trains, measures and recommends while nothing of ComfyUI may be asked."""
    from comfy_tdpo.prompts import load_prompts
    from comfy_tdpo.trainer.config import make_config
    from comfy_tdpo.trainer.job import Job
    from comfy_tdpo.trainer.run import RunFolder

    small = {"epochs": 1, "samples_per_epoch": 4, "samples_per_update": 2, "steps": 2}
    config = make_config("shapes", overrides=small | {"output": {"grid_images": 2, "recommend": True}})
    factory = models_in.Wires(*shapes_out.shapes_native()).factory(config, Prompts(load_prompts(config.prompts)), CPU)
    with TemporaryDirectory() as folder, nothing_asked():
        run = RunFolder(Path(folder) / "run")
        run.create(config)
        job = Job(run, factory, CPU)
        job.start()
        status = job.wait()
        return {"state": status.state, "error": status.error, "table": str((run.path / "recommendation").is_dir())}


@contextmanager
def nothing_asked() -> Iterator[None]:
    """Meanwhile, every function of ComfyUI's memory management and of its layers raises an error."""

    def refuse(*_, **__):
        raise AssertionError("the training thread asked ComfyUI")

    kept = []
    for module in (comfy.model_management, comfy.ops):
        for name, value in vars(module).items():
            if isinstance(value, FunctionType):
                kept.append((module, name, value))
    layers = [kind for kind in vars(comfy.ops.disable_weight_init).values() if isinstance(kind, type)]
    kept += [(kind, "forward", vars(kind)["forward"]) for kind in layers if "forward" in vars(kind)]
    for owner, name, _ in kept:
        setattr(owner, name, refuse)
    try:
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


# --- prompts


def syntax(*lines: str) -> dict[str, str]:
    """The text of each line that ComfyUI's tokenizer gives weights to."""
    from comfy.sd1_clip import escape_important, token_weights, unescape_important

    texts = {line: "".join(text for text, _ in token_weights(escape_important(line), 1.0)) for line in lines}
    return {line: " ".join(unescape_important(text).split()) for line, text in texts.items()}


def weights() -> dict[str, float | str]:
    """What a training's model and its rewards get of a prompt with weights."""
    from comfy_tdpo.nodes.runs.prompts import read_prompts
    from comfy_tdpo.nodes.runs.registry import Runs
    from comfy_tdpo.nodes.runs.start import prepare
    from comfy_tdpo.trainer.config import make_config
    from nodes import CLIPTextEncode

    model, clip, vae = shapes_out.shapes_native()
    line, words = "a (red:1.5) circle", "a red circle"
    prompts, config = read_prompts(f"\ufeff{line}\u00a0", "prompts"), make_config("shapes")
    factory = models_in.Wires(model, clip, vae).factory(config, prompts, CPU)
    with TemporaryDirectory() as folder:
        runs = Runs(Path(folder) / "runs", Path(folder) / "loras")
        run = runs.folder("one")
        prepare(runs, run, config, prompts)
        training = factory(run, Event(), lambda *_: None)
        (prompt,) = set(training.prompts + training.keeper.grid_prompts)
        encoded = training.policy.encode_prompts([prompt]).parts["states"]
    (((native, _),),) = CLIPTextEncode().encode(clip, line)
    (((plain, _),),) = CLIPTextEncode().encode(clip, words)
    return {"prompt": prompt, "off its line": difference(encoded, native), "off its words": difference(encoded, plain)}


# --- families, with random weights


class SmallSD2(comfy.supported_models.SD20):
    """Stable Diffusion 2.1's layout, narrower, which predicts v."""

    unet_config: dict = {}

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.V_PREDICTION


def sd2() -> dict[str, float]:
    """The layout of 2.x: linear projections, heads of 64 channels, v-prediction."""
    model = small_sd2()
    assert models_in.scheduler_of(model).config.prediction_type == "v_prediction"
    return both_ways(model, models_in.diffusers_unet(model), drawn(2, 4, 16, 16), drawn(2, 7, 48))


def small_sd2(quantised: bool = False) -> comfy.model_patcher.ModelPatcher:
    depths = [1, 1, 1, 0]
    config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 64,
        "num_res_blocks": [2] * 4,
        "channel_mult": [1, 2, 2, 2],
        "transformer_depth": [depth for depth in depths for _ in range(2)],
        "transformer_depth_output": [depth for depth in depths for _ in range(3)],
        "transformer_depth_middle": 1,
        "context_dim": 48,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "num_heads": -1,
        "num_head_channels": 64,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "legacy": False,
    }
    family = SmallSD2(config)
    family.set_inference_dtype(torch.float32, torch.float32 if quantised else None)
    if quantised:  # as ComfyUI marks a family whose file is in scaled float8, until 0.3.65 and since
        family.scaled_fp8, family.quant_config = torch.float8_e4m3fn, {"mixed_ops": True}
    base = family.get_model({})
    draw_weights(base.diffusion_model)
    return comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU)


def sd1() -> dict[str, float]:
    """The published shape of 1.5, read by ComfyUI's own reader of diffusers' U-Nets."""
    config = json.loads((CONFIGS / "sd1" / "unet" / "config.json").read_text())
    ours = UNet2DConditionModel(**config)
    draw_weights(ours)
    model = comfy.sd.load_diffusion_model_state_dict(dict(ours.state_dict()))
    latents, context = drawn(1, 4, 8, 8), drawn(1, 77, 768)
    expected = ours(latents, torch.tensor([700]), context).sample
    del ours
    found = both_ways(model, models_in.diffusers_unet(model), latents, context)
    again = models_in.diffusers_unet(model)(latents, torch.tensor([700]), context).sample
    return found | {"as it was before ComfyUI": difference(again, expected)}


def draw_weights(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, weight in network.named_parameters():
        scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
        weight.data = scale * torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1 and name.endswith("weight"):  # of a norm
            weight.data += 1


def both_ways(model, unet: UNet2DConditionModel, latents: Tensor, context: Tensor) -> dict[str, float]:
    timesteps = torch.tensor([10, 700])[-len(latents) :]
    expected = model.model.diffusion_model(latents, timesteps, context=context)
    got = unet(latents, timesteps, context).sample
    return {"unet from native": difference(got, expected), "scale of the output": expected.abs().max().item()}


# --- a LoRA file


def lora(file: str) -> dict[str, float]:
    """What Shapes predicts with the LoRA on, by whoever applies it."""
    from comfy_tdpo.nodes.comfy.lora import apply_weights
    from comfy_tdpo.trainer.run.loras import read_lora

    model, _, _ = shapes_out.shapes_native()
    parts = load_components(str(WORLD / "pipeline"))
    latents, timesteps = drawn(2, 4, 8, 8), torch.tensor([10, 700])
    context = ClipText(parts.tokenizer, parts.text_encoder)(PROMPTS).parts["states"]

    def by_comfyui(patched) -> Tensor:
        patched.patch_model(device_to=CPU)
        try:
            return patched.model.diffusion_model(latents, timesteps, context=context)
        finally:
            patched.unpatch_model(device_to=CPU)

    plain = by_comfyui(model.clone())
    loaded, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(file), 1.0, 0)
    ours = apply_weights(model, read_lora(Path(file)), 1.0, "test")
    expected = by_comfyui(loaded)
    pipeline = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(str(Path(file).parent), weight_name=Path(file).name)
    return {
        "Apply": difference(by_comfyui(ours), expected),
        "diffusers": difference(pipeline.unet(latents, timesteps, context).sample, expected),
        "baked in": difference(models_in.diffusers_unet(ours)(latents, timesteps, context).sample, expected),
        "what it changes": difference(plain, expected),
        "names differ": float(models_in.model_name(ours) != models_in.model_name(model)),
        "names repeat": float(models_in.model_name(ours) == models_in.model_name(apply_again(model, file))),
    }


def baked(snapshot: str, file: str, strength: str) -> dict[str, float]:
    """How far a FILE in ComfyUI's own Load LoRA at 1 is from the SNAPSHOT at the STRENGTH baked into it."""
    from nodes import LoraLoader

    model, _, _ = shapes_out.shapes_native()
    parts = load_components(str(WORLD / "pipeline"))
    latents, timesteps = drawn(2, 4, 8, 8), torch.tensor([10, 700])
    context = ClipText(parts.tokenizer, parts.text_encoder)(PROMPTS).parts["states"]

    def by_load_lora(name: str, strength: float) -> Tensor:
        folder_paths.folder_names_and_paths["loras"] = ([str(Path(name).parent)], {".safetensors"})
        patched, _ = LoraLoader().load_lora(model, None, Path(name).name, strength, 0)
        patched.patch_model(device_to=CPU)
        try:
            return patched.model.diffusion_model(latents, timesteps, context=context)
        finally:
            patched.unpatch_model(device_to=CPU)

    expected = by_load_lora(snapshot, float(strength))
    return {
        "Load LoRA": difference(by_load_lora(file, 1.0), expected),
        "what strength changes": difference(by_load_lora(snapshot, 1.0), expected),
    }


def blended(file: str) -> dict[str, float]:
    """How far each step of a sampling is from the LoRA at the strength that its schedule says, and from the base."""
    import comfy.sample

    from comfy_tdpo.nodes.comfy.lora import apply_weights
    from comfy_tdpo.trainer.run.loras import read_lora

    model, clip, _ = shapes_out.shapes_native()
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPTS[0], ""))
    context = positive[0][0]
    weights, steps = read_lora(Path(file)), 10

    passes: list[int] = []

    def run(network, given: dict) -> Tensor:
        passes.append(len(given["input"]))
        return network(given["input"], given["timestep"], **given["c"])

    def sample(patched) -> tuple[list[dict], Tensor]:
        seen: list[dict] = []
        passes.clear()
        patched = patched.clone()
        patched.set_model_sampler_post_cfg_function(lambda args: (seen.append(dict(args)), args["denoised"])[1])
        patched.set_model_unet_function_wrapper(run)
        latent = torch.zeros(1, 4, 8, 8)
        settings = ("ddim", "simple", positive, negative, latent)
        result = comfy.sample.sample(patched, drawn(1, 4, 8, 8), steps, 3.0, *settings, disable_pbar=True, seed=1)
        return seen, result

    def predicted(step: dict, strength: float) -> Tensor:
        """What the model with the LoRA at that strength makes of a step's latent, by the weights."""
        patched = apply_weights(model, weights, strength, "test")
        patched.patch_model(device_to=CPU)
        try:
            return patched.model.apply_model(step["input"], step["sigma"], c_crossattn=context)
        finally:
            patched.unpatch_model(device_to=CPU)

    found = {"difference of base and tuned": 0.0}
    shares = {
        "linear": lambda k: k / steps,
        "power_2": lambda k: (k / steps) ** 2,
        "step_0.6": lambda k: k >= 6,
        "until_0.5": lambda k: k < 5,
    }
    plain, base = sample(model)
    for schedule, share in shares.items():
        seen, _ = sample(apply_weights(model, weights, 0.8, "test", schedule))
        found[f"{schedule}, passes"] = len(passes)
        found[f"{schedule}, first step is the base's"] = difference(seen[0]["denoised"], plain[0]["denoised"])
        for k in range(steps):
            # the schedule moves on in hundredths, and the times of the steps are whole numbers out of 1000
            low, high = (0.8 * share(min(max(k + slack, 0), steps)) for slack in (-0.15, 0.15))
            strength = 0.8 * share(k)
            tolerance = max(difference(predicted(seen[k], s), predicted(seen[k], strength)) for s in (low, high))
            off = difference(seen[k]["cond_denoised"], predicted(seen[k], strength))
            found[f"{schedule}, step {k}"] = off - tolerance
            far = difference(predicted(seen[k], 0.0), predicted(seen[k], 0.8))
            found["difference of base and tuned"] = max(found["difference of base and tuned"], far)
    found["the MODEL afterwards"] = difference(sample(model)[1], base)
    return found


def apply_again(model, file: str):
    patched, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(file), 1.0, 0)
    return patched


# --- weights that are kept in another form than they stand for

LAYER = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
KEY = f"diffusion_model.{LAYER}.weight"


class Coded(Tensor):
    """As a later ComfyUI's QuantizedTensor: float8 codes and a scale; it claims another dtype and has no storage."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: float, layout: str = "TensorCoreFP8E4M3Layout"):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16, device=codes.device)

    def __init__(self, codes: Tensor, scale: float, layout: str = "TensorCoreFP8E4M3Layout"):
        self.codes, self.scale, self._layout_cls = codes, scale, layout

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.overloadpacket in (torch.ops.aten.detach, torch.ops.aten._to_copy, torch.ops.aten.clone), func
        return cls(args[0].codes.clone(), args[0].scale, args[0]._layout_cls)

    def dequantize(self) -> Tensor:
        return self.codes.float() * self.scale


def quantised() -> dict[str, float | bool | str]:
    """How far what is read is from the codes times the scale, in every form in which a MODEL may keep a weight."""
    model, (codes, scale, change) = small_sd2(), quantised_parts()
    layer, truth = model.model.get_submodule(f"diffusion_model.{LAYER}"), codes.float() * scale
    plain_name = models_in.model_name(model)
    put(layer, Coded(codes, scale))
    list_more(layer)
    refuse_to_load(model)
    found: dict[str, float | bool | str] = {"coded": difference(read(model), truth)}
    found["copied"] = difference(read(model), truth)  # the first reading has changed nothing
    name = models_in.model_name(model)
    found["name"] = len({plain_name, name, models_in.model_name(model)}) == 2
    layer.convert_weight = lambda weight, inplace=False: weight.dequantize() if isinstance(weight, Coded) else weight
    found["converted by its layer"] = difference(read(model), truth)
    tuned = model.clone()
    tuned.add_patches({KEY: ("diff", (change,))}, 0.5)
    found["with a LoRA"] = difference(read(tuned), truth + 0.5 * change)
    model.backup[KEY] = SimpleNamespace(weight=layer.weight)
    put(layer, torch.full_like(truth, 7.0))
    found["patched meanwhile"] = difference(read(tuned), truth + 0.5 * change)
    found["name while patched"] = models_in.model_name(model) == name
    del model.backup[KEY]
    put(layer, Coded(codes, 2 * scale))
    found["name by the scale"] = models_in.model_name(model) != name
    put(layer, torch.empty(codes.shape, device="meta"))
    found["absent from the file"] = difference(read(tuned), 0.5 * change)
    models_in.model_name(model)
    del layer.convert_weight
    return found | {"read-only": difference(*mapped(model, layer))} | quantised_refusals(layer, codes, scale)


def quantised_parts() -> tuple[Tensor, float, Tensor]:
    """Codes in float8, their scale, and what a LoRA changes; codes alone would be far too large."""
    scale = 2.0**-9 * 1.25
    return (64 * drawn(64, 64)).to(torch.float8_e4m3fn), scale, 0.1 * drawn(64, 64)


def put(layer: nn.Module, weight: Tensor) -> None:
    del layer.weight
    layer.weight = nn.Parameter(weight, requires_grad=False)


def read(model) -> Tensor:
    return models_in.baked_weights(model, torch.float32)[f"{LAYER}.weight"]


def list_more(layer: nn.Module) -> None:
    """Its state_dict has names that are none of its attributes, which ComfyUI's get_key_patches cannot bear."""
    lists = layer.state_dict

    def state_dict(*args, **kwargs):
        listed = lists(*args, **kwargs)
        listed |= {f"{kwargs.get('prefix', '')}{name}": torch.ones(()) for name in ("weight_scale", "comfy_quant")}
        return listed

    layer.state_dict = state_dict


def refuse_to_load(model) -> None:
    def refuse(*_, **__):
        raise AssertionError("the MODEL was loaded")

    for name in ("load", "patch_model", "partially_load"):
        setattr(model, name, refuse)


def mapped(model, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """What is read of a weight that is a view of a read-only file, to which the process cannot write, and its truth."""
    truth = drawn(64, 64)
    with NamedTemporaryFile() as file, warnings.catch_warnings(action="ignore"):  # torch warns of read-only memory
        truth.numpy().tofile(file.name)
        view = torch.from_numpy(numpy.memmap(file.name, numpy.float32, mode="r", shape=(64, 64)))
        layer.weight = nn.Parameter(view, requires_grad=False)
        layer.convert_weight = lambda weight, inplace=False: weight.mul_(2) if inplace else weight * 2
        found = read(model)
        models_in.model_name(model)
        put(layer, truth)
        del layer.convert_weight
    return found, 2 * truth


def quantised_refusals(layer: nn.Module, codes: Tensor, scale: float) -> dict[str, str]:
    found = {}
    for kind in ("TensorCoreNVFP4Layout", "TensorCoreMXFP8Layout", "TensorWiseINT8Layout", "TensorCoreFP8E5M2Layout"):
        put(layer, Coded(codes, scale, kind))
        found[kind] = refusal(lambda: check_plain(layer))
    put(layer, codes)
    found["float8"] = refusal(lambda: check_plain(layer))
    layer.scale_weight = torch.tensor(scale)
    found["float8 of another loader"] = refusal(lambda: check_plain(layer))
    return found


def scaled() -> dict[str, float | bool]:
    """The same for a MODEL that ComfyUI itself has made of a file in scaled float8, with the layers of its version."""
    network = small_sd2().model.diffusion_model
    plain = network.state_dict()
    truth, state = dict(plain), dict(plain)
    for name in [f"{path}.weight" for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]:
        scale = plain[name].abs().max() / 448
        state[name] = (plain[name] / scale).to(torch.float8_e4m3fn)
        truth[name] = state[name].float() * scale
        state |= scale_entries(name, scale)
    model = small_sd2(quantised=True)
    model.model.diffusion_model.load_state_dict(state)
    kept = model.model.diffusion_model.get_parameter(f"{LAYER}.weight")
    change = 0.1 * drawn(64, 64)
    tuned = model.clone()
    tuned.add_patches({KEY: ("diff", (change,))}, 0.5)
    found = {"plain": furthest(model, truth), "name": models_in.model_name(model) != models_in.model_name(tuned)}
    name, weight = models_in.model_name(tuned), f"{LAYER}.weight"
    tuned_truth = truth | {weight: truth[weight] + 0.5 * change}
    found["with a LoRA"] = furthest(tuned, tuned_truth)
    found |= both_ways(model, models_in.diffusers_unet(model), drawn(2, 4, 16, 16), drawn(2, 7, 48))
    tuned.patch_model(device_to=CPU)
    found["while loaded"] = furthest(tuned, tuned_truth)
    found["name while loaded"] = models_in.model_name(tuned) == name
    tuned.unpatch_model(device_to=CPU)
    codes = getattr(kept, "_qdata", kept)
    found["the codes are as before"] = bool((codes.float() == state[weight].float()).all())
    return found


def furthest(model, truth: dict[str, Tensor]) -> float:
    baked = models_in.baked_weights(model, torch.float32)
    return max(difference(baked[name], weight) for name, weight in truth.items())


def scale_entries(name: str, scale: Tensor) -> dict[str, Tensor]:
    """What a file has beside a weight in float8, as each version of ComfyUI reads it."""
    if hasattr(comfy.ops, "scaled_fp8_ops"):
        return {name.removesuffix("weight") + "scale_weight": scale}
    form = list(json.dumps({"format": "float8_e4m3fn"}).encode())
    return {f"{name}_scale": scale, name.removesuffix("weight") + "comfy_quant": torch.tensor(form, dtype=torch.uint8)}


# --- the list of names that we use


def needs_() -> dict[str, Any]:
    """What of the list is not here, which of its calls would be refused, and what a start says that lacks something."""
    from execution import PromptQueue
    from server import PromptServer

    told = MethodType(PromptServer.send_sync, object())
    queue = SimpleNamespace(set_flag=MethodType(PromptQueue.set_flag, object()))
    PromptServer.instance = SimpleNamespace(loop=None, routes=RouteTableDef(), send_sync=told, prompt_queue=queue)
    return {
        "missing": needs.missing_names(),
        "calls refused": [line for line in needs.NEEDS.split("\n") if "(" in line and not is_taken(line)],
        "lacking": {
            "convert_lora": start_without(comfy.lora_convert, "convert_lora"),
            "Custom": start_without(comfy_api.latest.io, "Custom"),
        },
    }


def is_taken(line: str) -> bool:
    """Whether the call in a line fits the signature of what it calls."""
    call = ast.parse(line, mode="eval").body
    try:
        inspect.signature(needs.find(line.partition("(")[0])).bind(
            *[None for _ in call.args], **{keyword.arg: None for keyword in call.keywords}
        )
    except TypeError:
        return False
    return True


def start_without(owner: Any, name: str) -> dict[str, Any]:
    """How many nodes there are if ComfyUI lacks a name, and what its log then says."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("comfy_tdpo").addHandler(handler)
    kept = getattr(owner, name)
    delattr(owner, name)
    try:
        nodes = asyncio.run(ask_for_nodes())
    finally:
        setattr(owner, name, kept)
        logging.getLogger("comfy_tdpo").removeHandler(handler)
    return {"nodes": len(nodes), "log": lines}


async def ask_for_nodes() -> list:
    for name in [name for name in sys.modules if name.startswith("comfy_tdpo.nodes.") and "needs" not in name]:
        del sys.modules[name]  # as at a start
    return await (await comfy_tdpo.nodes.comfy_entrypoint()).get_node_list()


# --- what is refused


class SimpleVAE(SimpleNamespace):
    """A VAE, as far as it is asked before it is refused."""

    def __init__(self, channels: int):
        super().__init__(latent_channels=channels)

    def throw_exception_if_invalid(self) -> None:
        pass


def refusals() -> dict[str, str]:
    """What a user reads who wires in something else."""
    from comfy_tdpo.trainer.config import make_config

    model, clip, vae = shapes_out.shapes_native()
    families = {
        "SD3": comfy.supported_models.SD3({"in_channels": 16, "pos_embed_scaling_factor": None}),
        "Flux": comfy.supported_models.Flux({"image_model": "flux", "guidance_embed": True}),
        "SDXL": comfy.supported_models.SDXL({"model_channels": 320, "context_dim": 2048, "adm_in_channels": 2816}),
        "inpainting": comfy.supported_models.SD15({"model_channels": 320, "context_dim": 768, "in_channels": 9}),
    }
    others = {
        name: lambda config=config: models_in.diffusers_unet(
            SimpleNamespace(model=SimpleNamespace(model_config=config))
        )
        for name, config in families.items()
    }
    config = make_config("shapes")
    blended = model.clone()
    blended.hook_patches = {object(): {"diffusion_model.out.2.weight": []}}
    wires = {
        "blended": lambda: models_in.Wires(blended, clip, vae).wanted(),
        "another CLIP": lambda: models_in.Wires(small_sd2(), clip, vae).factory(config, Prompts(PROMPTS), CPU),
        "another VAE": lambda: ComfyDecoder(SimpleVAE(16), model),
        "no CLIP": lambda: models_in.Wires(model, None, vae).wanted(),
        "no VAE": lambda: models_in.Wires(model, clip, None).wanted(),
    }
    return {name: refusal(ask) for name, ask in (others | wires).items()}


def broken(network: nn.Module, name: str) -> None:
    """One value of a weight becomes NaN."""
    with torch.no_grad():
        network.get_parameter(name).view(-1)[1] = torch.nan


def damaged() -> dict[str, str]:
    """What a user reads who wires in weights that are NaN, or no numbers."""
    from comfy_tdpo.trainer.config import make_config

    def refused(wire: str = "", name: str = "", change: Callable = lambda *wires: None) -> str:
        model, clip, vae = shapes_out.shapes_native()
        networks = {"MODEL": model.model.diffusion_model, "CLIP": clip.cond_stage_model, "VAE": vae.first_stage_model}
        if name:
            broken(networks[wire], name)
        change(model, networks["MODEL"])
        wires = models_in.Wires(model, clip, vae)
        return refusal(lambda: (wires.wanted(reward=None), wires.factory(make_config("shapes"), Prompts(PROMPTS), CPU)))

    def lora(model, network) -> None:
        change = torch.full_like(network.input_blocks[0][0].weight, torch.nan)
        model.add_patches({"diffusion_model.input_blocks.0.0.weight": ("diff", (change,))})

    def coded(model, network) -> None:
        layer = network.out[2]
        del layer.weight
        layer.weight = nn.Parameter(Coded(torch.zeros(4, 4), 1.0, "TensorCoreNVFP4Layout"), requires_grad=False)

    def bytes_(model, network) -> None:
        network.out[2].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)

    return {
        "as it is": refused(),
        "NaN in the MODEL": refused("MODEL", "input_blocks.0.0.weight"),
        "NaN in a LoRA": refused(change=lora),
        "NaN in the CLIP": refused("CLIP", "clip_l.transformer.text_model.final_layer_norm.weight"),
        "NaN in the VAE": refused("VAE", "decoder.conv_in.weight"),
        "NaN in the VAE's encoder": refused("VAE", "encoder.conv_in.weight"),
        "quantised": refused(change=coded),
        "integers": refused(change=bytes_),
    }


def refusal(ask: Callable[[], object]) -> str:
    try:
        ask()
    except ValueError as error:
        return str(error)
    return "was not refused"


if __name__ == "__main__":
    torch.set_num_threads(1)
    questions = {"shapes": shapes, "sd2": sd2, "sd1": sd1, "lora": lora, "refusals": refusals, "damaged": damaged}
    questions |= {"baked": baked, "blended": blended, "decoders": decoders, "thread": thread}
    questions |= {"syntax": syntax, "weights": weights, "quantised": quantised, "scaled": scaled, "needs": needs_}
    with torch.no_grad():
        print(json.dumps(questions[QUESTION](*FILES)))
