"""What the critic reads: by a tiny decoder, and of some steps only."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch import nn
from toy import Brightness, new_run, toy_config, toy_training

from comfy_tdpo.models.tiny_decoder import load_tiny_decoder
from comfy_tdpo.reading import Reading, shares_of
from comfy_tdpo.rollout import Decoder, Sampler
from comfy_tdpo.shapes import TINY_DECODER

PROMPTS, SEEDS = ["a red circle", "a blue star"], [("test", 0), ("test", 1)]
WIDTH = 8


def sampled(policy, reward, reading):
    return Sampler(Decoder(policy, 99), reward, {}, reading).sample(PROMPTS, SEEDS).trajectories()


# --- tiny decoders


class Clamp(nn.Module):
    def forward(self, x):
        return 3 * (x / 3).tanh()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [part for _ in range(3) for part in (conv(WIDTH, WIDTH), nn.ReLU())]
        self.conv = nn.Sequential(*layers[:-1])

    def forward(self, x):
        return (self.conv(x) + x).relu()


def conv(inputs, outputs, bias=True):
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def original(channels):
    """TAESD's decoder as its authors number its layers; images in [0, 1]."""
    torch.manual_seed(0)
    layers = [Clamp(), conv(channels, WIDTH), nn.ReLU()]
    for _ in range(3):
        layers += [Block(), Block(), Block(), nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH, bias=False)]
    network = nn.Sequential(*layers, Block(), conv(WIDTH, 3)).requires_grad_(False)
    network[-1].weight *= 20  # otherwise nearly black
    network[-1].bias.fill_(0.5)
    return network


@pytest.mark.parametrize(("channels", "suffix"), [(4, "safetensors"), (16, "pth")])
def test_a_file_of_taesd_decodes_as_taesd_does(tmp_path, generator, channels, suffix):
    truth, file = original(channels), tmp_path / f"decoder.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(truth.state_dict(), file)
    decoder = load_tiny_decoder(file)
    assert (decoder.channels, decoder.factor) == (channels, 8)
    latents = 2 * torch.randn(2, channels, 4, 6, generator=generator)
    expected = truth(latents).clamp(0, 1)
    assert expected.std() > 0.05 and expected.shape == (2, 3, 32, 48)
    torch.testing.assert_close(decoder(latents), expected, rtol=0, atol=1e-6)  # float32


def test_a_file_of_diffusers_decodes_as_diffusers_does(tmp_path, generator):
    torch.manual_seed(0)
    sizes = {"decoder_block_out_channels": (WIDTH,) * 3, "num_decoder_blocks": (2, 0, 1)}
    tiny = AutoencoderTiny(**sizes, encoder_block_out_channels=(WIDTH,) * 3, num_encoder_blocks=(1,) * 3)
    tiny.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    decoder, latents = load_tiny_decoder(file), torch.randn(2, 4, 4, 4, generator=generator)
    with torch.no_grad():
        expected = (tiny.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    assert torch.equal(decoder(latents), expected)


def test_what_is_no_tiny_decoder_is_refused(tmp_path):
    encoder = {"0.weight": torch.zeros(WIDTH, 3, 3, 3), "0.bias": torch.zeros(WIDTH)}
    save_file(encoder, tmp_path / "taesd_encoder.safetensors")
    whole = original(4).state_dict()
    save_file({name: w for name, w in whole.items() if name != "3.conv.2.bias"}, tmp_path / "cut.safetensors")
    save_file(whole | {"1.bias": torch.full((WIDTH,), torch.nan)}, tmp_path / "nan.safetensors")
    (tmp_path / "page.pth").write_text("<html>")
    reasons = {
        "taesd_encoder.safetensors": "holds something else than a tiny decoder; expected .* taesd_decoder",
        "cut.safetensors": "holds something else than a tiny decoder",
        "nan.safetensors": "contains NaN",
        "page.pth": "cannot be read: .*; expected .* taesd_decoder",
        "missing.safetensors": "cannot be read: .*No such file",
    }
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=reason) as raised:
            load_tiny_decoder(tmp_path / name)
        assert name in str(raised.value)


