"""The learned rewards against upstream's own code, on a small architecture with random weights, and their interface."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_rewards import (
    CPU,
    LEARNED,
    REFERENCE,
    WITH_ENCODER,
    golden,
    pictures,
    save_small_weights,
    use_small_architectures,
)
from torch import nn

from comfy_tdpo.rewards import imagereward, load_reward
from comfy_tdpo.rewards.aesthetic import HEAD
from comfy_tdpo.rewards.head import LinearHead
from comfy_tdpo.rewards.weights import load_weights

PUBLISHED_HEAD = Path(os.environ.get("AESTHETIC_HEAD", "sac+logos+ava1-l14-linearMSE.pth"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Loads a learned reward at toy size."""
    with pytest.MonkeyPatch.context() as patch:
        use_small_architectures(patch)
        weights = save_small_weights(tmp_path_factory.mktemp("weights"))
        yield lambda name, precision="fp32": load_reward(name, CPU, precision, weights)


@pytest.mark.parametrize("name", REFERENCE.REWARDS)
def test_scores_are_upstreams(small, name):
    """16 images of 8 sizes, 4 prompts; one of them is cut off, one has signs.

    Float32 sums in another order: the differences measured are below 2e-5 of a score, or 1e-6 of the largest.
    """
    record = golden(name)
    reward, images = small(name), pictures()
    scores = [torch.cat([reward.score(image, [prompt]) for image in images]) for prompt in record["prompts"]]
    expected = torch.tensor(record["scores"])
    torch.testing.assert_close(torch.stack(scores), expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("name", LEARNED)
def test_batch_and_order_change_no_score(small, name):
    reward, images = small(name), torch.cat(pictures()[::8] + pictures()[::8])
    prompts = ["a red fox", "snail", "two dogs", "an oil painting of a lighthouse"]
    together = reward.score(images, prompts)
    assert together.shape == (4,) and together.dtype == torch.float32
    alone = torch.cat([reward.score(images[i : i + 1], [prompts[i]]) for i in range(4)])
    backwards = reward.score(images.flip(0), prompts[::-1]).flip(0)
    scale = together.abs().max()
    assert (together - alone).abs().max() <= 1e-5 * scale
    assert (together - backwards).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("name", LEARNED)
def test_bf16_agrees(small, name):
    """To a fifth of what tells images apart: a toy's few numbers average out less of what bf16 rounds off than those
    of the real ones, for which benchmarks/reward_parity.md has what is measured.
    """
    images = pictures()[:6]
    full, half = (torch.cat([small(name, p).score(i, ["snail"]) for i in images]) for p in ("fp32", "bf16"))
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.2 * full.std()


@pytest.mark.parametrize("name", WITH_ENCODER)
def test_embeddings_are_of_unit_length(small, name):
    reward = small(name)
    embeds = reward.embed(pictures()[3])
    assert embeds.shape == (1, reward.embed_dim) and embeds.dtype == torch.float32
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(1))


def test_imagereward_has_no_encoder_for_the_critic(small):
    reward = small("imagereward")
    assert reward.embed_dim is None
    with pytest.raises(TypeError, match="imagereward"):
        reward.embed(pictures()[0])


def test_nothing_is_loaded_that_is_not_used(small):
    """Of CLIP aesthetic has the image half; of BLIP nothing but what the score goes through."""
    assert not [key for key in small("aesthetic").encoder.state_dict() if "text" in key or "logit" in key]
    keys = set(map(imagereward.upstreams_name, small("imagereward").encoder.state_dict()))
    unused = golden("imagereward")["files"]["ImageReward.pt"]["shapes"].keys() - keys
    assert {key.split(".")[0] for key in unused if not key.startswith("blip")} == {"mlp"}
    assert {key.split(".")[1] for key in unused if key.startswith("blip.") and "position_ids" not in key} == {
        "vision_proj",
        "text_proj",
    }


def test_the_published_head_of_aesthetic_score(tmp_path):
    """The real file, against a plain transcription of upstream's network, on fixed embeddings."""
    if not PUBLISHED_HEAD.is_file():
        pytest.skip(f"no {PUBLISHED_HEAD}; AESTHETIC_HEAD names it where it is")
    head = load_weights(LinearHead(768), PUBLISHED_HEAD, HEAD)
    embeds = F.normalize(torch.randn(64, 768, generator=torch.Generator().manual_seed(0)), dim=-1)
    plain = nn.Sequential(
        *(nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64)),
        *(nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)),
    ).eval()
    published = torch.load(PUBLISHED_HEAD, map_location="cpu", weights_only=True)
    plain.load_state_dict({key.removeprefix("layers."): value for key, value in published.items()})
    torch.testing.assert_close(head(embeds), plain(embeds)[:, 0], rtol=0, atol=0)
