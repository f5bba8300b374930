"""Native models of ComfyUI and ours are the same; checked under the Python of a real ComfyUI, where there is one."""

from types import SimpleNamespace

import comfyui
import pytest
import torch
from backends import NEWER, OLDEST, ask, each, skipped_without
from safetensors.torch import load_file, save_file

from comfy_tdpo.models.components import load_components
from comfy_tdpo.models.full import AllWeights
from comfy_tdpo.models.lora import UNetLora
from comfy_tdpo.nodes.comfy.weights_in import layout_of
from comfy_tdpo.shapes import WORLD

pytestmark = pytest.mark.skipif(bool(comfyui.MISSING), reason=comfyui.MISSING)


in_each = pytest.mark.parametrize("backend", each())
in_oldest = pytest.mark.parametrize("backend", each(full=NEWER))


@in_oldest
@pytest.mark.parametrize("part", ["text", "native unet", "unet from native", "decoder", "native vae", "alpha_bar"])
def test_shapes_is_the_same_inside_and_outside_of_comfyui(part, backend):
    # float32 of size up to 5 through some twenty layers, in another order: measured 1e-6, with other group norms 0.7
    assert ask("shapes", backend=backend)[part] <= 1e-5
    assert ask("shapes", backend=backend)["scale of the output"] > 1


@in_each
@pytest.mark.parametrize("kind", ["KL", "KL in bf16", "TAESD"])
def test_the_copy_of_a_decoder_asks_nothing_of_comfyui(kind, backend):
    """It runs on the training thread, where a question takes the user's Cancel from the executor."""
    found = ask("decoders", backend=backend)
    assert found[f"{kind}, layers of ComfyUI"] == 0
    # attention in another order, in float32, and by two units of bf16 at 1
    assert found[kind] <= (1e-6 if kind != "KL in bf16" else 2**-6)
    assert found[f"{kind}, varies by"] > 0.05


def test_weights_in_a_prompt_are_for_clip_as_in_comfyuis_own_node():
    found = ask("weights")
    assert found["prompt"] == "a red circle"
    assert found["off its line"] == 0
    assert found["off its words"] > 0.05  # a weight of 1.5 moves embeddings of size 1


def test_the_training_thread_asks_nothing_of_comfyui():
    assert ask("thread") == {"state": "finished", "error": None, "table": "True"}


def test_the_layout_of_sd2_is_converted():
    # float32 through some hundred layers, in another order
    assert ask("sd2")["unet from native"] <= 1e-5
    assert ask("sd2")["scale of the output"] > 1


# --- families: what is alike in all of them


FAMILIES = [
    pytest.param(*values, id="-".join((values[0], values[1].name)), marks=[skipped_without(values[1]), *marks])
    for values, *marks in (
        (("sdxl", OLDEST, 20),),
        (("sdxl", NEWER, 20), pytest.mark.full),
        (("sd3", OLDEST, 10),),
        (("flux", OLDEST, 6),),
        (("shapes_flow", OLDEST, 10),),
        (("z_image", NEWER, 8),),
    )
]
in_each_family = pytest.mark.parametrize(("family", "backend", "steps"), FAMILIES)


@in_each_family
def test_a_network_is_the_same_inside_and_outside_of_comfyui(family, backend, steps):
    """In its own layout, and but for Shapes for images that are not square."""
    for found in ask(family, backend=backend)["networks"].values():
        # float32 through some dozen layers, in another order
        assert found["network from native"] <= 1e-5 * found["scale of the output"] > 1e-5


@in_each_family
def test_a_lora_is_the_same_in_comfyui_and_diffusers(family, backend, steps):
    for found in ask(family, backend=backend)["networks"].values():
        assert found["modules of the LoRA that ComfyUI leaves out"] == 0
        # float32 again; the LoRA is added to the weights there and to the activations here
        for where in ("in ComfyUI", "in diffusers", "baked in"):
            assert found[f"LoRA {where}"] <= 1e-5 * found["scale of the output"], where
        assert found["what the LoRA changes"] > 0.1


