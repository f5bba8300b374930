"""What fits into GPUs: what is counted without values is what real tensors take on the CPU."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from test_plan import index_of
from test_plan import sd3 as sd3
from tiny_models import SHIPPED
from transformers import CLIPTextModel, CLIPTokenizer

from comfy_tdpo.memory.budget import GIB, Need, need_of
from comfy_tdpo.memory.counting import Held
from comfy_tdpo.memory.without_values import counted, flops_of
from comfy_tdpo.models.sizes import model_without_weights, numbers_of_texts
from comfy_tdpo.models.tiny_decoder import load_tiny_decoder
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.rehearsal import Rehearsal
from comfy_tdpo.shapes import TINY_DECODER
from comfy_tdpo.trainer.__main__ import main
from comfy_tdpo.trainer.config import make_config, override
from comfy_tdpo.trainer.run import RunFolder
from comfy_tdpo.trainer.run.new_folder import RUNS
from comfy_tdpo.trainer.terminal.fits import (
    CONTEXT,
    Flops,
    Footprint,
    bytes_of_decoder,
    bytes_of_rewards,
    choice,
    decoder_of,
    flops_of_decoder,
    footprint,
)
from comfy_tdpo.trainer.terminal.seconds import flops_of_sample

SIXTY_FOUR = {"samples_per_epoch": 64, "samples_per_update": 64}
SETTINGS = {"steps": 3, "guidance": 3.0, "resolution": 32}


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """The folder of a model of Stable Diffusion 1.x's classes, with few layers."""
    folder = tmp_path_factory.mktemp("sizes")
    shutil.copytree(SHIPPED / "sd1", folder, dirs_exist_ok=True)
    kinds = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    few = {"block_out_channels": [32], "layers_per_block": 1}
    edit(folder / "unet" / "config.json", **few, **kinds, cross_attention_dim=32)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    edit(folder / "vae" / "config.json", **few | {"block_out_channels": [32, 32]}, **kinds)
    parts = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "tokenizer": CLIPTokenizer,
    }
    (folder / "model_index.json").write_text(json.dumps(index_of(parts)))
    return folder


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("train", ["lora", "full"])
def test_what_is_counted_is_what_the_cpu_allocates(sizes, train):
    config = make_config("sd14-aesthetic", overrides=SETTINGS | {"precision": "fp32", "policy": {"train": train}})
    found = footprint(config, sizes)
    with Held() as held:
        model = model_without_weights(sizes, torch.float32, torch.float32, config.model)
        policy = DiffusionPolicy(model, settings=config.policy, **SETTINGS)
        weights = sum(weight.nbytes for net in policy.model.networks.values() for weight in net.parameters())
        rehearsal = Rehearsal(policy, "", [])
        real = [need_of(held, work) for work in (rehearsal.sample, rehearsal.decode, rehearsal.train)]
        rehearsal.turn_on_checkpointing()
        real.append(need_of(held, rehearsal.train))
    # besides weights there are buffers and the noise schedule, a few KB
    assert found.weights == pytest.approx(weights, rel=0.02)
    counted = [found.sampling, found.decoding, found.training[False], found.training[True]]
    for count, truth in zip(counted, real, strict=True):
        # oneDNN may copy a tensor into a layout of its own, which tensors without values do not
        assert count.first == pytest.approx(truth.first, rel=0.05)
        assert count.more == pytest.approx(truth.more, rel=0.05)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"in_channels": 9}, "takes 9 channels (inpainting, depth or editing)"),
        ("unet", {"block_out_channels": "x"}, "unet/config.json cannot be loaded: "),
        ("vae", {"block_out_channels": []}, "vae/config.json cannot be loaded"),
        (
            "text_encoder",
            {"architectures": ["RobertaModel"]},
            "text_encoder/config.json cannot be loaded: 'RobertaModel'",
        ),
    ],
)
def test_damaged_sizes_are_told_in_one_line(sizes, tmp_path, capsys, part, changes, message):
    folder = shutil.copytree(sizes, tmp_path / "model")
    edit(folder / part / "config.json", **changes)
    assert main(["plan", "--preset", "sd14-aesthetic", "--model", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_text_encoder_that_a_model_is_without_does_not_count():
    parts = [numbers_of_texts(SHIPPED / "sd3", absent) for absent in ((), ("text_encoder_3", "tokenizer_3"))]
    assert parts[0] - parts[1] == 4_762_310_656  # T5 XXL's encoder


def test_the_published_sizes_are_those_of_the_models():
    assert numbers_of_texts(SHIPPED / "sd1") == 123_060_480  # CLIP ViT-L/14's text model


@pytest.mark.parametrize(
    "name, precision, size", [("hpsv2", "fp32", 4.0e9), ("hpsv2", "bf16", 2.0e9), ("pickscore", "bf16", 1.95e9)]
)
def test_rewards_count_in_their_precision_whatever_their_files_have(name, precision, size):
    """HPSv2's file, of 2.0 GB, has 16 bits."""
    config = make_config(overrides={"rewards": {name: 1.0}, "reward_precision": precision})
    assert bytes_of_rewards(config) == size


def test_a_critics_own_decoder_counts():
    decoder = {"algorithm": "tdpo-r", "critic": {"decoder": str(TINY_DECODER)}}
    for precision, size in {"fp32": 4, "fp16": 2}.items():
        config = make_config("sd14-aesthetic", overrides=decoder | {"precision": precision})
        assert bytes_of_decoder(decoder_of(config)) == size * 142_083
    assert decoder_of(make_config("sd14-aesthetic")) is None and bytes_of_decoder(None) == 0
    tiny = load_tiny_decoder(TINY_DECODER)
    with counted():
        operations = flops_of_decoder(tiny, (4, 6, 4))
    assert operations == flops_of(lambda: tiny(torch.rand(1, 4, 6, 4))) > 10**6


class SixSteps:
    stochastic = torch.tensor([True] * 6)

    def __len__(self):
        return 6


@pytest.mark.parametrize(
    "critic, images",
    [
        ({"enabled": False}, 1),
        ({"reads": "latent"}, 1),
        ({}, 1 + 6 * 3),
        ({"image_size": 256}, 1 + 6 * 3 / 4),
        ({"read_every": 4}, 1 + 3 * 3),  # the steps 1, 5 and 6
        ({"read_every": 4, "history": 1}, 1 + 2 * 3),  # step 1, and 4, which follows the trained ones
    ],
)
def test_the_time_of_a_critics_images_is_that_of_those_it_sees(critic, images):
    settings = {"algorithm": "tdpo-r", "neurons": {"reset": "none"}, "policy": {"train_until": 0.5}}
    config = make_config(overrides=settings | {"resolution": 512, "critic": {"image_size": None} | critic})
    assert flops_of_sample(config, SixSteps(), Flops(step=0, training=0, image=1, seen=3))[0] == images


def test_a_card_gets_as_many_rows_as_fit_and_recomputes_blocks_before_it_gives_up():
    config = make_config("sd14-aesthetic", overrides=SIXTY_FOUR)
    small = Need(1, 1)
    found = Footprint(
        weights=2 * GIB,
        texts=0,
        rewards=GIB,
        moments=GIB,
        trajectories=0,
        snapshot=0,
        checkpoint=0,
        sampling=small,
        decoding=Need(GIB, GIB),
        training={False: Need(4 * GIB, 2 * GIB), True: Need(2 * GIB, GIB // 2)},
        drawing=small,
        flops=Flops(1, 1, 1, 1),
    )

    def card(room: float) -> int:
        """The GiB of a card that leaves that much room in GiB, rounded up."""
        return -int(-((room + 1) / 0.9 + 3 + CONTEXT / GIB) // 1)

    assert choice(found, config, card(4.0)) == "1 / 4"
    assert choice(found, config, card(10.0)) == "4 / 10"
    assert choice(found, config, card(2.0)) == "2* / 2"
    assert choice(found, config, 4) == "no"
    # updates may take the 1 GiB of the rewards too, less the margin, unless they back-propagate them
    direct = make_config("sd14-aesthetic", overrides=SIXTY_FOUR | {"algorithm": "draft"})
    assert choice(replace(found, decoding=small), config, card(3.2)) == "1 / 16"
    assert choice(replace(found, decoding=small), direct, card(3.2)) == "4* / 16"
    # what takes much goes to main memory, and text encoders leave once they have encoded
    assert choice(replace(found, trajectories=2 * GIB, texts=3 * GIB), config, card(4.0)) == "1 / 4"
    assert choice(replace(found, texts=20 * GIB), config, card(4.0)) == "no"
    assert choice(replace(found, drawing=Need(9 * GIB, GIB)), config, card(4.0)) == "no"


def test_a_plan_tells_what_a_run_takes(sizes, capsys):
    settings = ["--resolution", "32", "--steps", "3", "--samples-per-epoch", "8", "--samples-per-update", "4"]
    assert main(["plan", "--preset", "sd14-aesthetic", "--model", str(sizes), *settings]) == 0
    text = capsys.readouterr().out
    assert "\n800 reward queries in 100 epochs\n" in text
    assert "\n4800 latents go through the network to draw the samples, two for each step, because of guidance\n" in text
    assert "memory, counted without a GPU, in GiB: weights below 0.1," in text
    assert "80 GiB: 4 / 16" in text and "6 GiB: 4 / 8" not in text
    assert "\ntime: the networks' arithmetic is " in text and text.count("a rough estimate") == 1
    assert "\n2016 more draw 21 sample grids (3 steps, guidance 5, 32 px)\n" in text


def test_a_plan_tells_how_long_a_run_with_the_same_settings_took(sd3, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_config(overrides={"model": str(sd3), "seed": 7, "epochs": 3})
    for name, changes in (("same", {}), ("other", {"steps": 5})):
        run = RunFolder(RUNS / name).create(override(config, changes))
        for seconds in (10.0, 61.0, 60.0):
            run.append_metrics({"epoch": 1, "reward_queries": 1, "time/epoch_s": seconds})
    assert main(["plan", "--model", str(sd3), "--epochs", "60"]) == 0
    assert f"time: run '{RUNS / 'same'}' took 60 s an epoch with the same settings, which makes 60 min for 60" in (
        capsys.readouterr().out
    )


def test_operations_are_counted_as_by_hand():
    """A product of (2, 3) and (3, 5), attention of 4 tokens with 3 of width 6, and their gradients, twice as much."""
    a, b = torch.ones(2, 3, requires_grad=True), torch.ones(3, 5, requires_grad=True)
    query, key, value = (torch.ones(1, 1, tokens, 6, requires_grad=True) for tokens in (4, 3, 3))
    with counted(fake=False):
        attend = F.scaled_dot_product_attention
        assert flops_of(lambda: a @ b) == 2 * 2 * 3 * 5
        assert flops_of(lambda: (a @ b).sum().backward()) == 3 * 2 * 2 * 3 * 5
        assert flops_of(lambda: attend(query, key, value)) == 2 * (2 * 4 * 3 * 6)
        # the backward pass computes the weights again
        assert flops_of(lambda: attend(query, key, value).sum().backward()) == (2 + 5) * (2 * 4 * 3 * 6)


def test_a_model_of_unknown_size_is_planned_without_its_memory(sd3, capsys):
    assert main(["plan", "--model", str(sd3)]) == 0
    assert "time and memory: not counted, since the sizes" in capsys.readouterr().out
