"""LoRA files: every tool that reads kohya's format gets the policy that was trained."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from comfy_tdpo.models.lora import ATTENTION, TARGETS, UNetLora

RANK = 4
BLOCKS = (  # of the tiny U-Net's transformers, by hand
    "down_blocks_0_attentions_0_transformer_blocks_0",
    "mid_block_attentions_0_transformer_blocks_0",
    "up_blocks_1_attentions_0_transformer_blocks_0",
    "up_blocks_1_attentions_1_transformer_blocks_0",
)
PROJECTIONS = {
    "attention": [f"{attn}_{p}" for attn in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v", "to_out_0")],
}
PROJECTIONS["attention+feed-forward"] = [*PROJECTIONS["attention"], "ff_net_0_proj", "ff_net_2"]


def save(policy, path) -> None:
    policy.trainable.export(path, {"base_model": policy.model.source, "epoch": "7"})


@torch.no_grad()
def output(unet, generator_seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(generator_seed)
    latents, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 32, generator=generator)
    return unet(latents, torch.tensor([981, 21]), states, return_dict=False)[0]


@pytest.fixture(params=[("attention", RANK), ("attention+feed-forward", RANK), ("attention", 7.0)])
def trained(request, make_policy):
    """A policy whose LoRA does something, for both settings of `targets` and an alpha that is not the rank."""
    targets, alpha = request.param
    return make_policy(trained=True, rank=RANK, alpha=alpha, targets=targets)


# --- the file


@pytest.mark.parametrize("targets", TARGETS)
def test_keys_are_kohyas(make_policy, tmp_path, targets):
    policy = make_policy(trained=True, rank=RANK, alpha=7.0, targets=targets)
    save(policy, tmp_path / "lora.safetensors")
    state = load_file(tmp_path / "lora.safetensors")
    modules = [f"lora_unet_{block}_{projection}" for block in BLOCKS for projection in PROJECTIONS[targets]]
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert state.keys() == {f"{module}.{part}" for module in modules for part in parts}
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight" in state
    for module in modules:
        down, up, alpha = (state[f"{module}.{part}"] for part in parts)
        assert {down.dtype, up.dtype, alpha.dtype} == {torch.float32}
        assert down.shape[0] == up.shape[1] == RANK
        assert alpha.shape == () and alpha.item() == 7.0


def test_metadata_lies_in_the_header(make_policy, tmp_path):
    save(make_policy(), tmp_path / "lora.safetensors")
    with safe_open(tmp_path / "lora.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "base_model": "tiny", "epoch": "7"}


def test_diffusers_loads_the_file_as_the_trained_policy(trained, make_components, tmp_path):
    save(trained, tmp_path / "lora.safetensors")
    parts = make_components()
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
    before = output(pipeline.unet)
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    expected, got = output(trained.model.network), output(pipeline.unet)
    # float32: outputs near 1; alpha is multiplied in at another place, 6e-8 a layer
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert (expected - before).abs().max() > 1e-2, "the LoRA must make a difference"


def test_merged_by_kohyas_definition_it_is_the_trained_policy(trained, make_components, tmp_path):
    """W + alpha / rank * up @ down, for the module that the key names: what ComfyUI and A1111 compute."""
    save(trained, tmp_path / "lora.safetensors")
    state, unet = load_file(tmp_path / "lora.safetensors"), make_components().unet
    for name, module in unet.named_modules():
        key = f"lora_unet_{name.replace('.', '_')}"
        if f"{key}.alpha" in state:
            down, up = state.pop(f"{key}.lora_down.weight"), state.pop(f"{key}.lora_up.weight")
            module.weight.data += state.pop(f"{key}.alpha") / len(down) * up @ down
    assert not state, "every key names a module"
    # float32: outputs near 1 through a dozen layers whose sums are taken in another order
    torch.testing.assert_close(output(unet), output(trained.model.network), rtol=0, atol=1e-5)


# --- checkpoints


def test_state_goes_round_without_losing_a_bit(trained, make_policy, tmp_path):
    save_file(trained.trainable.state(), tmp_path / "state.safetensors")
    targets = "attention" if len(trained.parameters) == 2 * 32 else "attention+feed-forward"
    other = make_policy(rank=RANK, alpha=trained.trainable.alpha, targets=targets)
    with torch.no_grad():
        for parameter in other.parameters:
            parameter.fill_(9.0)
    other.trainable.load(load_file(tmp_path / "state.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters, trained.parameters, strict=True))
    assert torch.equal(output(other.model.network), output(trained.model.network))
    in_network = [parameter for parameter in other.model.network.parameters() if parameter.requires_grad]
    assert all(a is b for a, b in zip(other.parameters, in_network, strict=True)), (
        "an optimizer made before holds the same parameters"
    )


def test_weights_of_another_lora_are_refused(make_policy):
    wide, narrow = make_policy(targets="attention+feed-forward"), make_policy(targets="attention")
    for policy, state in ((narrow, wide.trainable.state()), (wide, narrow.trainable.state()), (narrow, {})):
        before = [parameter.clone() for parameter in policy.parameters]
        with pytest.raises(ValueError, match=r"got LoRA weights of another model .*; expected .* policy\.targets"):
            policy.trainable.load(state)
        assert all(torch.equal(a, b) for a, b in zip(policy.parameters, before, strict=True))


# --- files that are loaded again


def test_a_file_at_strength_1_and_0_is_the_snapshot_and_the_base_to_the_bit(trained, make_policy, tmp_path):
    save(trained, tmp_path / "lora.safetensors")
    weights, expected = load_file(tmp_path / "lora.safetensors"), output(trained.model.network)
    targets = "attention" if len(trained.parameters) == 2 * 32 else "attention+feed-forward"
    other = make_policy(rank=RANK, alpha=trained.trainable.alpha, targets=targets)
    base = output(other.model.network)
    for strength, wanted in ((1.0, expected), (0.0, base), (1.0, expected)):
        other.trainable.load_exported(weights, strength)
        assert torch.equal(output(other.model.network), wanted)
    assert not torch.equal(expected, base)


def test_a_file_at_half_its_strength_adds_half_to_every_layer(trained, make_policy, tmp_path):
    """In the weights, by kohya's definition: alpha / rank * up @ down; and as much in the file written then."""
    save(trained, tmp_path / "lora.safetensors")
    plain = load_file(tmp_path / "lora.safetensors")
    trained.trainable.load_exported(plain, 0.5)
    save(trained, tmp_path / "half.safetensors")
    half = load_file(tmp_path / "half.safetensors")
    modules = [name.removesuffix(".alpha") for name in plain if name.endswith(".alpha")]
    assert plain.keys() == half.keys() and len(modules) == len(plain) / 3
    for module in modules:
        whole, less = (
            state[f"{module}.alpha"] * state[f"{module}.lora_up.weight"] @ state[f"{module}.lora_down.weight"]
            for state in (plain, half)
        )
        assert torch.equal(less, whole / 2), "halving a float is exact"