@in_each_family
def test_a_family_trains_on_a_thread_that_asks_nothing_of_comfyui(family, backend, steps):
    """By its preset, but for the size."""
    expected = {"state": "finished", "error": None, "preset's steps": steps}
    assert ask(family, backend=backend)["job"] == expected


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        pytest.param(family, backend, id=family, marks=skipped_without(backend))
        for family, backend in (("sd3", OLDEST), ("flux", OLDEST), ("z_image", NEWER))
    ],
)
def test_a_whole_model_that_is_no_unet_is_loaded_by_comfyuis_own_node(family, backend):
    assert "for a MODEL that is no U-Net" in ask(family, backend=backend)["a whole model"]


# --- families: what is special to each


@in_oldest
def test_the_encoders_of_sdxl_are_those_of_comfyui(backend):
    found = ask("sdxl", backend=backend)
    # float32 through some layers, in another order
    assert found["states"] <= 1e-5 and found["pooled"] <= 1e-5
    assert found["networks"]["XL"]["what the sizes change"] > 1e-3


def test_the_published_sdxl_has_the_names_and_the_configuration_of_comfyuis():
    """At true size, without memory; a LoRA is named after weights, so its names are known too."""
    assert ask("sdxl")["unknown names"] == [] and ask("sdxl")["other settings"] == []


@in_each
def test_the_encoders_of_sd3_are_those_of_comfyui(backend):
    """T5 among them."""
    found = ask("sd3", backend=backend)
    assert found["states"] == 0 and found["pooled"] == 0


@in_each
def test_t5_pads_prompts_to_the_length_of_the_longest(backend):
    """Which changes nothing of CLIP's states; a prompt that is too long for CLIP is refused."""
    found = ask("sd3", backend=backend)
    own, alone, beside = found["tokens"]
    assert own == alone == 77 + 77 < beside
    assert found["states of CLIP beside a longer prompt"] == 0
    assert "is longer than what CLIP reads at once (77 tokens in Stable Diffusion 3" in found["a prompt too long"]


@in_each
def test_the_noise_levels_of_sd3_are_those_of_comfyuis_simple_scheduler(backend):
    found = ask("sd3", backend=backend)
    assert found["shifts"] == [3.0, 5.0]
    assert found["levels"] <= 1e-6  # theirs are float32
    assert "other noise levels (" in found["other levels"] and "use ModelSamplingSD3" in found["other levels"]


def test_the_published_sd3_has_the_names_and_the_configuration_of_comfyuis():
    """At true size, without memory; a LoRA is named after weights, so its names are known too."""
    assert ask("sd3")["published"] == dict.fromkeys(
        ("3 medium", "3.5 medium"), {"unknown names": [], "other settings": [], "other weights of a file": []}
    )


def test_guidance_makes_a_difference_for_flux_dev_alone():
    found = ask("flux")["networks"]
    assert found["dev"]["what guidance changes"] > 0.1 >= found["schnell"]["what guidance changes"]


def test_the_encoders_of_flux_are_those_of_comfyui():
    """T5 pads all prompts to the length of the longest, and to 256 at least; CLIP is that of a diffusers folder too."""
    found = ask("flux")
    assert found["states"] == 0 and found["pooled"] == 0
    assert found["pooled by transformers"] <= 1e-5  # float32 through three layers, in another order
    alone, beside = found["tokens"]
    assert alone == 256 < beside


def test_the_noise_levels_of_flux_are_those_of_comfyuis_simple_scheduler():
    """Of dev, those for 1024 px unless ModelSamplingFlux is told another size."""
    found = ask("flux")["schedules"]
    # theirs are float32
    assert [round(one["mu"], 6) for one in found.values()] == [1.15, 0.63, 0]
    assert max(one["levels"] for one in found.values()) <= 1e-6
    assert "other noise levels (" in ask("flux")["other levels"]