def test_a_decoder_of_other_latents_is_refused(tmp_path, make_policy):
    save_file(original(16).state_dict(), tmp_path / "sixteen.safetensors")
    run = new_run(tmp_path / "run", critic={"decoder": str(tmp_path / "sixteen.safetensors")})
    with pytest.raises(ValueError, match=r"sixteen.* latents of 16 channels and 8 .* of 4 channels and 2 pixels"):
        toy_training(run, make_policy)


def test_the_rewards_never_see_what_it_decodes(make_policy):
    policy, reward = make_policy(steps=3), Brightness()
    blank = Reading(reward.embed, decode=lambda latents: torch.ones(len(latents), 3, 16, 16))
    with torch.no_grad():
        found, plain = (sampled(policy, reward, reading) for reading in (blank, None))
    assert torch.equal(found.rewards, plain.rewards) and torch.equal(found.final_embeds, plain.final_embeds)
    torch.testing.assert_close(found.image_embeds, torch.full((2, 3, 48), 48**-0.5))


# --- some of the steps


def test_shares_are_those_computed_by_hand():
    assert Reading(None, every=3).positions(6) == [0, 3, 5]
    assert Reading(None, every=3, steps=4).positions(6) == [0, 3]
    assert Reading(None, every=9).positions(6) == [0, 5]
    assert Reading(None).positions(3) == [0, 1, 2] and Reading(None, every=2).positions(1) == [0]
    third = 1 / 3
    expected = [[1, 0, 0], [2 * third, third, 0], [third, 2 * third, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]]
    torch.testing.assert_close(shares_of([0, 3, 5], held=False), torch.tensor(expected))
    held = [[1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert shares_of([0, 3, 5], held=True).tolist() == held


@pytest.mark.parametrize("held", [False, True])
def test_steps_that_are_not_read_have_unit_embeddings_between(make_policy, held):
    policy, reward, decoded = make_policy(steps=6), Brightness(), []

    def embed(images):
        decoded.append(len(images))
        return reward.embed(images)

    with torch.no_grad():
        every, some = (
            sampled(policy, reward, reading).image_embeds
            for reading in (Reading(embed), Reading(embed, every=3, held=held))
        )
    assert decoded == [12, 6]
    torch.testing.assert_close(some[:, [0, 3, 5]], every[:, [0, 3, 5]])
    between = every[:, 0] if held else F.normalize(2 * every[:, 0] + every[:, 3], dim=-1)
    torch.testing.assert_close(some[:, 1], between)
    assert not torch.allclose(some[:, 1], every[:, 1], atol=1e-3)


# --- settings


def test_settings_that_make_no_sense_together_are_refused():
    dpok = {"algorithm": "dpok"}
    scores = {"reads": "clean", "history": 2, "scores": True}
    refused = {
        r"critic.decoder is 'tiny', but critic.reads is latent.* to full": dpok | {"critic": {"decoder": "tiny"}},
        r"critic.read_every is 2, but critic.reads is latent.* to 1": dpok | {"critic": {"read_every": 2}},
        r"critic.scores needs .* critic.read_every is 3": {"critic": scores | {"read_every": 3}},
        r"critic.decoder is tiny, .* the model is 'owner/name'": {"model": "owner/name", "critic": {"decoder": "tiny"}},
    }
    for reason, overrides in refused.items():
        with pytest.raises(ValueError, match=reason):
            toy_config(**overrides)
    assert toy_config(model="owner/name", algorithm="ddpo-2", critic={"decoder": "tiny"}).further_decoder is None
    assert toy_config(critic={"decoder": "tiny"}).further_decoder == TINY_DECODER


def test_a_path_is_kept_as_an_absolute_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert toy_config(critic={"decoder": "a.pth"}).critic.decoder == str(tmp_path / "a.pth")