def test_a_file_of_another_lora_is_refused(make_policy, tmp_path):
    save(make_policy(rank=RANK, alpha=7.0), tmp_path / "lora.safetensors")
    weights = load_file(tmp_path / "lora.safetensors")
    for settings, message in (
        ({"rank": 2, "alpha": 7.0}, r"lora_down.weight is of shape \(4, 32\), here it is of shape \(2, 32\)"),
        ({"rank": RANK}, r"alpha is 7, here it is 4"),
        ({"rank": RANK, "alpha": 7.0, "targets": "attention+feed-forward"}, r"alpha is missing, here it is 7"),
    ):
        policy = make_policy(**settings)
        with pytest.raises(ValueError, match=f"got a LoRA file of another model .*{message}"):
            policy.trainable.load_exported(weights)


# --- adapters


def test_fresh_adapters_change_nothing_and_are_drawn_from_their_seed(make_components):
    unets = {seed: make_components().unet for seed in (1, 2)}
    same = make_components().unet
    before, random_state = output(same), torch.get_rng_state()
    for seed, unet in unets.items():
        UNetLora(unet, RANK, RANK, "attention", seed)
    UNetLora(same, RANK, RANK, "attention", 1)
    assert torch.equal(torch.get_rng_state(), random_state), "the global generator is left alone"
    assert torch.equal(output(same), before)
    a, b, c = ([p for n, p in unet.named_parameters() if "lora_A" in n] for unet in (unets[1], unets[2], same))
    assert all(torch.equal(x, y) for x, y in zip(a, c, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    drawn = torch.cat([p.detach().flatten() for p in a])
    # N(0, 1 / rank); five standard errors, 1 / sqrt(2 n) each, of a standard deviation from n draws
    assert drawn.std().item() * RANK == pytest.approx(1, rel=5 / (2 * len(drawn)) ** 0.5)
    assert drawn.mean().item() == pytest.approx(0, abs=5 / RANK / len(drawn) ** 0.5)


@pytest.mark.parametrize("targets", TARGETS)
def test_only_the_adapters_are_trained_in_float32_over_a_bf16_base(make_components, targets):
    unet = make_components(dtype=torch.bfloat16).unet
    adapters = UNetLora(unet, RANK, RANK, targets, seed=0)
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert all(p.dtype == torch.bfloat16 for name, p in unet.named_parameters() if name not in trained)
    assert len(trained) == len(adapters.parameters) == 2 * len(BLOCKS) * len(PROJECTIONS[targets])


def test_unknown_targets_are_refused(make_components):
    with pytest.raises(ValueError, match="got LoRA targets 'everything'; expected one of attention, attention"):
        UNetLora(make_components().unet, RANK, RANK, "everything", seed=0)


def test_attention_is_all_projections_of_the_paper():
    assert ATTENTION == ("to_q", "to_k", "to_v", "to_out.0")