def test_the_published_flux_has_the_names_and_the_configuration_of_comfyuis():
    """At true size, without memory. A LoRA has 12 layers in each of 19 blocks, and 5 in each of 38."""
    assert ask("flux")["published"] == dict.fromkeys(
        ("dev", "schnell"),
        {"layers of a LoRA": 19 * 12 + 38 * 5, "unknown layers": [], "unknown names": [], "other settings": []},
    )


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("Fill", "got a MODEL of the family FluxInpaint with in_channels 96, unlike FLUX.1 dev and schnell"),
        ("Canny", "got a MODEL of the family Flux with in_channels 32, unlike"),
        ("FLUX.2", "got a MODEL of the family Flux with image_model flux2, unlike"),
        ("no pooled", "got a MODEL of the family Flux with vec_in_dim None, unlike"),
        ("another MLP", "got a MODEL of the family Flux with yak_mlp True, unlike"),
        ("as it is", "was not refused"),
        (
            "another CLIP",
            "got a CLIP that reads prompts as l, and not as t5xxl; expected the CLIP of the MODEL, with T5",
        ),
    ],
)
def test_what_is_no_flux_is_refused_in_one_sentence(what, message):
    assert message in ask("flux")[what] and "\n" not in ask("flux")[what]


def test_flux_schnell_begins_from_its_own_preset():
    assert ask("flux")["preset of schnell"] == "flux-schnell"


def test_the_flow_model_of_shapes_is_the_same_inside_and_outside_of_comfyui():
    found = ask("shapes_flow")
    # float32 of size up to 5 through a few layers, in another order
    assert max(found[part] for part in ("states", "pooled", "native transformer")) <= 1e-5
    assert found["shift"] == 1.0


def test_comfyuis_own_sampler_draws_with_the_flow_model_what_we_draw():
    # ten steps, each with the differences of a call, which guidance multiplies by up to 5
    assert ask("shapes_flow")["drawn by ComfyUI"] <= 1e-4


def test_the_flow_model_begins_from_its_own_preset():
    assert ask("shapes_flow")["preset"] == "shapes-flow"


# --- Z-Image, which ComfyUI knows from 0.10 on


newer = skipped_without(NEWER)


@in_each
def test_a_comfyui_that_does_not_know_z_image_is_told_which_does(backend):
    assert ask("z_image", backend=backend)["as Lumina 2"] == (
        "got a MODEL of Z-Image, whose layers this ComfyUI does not know; expected ComfyUI 0.10 or newer: update it"
    )


@newer
def test_the_encoder_of_z_image_is_that_of_comfyui():
    """Its language model and its template."""
    found = ask("z_image", backend=NEWER)
    assert found["tokens"] == found["tokens of ours"] and len(set(found["tokens"])) == 2
    assert found["states"] <= 1e-5 and found["scale of the states"] > 1


@newer
def test_the_shift_of_a_z_image_chooses_its_preset():
    found = ask("z_image", backend=NEWER)
    assert found["shifts"] == [3.0, 6.0] and found["presets"] == ["z-image-turbo", "z-image"]
    assert found["levels"] <= 1e-6  # theirs are float32
    assert "a MODEL of Z-Image with other noise levels (" in found["other levels"]
    assert "use ModelSamplingAuraFlow" in found["other levels"]


@newer
def test_the_published_z_image_has_the_names_and_the_configuration_of_comfyuis():
    """At true size, without memory, and so has each module of a LoRA: 7 in each of 34 blocks."""
    found = ask("z_image", backend=NEWER)
    assert found["unknown names"] == [] and found["other settings"] == []
    assert found["unknown modules"] == [] and found["modules"] == 7 * 34


