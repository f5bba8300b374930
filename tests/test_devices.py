"""On another device than the CPU, every algorithm does what it does on the CPU, to the last bit, and nowhere do tensors
of two devices meet."""

from threading import Event

import pytest
import torch
from accelerate import Accelerator
from elsewhere import DEVICE, Device
from safetensors.torch import load_file
from test_resume import Steps, StopAt
from tint import TintModel
from torch import Tensor, nn
from toy import Brightness, Contrast, new_run, timeless

from comfy_tdpo.methods import ALGORITHMS
from comfy_tdpo.models.stable_diffusion import ClipText
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.rollout import Decoder, denoise, draw_noise
from comfy_tdpo.trainer.run import RunFolder
from comfy_tdpo.trainer.training import Training

# What an algorithm needs at this size, and what of it is not on by default
SETTINGS = {
    "ddpo-g": {"guards": ["shapes-alignment"], "kl": {"coefficient": 0.1, "gate": True, "reset_every": 1}},
    "tdpo-g": {
        "guards": ["shapes-match", "shapes-alignment"],
        "guard_images": 2,
        "guard_adaptation": 0.5,
        "prompts": "shapes-complex",
        "critic": {"scores": True, "gae_lambda": 0.9},
        "policy": {"objective": "step-normalised", "ema": 0.5, "train_share": 0.5},
    },
    "tdpo-r": {
        "kl": {"coefficient": 0.1, "target": 1.0},
        "neurons": {"every": 1, "policy_reset": "dormant", "data": "batch"},
        "policy": {"replay": 1},
    },
    "tdpo": {"kl": {"coefficient": 0.1}, "neurons": {"policy_reset": "active"}},
    "ddpo-100": {"policy": {"objective": "trust-region"}},
    "grpo": {"samples_per_prompt": 4, "favour_diversity": True},
    "sdpo": {"steps": 4, "prompts": "shapes-complex"},
    "alignprop": {"truncation": {"first": "uniform"}},
    "draft": {"renoised": 2},
}
# Whose latents are kept in main memory here: those that read them in a place of their own
IN_MAIN_MEMORY = ("ddpo-g", "tdpo-r", "dpok", "sdpo")
COMMON = {"epochs": 2, "samples_per_epoch": 4, "samples_per_update": 2, "guidance": 1.0, "resolution": 8}


class Learned(Brightness):
    """Brightness by a network, which leaves the images as they are."""

    def __init__(self, device: torch.device | str):
        self.network = nn.Conv2d(3, 3, 1, bias=False).requires_grad_(False)
        self.network.weight.copy_(torch.eye(3)[..., None, None])
        self.network.to(device)

    def embed(self, images: Tensor) -> Tensor:
        return super().embed(self.network(images))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return super().score(self.network(images), prompts)


@pytest.fixture
def elsewhere(monkeypatch):
    """The only device of accelerate's is DEVICE."""
    monkeypatch.setattr(Accelerator, "device", DEVICE)
    with Device():
        yield


def training_on(device: torch.device | str, run: RunFolder, watch=lambda *progress: None, stop=None) -> Training:
    """A training whose model has one layer."""
    config = run.config
    policy = DiffusionPolicy(
        TintModel(),
        steps=config.steps,
        guidance=1.0,
        resolution=8,
        settings=config.policy,
        seed=config.seed,
        device=device,
    )
    guards = dict(zip(config.guards, (Contrast(), Brightness()), strict=False))
    reward = Learned(policy.device)
    return Training(config, policy, reward, {"contrast": Contrast()}, run, Accelerator(), stop, watch, guards)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_trains_and_resumes_as_on_the_cpu(tmp_path, request, monkeypatch, algorithm):
    settings = COMMON | {"algorithm": algorithm} | SETTINGS.get(algorithm, {})
    run = new_run(tmp_path / "cpu", **settings)
    steps, stop = Steps(), Event()
    list(training_on("cpu", run, steps).epochs())
    there = new_run(tmp_path / "there", **settings)
    request.getfixturevalue("elsewhere")
    monkeypatch.setattr(Training, "_keeps_in_main_memory", lambda self: algorithm in IN_MAIN_MEMORY)
    stopped = training_on(DEVICE, there, StopAt(stop, steps.count - 1), stop)  # at the last update
    list(stopped.epochs())
    assert stopped.stopped and stopped.context.progress.parts
    if algorithm in IN_MAIN_MEMORY:
        assert stopped.context.progress.batch().latents.device.type == "cpu"
    updated_with = set()  # where the reward's network was meanwhile

    def watch(phase: str, done: float, total: int) -> None:
        if phase in ("updating", "training"):
            updated_with.add(resumed.context.reward.network.weight.device)

    resumed = training_on(DEVICE, there, watch)
    list(resumed.epochs())
    # those that back-propagate the reward keep it
    assert updated_with == {torch.device("cpu") if resumed.method.samples_first else DEVICE}
    assert all(parameter.device == DEVICE for parameter in resumed.policy.parameters)
    assert timeless(there.metrics()) == timeless(run.metrics())
    expected, got = (load_file(found.latest_lora) for found in (run, there))
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_u_net_samples_decodes_and_trains_as_on_the_cpu_and_its_text_encoder_stays_there(
    make_policy, request, monkeypatch
):
    encoded_on, outputs = [], ClipText.outputs

    def watched(self, *inputs, **more):
        encoded_on.append(self.network.device)
        return outputs(self, *inputs, **more)

    def found(device: torch.device | str) -> list[Tensor]:
        policy = make_policy(steps=2, trained=True, device=device)
        path = denoise(policy, ["a cat", "a dog"], draw_noise(policy, [(0,), (1,)]), kl="exact")
        images = Decoder(policy, 1)(path.latents[:, -1])
        (path.log_probs.sum() + images.mean()).backward()
        gradients = [parameter.grad for parameter in policy.parameters]
        assert policy.model.encode.network.device.type == "cpu"
        return [part.detach().cpu() for part in (path.latents, path.log_probs, path.kl, images, *gradients)]

    expected = found("cpu")
    request.getfixturevalue("elsewhere")
    monkeypatch.setattr(ClipText, "outputs", watched)
    # float32: attention has a kernel of its own on the CPU, which adds up in another order
    torch.testing.assert_close(found(DEVICE), expected, rtol=1e-3, atol=1e-5)
    assert encoded_on == [DEVICE] * 3, "two prompts and the empty one"
