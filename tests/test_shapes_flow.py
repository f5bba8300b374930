"""The flow model that ships with Shapes: found by its name, sharing the U-Net's other parts, trained and resumed."""

import shutil

import pytest
import torch
from benchmark_files import benchmark
from family_training import TRAININGS, check_training
from safetensors.torch import load_file

from comfy_tdpo.methods.encoder import encoder_of
from comfy_tdpo.models import load_model, outline
from comfy_tdpo.models.components import load_components
from comfy_tdpo.process.flow_schedule import FlowSchedule
from comfy_tdpo.settings import PolicySettings
from comfy_tdpo.shapes import MODELS, WORLD
from comfy_tdpo.trainer.assemble import model_source
from comfy_tdpo.trainer.config import make_config, presets
from comfy_tdpo.trainer.recommend.options import is_of_shapes

FLOW = MODELS["shapes-flow"]


@pytest.fixture(scope="module")
def model():
    return load_model(str(FLOW), torch.float32)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_world_is_named_like_its_preset(name):
    assert name in presets()
    config = make_config(overrides={"model": name})
    assert config == make_config(name) and config.model == name
    assert model_source(config) == str(MODELS[name])
    other = make_config(name, overrides={"rewards": {"jpeg-compressibility": 1.0}, "guards": []})
    assert is_of_shapes(other) and encoder_of(other) == "shapes-aesthetic"


def test_what_it_draws_with_is_told_without_loading_it():
    assert outline(str(FLOW)) == (FlowSchedule(1.0), "flow-ddim", 8, 2, None, ())
    with pytest.raises(ValueError, match="and the flow model of Shapes predicts the flow.*remove prediction_type"):
        outline(str(FLOW), "epsilon")


def test_it_shares_the_autoencoder_and_the_text_encoder_of_the_u_net(model):
    parts = load_components(str(MODELS["shapes"]))
    for name in ("vae", "text_encoder"):
        expected = getattr(parts, name).state_dict()
        assert all(torch.equal(expected[key], weight) for key, weight in model.networks[name].state_dict().items())
    assert {path.name for path in FLOW.iterdir()} == {"model_index.json", "scheduler", "transformer"}


@torch.no_grad()
def test_it_is_conditioned_on_the_states_and_the_pooled_state_of_the_text(model):
    prompts = ["a red circle", "two blue squares on a green background"]
    tokenizer, text = model.encode.tokenizer, model.networks["text_encoder"]
    ids = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    states, parts = text(ids).last_hidden_state, model.encode(prompts).parts
    assert ids.shape == (2, 16) and torch.equal(parts["states"], states)
    ends = (ids == tokenizer.eos_token_id).int().argmax(1)  # the first of each row, as the text is padded with them
    assert torch.equal(parts["pooled"], states[torch.arange(2), ends])
    latents, times = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([900.5, 30.0])
    expected = model.denoise(latents, times, model.encode(prompts))
    for part in ("states", "pooled"):
        other = model.encode(prompts)
        other.parts[part][:, -1] += 1
        assert not torch.equal(model.denoise(latents, times, other), expected)


@pytest.mark.parametrize(("algorithm", "train"), TRAININGS)
def test_it_trains_and_resumes_to_the_last_bit(tmp_path, algorithm, train):
    check_training(FLOW, 64, tmp_path, algorithm, train)


def test_its_lora_has_the_names_of_a_transformer(tmp_path):
    model = load_model(str(FLOW), torch.float32)
    model.adapt(PolicySettings(), seed=0).export(tmp_path / "lora.safetensors", {})
    names = load_file(tmp_path / "lora.safetensors").keys()
    assert len(names) == 2 * (3 * 8 - 1)  # the last block drops the text
    assert all(name.startswith("transformer.transformer_blocks.") for name in names)


def test_it_draws_no_larger_images_than_it_knows_places_for(model):
    assert (
        model.denoise(torch.zeros(1, 4, 8, 4), torch.tensor([500.0]), model.encode(["a red circle"])).isfinite().all()
    )
    with pytest.raises(ValueError, match="got a resolution above 64 pixels, the largest that .*flow can draw"):
        model.denoise(torch.zeros(1, 4, 8, 10), torch.tensor([500.0]), model.encode(["a red circle"]))


def test_the_parts_that_it_shares_are_asked_for_by_name(tmp_path):
    shutil.copytree(FLOW, tmp_path / "flow")
    with pytest.raises(ValueError, match=r"pipeline lacks vae/config\.json"):
        load_model(str(tmp_path / "flow"), torch.float32)
    assert not (WORLD / "flow" / "vae").exists()


# --- the benchmark's page


def test_the_benchmark_counts_the_seeds_that_gain_enough(tmp_path):
    flow, out = benchmark("shapes_flow"), tmp_path / "flow.jsonl"
    for seed, end in ((1, 6.6), (2, 5.9)):
        values = {"reward": [5.0, end, end, end], "std": [1.5] * 4, "queries": [96, 192, 288, 384], "seconds": [20] * 4}
        series = values | {"shapes-gold": [0.7, 0.7, 0.6, 0.5], "shapes-judge": [0.8, 0.7, 0.7, 0.7]}
        mark = flow.fingerprint(flow.config_of("shapes-flow", seed))
        flow.add(out, {"preset": "shapes-flow", "seed": seed, "settings": mark}, series)
    flow.add(out, {"preset": "shapes-flow", "seed": 3, "settings": "of another preset"}, series)
    page = flow.page(out)
    # a gain of 1.6 / 1.5, and the first values less the means of the last three
    assert "| shapes-flow | 1 | 1.07 | 0.70 | 0.10 | 0.80 | 0.10 | 80 |" in page
    assert "1 of 2 seeds reach +1.0." in page