@pytest.mark.slow
@pytest.mark.full
def test_the_shape_of_sd15_is_converted():
    assert ask("sd1")["unet from native"] <= 1e-5
    assert ask("sd1")["as it was before ComfyUI"] == 0
    assert ask("sd1")["scale of the output"] > 1


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory) -> str:
    """A LoRA that changes much, of all targets and with an alpha that is not its rank."""
    unet = load_components(str(WORLD / "pipeline")).unet
    lora = UNetLora(unet, rank=4, alpha=2.0, targets="attention+feed-forward", seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_file(lora.file_state(), path)
    return str(path)


@in_each
@pytest.mark.parametrize("by", ["Apply", "diffusers", "baked in"])
def test_a_lora_is_the_same_whoever_applies_it(lora_file, by, backend):
    # float32 again; the LoRA is added to the weights here and to the activations there
    assert ask("lora", lora_file, backend=backend)[by] <= 1e-5
    assert ask("lora", lora_file, backend=backend)["what it changes"] > 0.1


@in_each
def test_all_weights_of_a_run_are_the_same_in_comfyui_and_diffusers(tmp_path, backend):
    policy = AllWeights(load_components(str(WORLD / "pipeline")).unet)
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters.values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    policy.export(tmp_path / "model.safetensors", {"epoch": "1"})
    found = ask("whole", str(tmp_path / "model.safetensors"), backend=backend)
    for name in ("Apply at 1", "Apply at 0.5", "baked in at 1", "baked in at 0.5"):
        assert found[name] <= 1e-4, name  # float32; outputs to 10 through some twenty layers, in another order
    assert found["what it changes"] > 0.1 and found["the MODEL afterwards"] == 0 and found["refused"] == 1
    assert found["a checkpoint's U-Net"] == 0 and found["its other weights"] == 0, "by core's Save Checkpoint"


def test_a_baked_strength_is_that_strength_in_comfyui(lora_file, tmp_path):
    """ComfyUI's own Load LoRA at strength 1, against the snapshot at the strength that is baked in."""
    lora = UNetLora(load_components(str(WORLD / "pipeline")).unet, 4, 2.0, "attention+feed-forward", seed=1)
    lora.load_exported(load_file(lora_file), 0.75)
    lora.export(tmp_path / "recommended.safetensors", {"strength": "0.75"})
    found = ask("baked", lora_file, str(tmp_path / "recommended.safetensors"), "0.75")
    # float32 of size up to 5: the strength is multiplied in at another place
    assert found["Load LoRA"] <= 1e-5
    assert found["what strength changes"] > 0.02


@in_oldest
@pytest.mark.parametrize("schedule", ["linear", "power_2", "step_0.6", "until_0.5"])
def test_a_blended_lora_has_at_each_step_the_strength_of_its_schedule(lora_file, schedule, backend):
    """Every step of a real sampling, against the LoRA in the weights at the strength of that step; one pass a step."""
    found = ask("blended", lora_file, backend=backend)
    assert (found[f"{schedule}, first step is the base's"] == 0) == (schedule != "until_0.5")
    assert found[f"{schedule}, passes"] == 10, "one pass a step, for both halves of the guidance"
    # float32 of latents up to 15, beyond what 0.15 steps more or less make
    assert all(found[f"{schedule}, step {k}"] <= 5e-5 for k in range(10))
    assert found["difference of base and tuned"] > 0.5 and found["the MODEL afterwards"] == 0


def test_a_models_name_tells_it_from_others(lora_file):
    assert ask("lora", lora_file)["names differ"] and ask("lora", lora_file)["names repeat"]


# --- weights that are kept in another form than they stand for: exact, as a float8 code times a float32 has one value


@pytest.mark.parametrize(
    "form",
    [
        "coded",
        "copied",
        "converted by its layer",
        "with a LoRA",
        "patched meanwhile",
        "absent from the file",
        "read-only",
    ],
)
def test_a_weight_is_read_whatever_comfyui_keeps_it_as(form):
    assert ask("quantised")[form] == 0


@in_each
@pytest.mark.parametrize("form", ["plain", "with a LoRA", "while loaded"])
def test_float8_with_scales_is_multiplied_out(form, backend):
    """In the layers of each version, with a LoRA on the MODEL or not, and while ComfyUI has it patched in."""
    found = ask("scaled", backend=backend)
    assert found[form] == 0 and found["the codes are as before"]
    # float32 through some hundred layers, in another order; codes alone would be a thousand times larger
    assert found["unet from native"] <= 1e-5 and found["scale of the output"] > 1


@in_each
def test_the_name_of_a_quantised_model_is_that_of_its_values(backend):
    """It is the same while a LoRA is patched in, and another with other scales."""
    assert ask("scaled", backend=backend)["name"] and ask("scaled", backend=backend)["name while loaded"]
    found = ask("quantised")
    assert found["name"] and found["name while patched"] and found["name by the scale"]


def test_a_kind_is_known_by_its_name_of_late_2025_too():
    assert [layout_of(SimpleNamespace(**{name: "A"})) for name in ("_layout_cls", "_layout_type")] == ["A", "A"]
    assert layout_of(torch.zeros(1)) == ""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("TensorCoreNVFP4Layout", "is stored as TensorCoreNVFP4Layout; expected weights in fp32, fp16, bf16 or float8"),
        ("TensorCoreMXFP8Layout", "is stored as TensorCoreMXFP8Layout; expected weights in fp32"),
        ("TensorWiseINT8Layout", "is stored as TensorWiseINT8Layout; expected weights in fp32"),
        ("GGUF", "got a MODEL that is quantised: .weight is stored as GGUF Q4_0; expected weights in fp32, fp16, bf16"),
        ("float8 of another loader", "is stored as float8 with a scale_weight that only its own loader can apply"),
        ("TensorCoreFP8E5M2Layout", "was not refused"),
        ("float8", "was not refused"),
    ],
)
def test_which_forms_are_refused(what, message):
    assert message in ask("quantised")[what]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("AuraFlow", "got a MODEL of AuraFlow; expected Stable Diffusion 1.x, 2.x, XL, 3 or 3.5 medium, FLUX.1, "),
        ("QwenImage", "got a MODEL of Qwen-Image; expected"),
        ("Chroma", "got a MODEL of Chroma; expected"),
        ("PixArtSigma", "got a MODEL of PixArt; expected"),
        ("WAN21_T2V", "got a MODEL of Wan; expected Stable"),
        ("Stable_Cascade_C", "got a MODEL of Stable Cascade; expected"),
        ("StableAudio", "got a MODEL of the family StableAudio; expected"),
        ("SD 3.5 large", "got a MODEL of Stable Diffusion 3.5 large; expected Stable Diffusion 1.x"),
        ("SDXLRefiner", "got a MODEL of SDXL's refiner, which cannot begin from noise; expected"),
        ("SSD1B", "got a MODEL of SDXL made smaller; expected"),
        ("another CLIP for XL", "got a CLIP whose embeddings are 64 wide; expected 80: use the CLIP of the MODEL's"),
        (
            "lcm",
            "a MODEL that ModelSamplingDiscrete has set to lcm; expected one without that node: connect what it has",
        ),
        ("EDM", "got a MODEL of Playground 2.5 or CosXL, with the noise levels of EDM; expected"),
        ("inpainting", "takes 9 channels (inpainting); expected"),
        (
            "blended",
            "a LoRA whose strength changes over the sampling steps, which cannot become part of the base model",
        ),
        ("another CLIP", "embeddings are 64 wide; expected 48: use the CLIP of the MODEL's checkpoint"),
        ("another VAE", "got a VAE with 16 latent channels; expected 4: use the VAE of the MODEL's checkpoint"),
        ("no CLIP", "got no CLIP, as the checkpoint has none; expected one"),
        ("no VAE", "got no VAE, as the checkpoint has none; expected one"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_sentence(what, message):
    assert message in ask("refusals")[what] and "\n" not in ask("refusals")[what]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("NaN in the MODEL", "got a MODEL whose weight input_blocks.0.0.weight holds NaN or infinity (1 of"),
        ("NaN in a LoRA", "got a LoRA on the MODEL that makes input_blocks.0.0.weight NaN or infinite"),
        (
            "NaN in the CLIP",
            "got a CLIP whose weight clip_l.transformer.text_model.final_layer_norm.weight holds",
        ),
        ("NaN in the VAE", "got a VAE whose weight decoder.conv_in.weight holds NaN or infinity (1 of"),
        ("quantised", "got a MODEL that is quantised: out.2.weight is stored as TensorCoreNVFP4Layout; expected"),
        ("integers", "got a MODEL that is quantised: out.2.weight is stored as uint8; expected weights in fp32"),
        ("as it is", "was not refused"),
        ("NaN in the VAE's encoder", "was not refused"),  # it only decodes
    ],
)
def test_weights_that_are_no_numbers_are_refused_by_name(what, message):
    assert message in ask("damaged")[what] and "\n" not in ask("damaged")[what]
