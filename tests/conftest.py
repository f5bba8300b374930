"""Tiny models with random weights, made from a seed: everything a policy needs, built in a fraction of a second."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is imported. Tiny models are fastest with one thread, and threads that spin while they wait take many
# times as long beside other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Results are compared to the last bit, which only the CPU repeats. CUDA_VISIBLE_DEVICES=0 tries the tests on a GPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import children  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tiny_models import make_tiny_configs
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

from comfy_tdpo.models import shipped
from comfy_tdpo.models.components import Components
from comfy_tdpo.models.shipped import CONFIGS
from comfy_tdpo.models.stable_diffusion import StableDiffusion
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.settings import PolicySettings
from comfy_tdpo.shapes.encoders import MAX_TOKENS
from comfy_tdpo.shapes.tokenizer import build_tokenizer

# The files that take minutes. They begin first, or one process would still work on one when the others have ended.
LONGEST = ["test_native", "test_comfyui", "test_frontend", "test_cli", "test_workflows", "test_resume", "test_families"]

WIDTH = 32  # of the U-Net, the autoencoder and the text encoder
RESOLUTION = 16  # pixels; the autoencoder halves them, so latents are 4 x 8 x 8

# The noise schedule of Stable Diffusion 1.x, as published with the model.
SD1_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def pytest_xdist_auto_num_workers() -> int:
    """Three more than there are cores, since tests wait for browsers and servers a quarter of the time."""
    return (os.cpu_count() or 1) + 3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> Path:
    """The shipped configurations with tiny sizes."""
    return make_tiny_configs(tmp_path_factory.mktemp("configs") / "configs")


@pytest.fixture
def tiny(configs, monkeypatch) -> None:
    """Files load as models of tiny sizes."""
    monkeypatch.setattr(shipped, "CONFIGS", configs)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> CLIPTokenizerFast:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def make_scheduler() -> Callable[..., DDIMScheduler]:
    """Stable Diffusion 1.x's schedule, with changes."""
    return lambda **changes: DDIMScheduler(**(SD1_SCHEDULE | changes))


@pytest.fixture(scope="session")
def make_components(tokenizer, make_scheduler) -> Callable[..., Components]:
    """Components with the weights of `seed`; the same seed gives the same weights, in modules of their own."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **schedule) -> Components:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            networks = {"unet": _unet(), "vae": _vae(), "text_encoder": _text_encoder(tokenizer)}
        for network in networks.values():
            network.to(dtype).eval().requires_grad_(False)
        return Components(**networks, tokenizer=tokenizer, scheduler=make_scheduler(**schedule), source="tiny")

    return make


@pytest.fixture(scope="session")
def make_policy(make_components) -> Callable[..., DiffusionPolicy]:
    """A policy on tiny components; `trained` gives the LoRA's B weights that are not zero."""

    def make(
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        trained: bool = False,
        schedule: dict | None = None,
        **settings,
    ) -> DiffusionPolicy:
        defaults = {"steps": 4, "guidance": 3.0, "resolution": RESOLUTION}
        trains = PolicySettings(
            **{name: settings.pop(name) for name in PolicySettings.model_fields if name in settings}
        )
        model = StableDiffusion.from_components(make_components(seed, dtype, **(schedule or {})))
        policy = DiffusionPolicy(model, settings=trains, **(defaults | settings))
        if trained:
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in policy.model.network.named_parameters():
                if "lora_B" in name:
                    parameter.data.normal_(0, 0.1, generator=generator)
        return policy

    return make


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a process, as subprocess.Popen does, that ends with the test at the latest."""
    started: list[subprocess.Popen] = []

    def start(command: list, **settings) -> subprocess.Popen:
        started.append(children.start(command, **settings))
        return started[-1]

    yield start
    for process in started:
        children.end(process)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def sd1_scheduler_config() -> Path:
    return CONFIGS / "sd1" / "scheduler" / "scheduler_config.json"


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(WIDTH, WIDTH),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # the number of heads, under diffusers' name for it
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(WIDTH, WIDTH),
        layers_per_block=1,
        latent_channels=4,
        sample_size=RESOLUTION,
    )


def _text_encoder(tokenizer: CLIPTokenizerFast) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
