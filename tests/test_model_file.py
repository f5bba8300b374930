"""What a single file of each family lacks, and where it is read instead."""

from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from comfy_tdpo.models import flux_file, sd3_file, z_image_file
from comfy_tdpo.models.model_file import ModelFile
from comfy_tdpo.models.weights import Weights

SD3, FLUX, Z_IMAGE = (file.LAYOUT for file in (sd3_file, flux_file, z_image_file))


@pytest.mark.parametrize(
    ("layout", "inside", "beside", "missing"),
    [
        (SD3, [], ["transformer"], "vae, text_encoder, text_encoder_2"),
        (SD3, ["vae", "text_encoder"], ["tokenizer_3"], "text_encoder_2"),
        (SD3, ["vae", "text_encoder", "text_encoder_2", "text_encoder_3"], [], "tokenizer_3"),
        (SD3, ["vae"], ["text_encoder", "text_encoder_2", "text_encoder_3"], "tokenizer_3"),
        (FLUX, [], [], "vae, text_encoder, text_encoder_2, tokenizer_2"),
        (FLUX, ["vae", "text_encoder", "text_encoder_2"], [], "tokenizer_2"),
        (FLUX, ["text_encoder_2"], ["vae", "tokenizer_2"], "text_encoder"),
        (Z_IMAGE, [], [], "vae, text_encoder, tokenizer, scheduler"),
        (Z_IMAGE, ["text_encoder"], ["vae", "tokenizer"], "scheduler"),
        (Z_IMAGE, ["vae", "text_encoder"], ["scheduler"], "tokenizer"),
    ],
)
def test_what_a_file_and_its_folder_lack_is_named(tmp_path, layout, inside, beside, missing):
    """Already by `outline`, and with where it is found. CLIP's tokenizers come with the package, and Stable Diffusion 3
    needs no T5."""
    path, held = tmp_path / "mine.safetensors", ["transformer", *inside]
    save_file({f"{layout.parts[name].begins[0]}0.weight": torch.zeros(1) for name in held}, path)
    for name in beside:
        (tmp_path / name).mkdir()
    file = ModelFile(layout, Weights([path]), tmp_path)
    expected = f"{path} has {', '.join(held)} of {layout.family}, and neither the file nor its folder has {missing};"
    for read in (file.outline, partial(file.load, torch.float32)):
        with pytest.raises(ValueError) as error:
            read()
        assert str(error.value).startswith(expected)
        assert f"move it into a download of {layout.downloads}" in str(error.value)
