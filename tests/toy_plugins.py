"""A process, a family, a reward and a method that somebody else might add: one class each, and a line in a registry.

They are registered by tests/test_registries.py, from outside the package.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from pydantic import Field
from torch import Tensor, nn

from comfy_tdpo.models import Outline
from comfy_tdpo.models.conditioning import TensorConditioning
from comfy_tdpo.process.ddim import make_ddim
from comfy_tdpo.rollout import Trajectories, denoise, draw_noise
from comfy_tdpo.settings import MethodSettings, Section

# --- a process: DDIM whose last two steps are without noise -----------------------------------------------------------


def make_quiet_end(scheduler: DDIMScheduler, steps: int, device: torch.device):
    """The last two of DDIM's steps go straight to their mean, so that they have no density and are never trained."""
    process = make_ddim(scheduler, steps, device)
    sigma = process.sigma.clone()
    sigma[-2:] = 0
    return replace(process, sigma=sigma)


# --- a family: a model of three colours, named "blobs:" and a seed ----------------------------------------------------


class Blobs(nn.Module):
    """Predicts noise from a latent and a prompt's colour; a latent's element is a pixel."""

    def __init__(self, seed: int):
        super().__init__()
        self.mix = nn.utils.skip_init(nn.Conv2d, 3, 3, 3, padding=1)
        self.colour = nn.utils.skip_init(nn.Linear, 3, 3)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)

    def forward(self, latents: Tensor, colours: Tensor) -> Tensor:
        return latents - self.mix(latents) - self.colour(colours)[:, :, None, None]


class AllWeights:
    """A Trainable: every weight, with a copy of what it was."""

    sharded = False

    def __init__(self, network: nn.Module):
        self.network = network.requires_grad_(True)
        self.parameters = dict(network.named_parameters())
        self.base = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def state(self):
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def load(self, state):
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state[name])

    def reference(self):
        raise NotImplementedError("no penalty is asked for")

    def export(self, path, metadata):
        from comfy_tdpo.tensor_files import write_tensors

        write_tensors(path, self.state(), metadata)


class BlobModel:
    """A DiffusionModel."""

    process, prediction_type, channels, patch = "ddim", "epsilon", 3, 1

    def __init__(self, source: str):
        self.source, self.network = source, Blobs(int(source.removeprefix("blobs:")))
        self.networks = {"blobs": self.network}
        self.scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
        self.decode = Pixels()

    @property
    def schedule(self) -> Tensor:
        return self.scheduler.alphas_cumprod

    def encode(self, prompts: list[str]) -> TensorConditioning:
        colours = [[float(colour in prompt) for colour in ("red", "green", "blue")] for prompt in prompts]
        return TensorConditioning(colours=torch.tensor(colours, device=next(self.network.parameters()).device))

    def denoise(self, latents, times, conditioning):
        return self.network(latents, conditioning.parts["colours"])

    def adapt(self, settings, seed):
        return AllWeights(self.network)

    def to(self, device):
        self.network.to(device)
        return self


class Pixels:
    """A LatentDecoder."""

    factor = 1

    def __call__(self, latents: Tensor) -> Tensor:
        return (latents / 2 + 0.5).clamp(0, 1)


class BlobFamily:
    """A Family."""

    def recognizes(self, source: str) -> bool:
        return source.startswith("blobs:")

    def outline(self, source, prediction_type):
        model = BlobModel(source)
        return Outline(model.scheduler, model.process, model.decode.factor, model.patch)

    def load(self, source, dtype, prediction_type):
        return BlobModel(source)


FAMILY = BlobFamily()


# --- a reward: how dark an image is -----------------------------------------------------------------------------------


class Darkness:
    """A RewardModel with a gradient."""

    sources = ()
    embed_dim = 12
    differentiable = True

    def __init__(self, name, options):
        self.name = name

    def embed(self, images: Tensor) -> Tensor:
        return F.normalize(F.adaptive_avg_pool2d(images, 2).flatten(1), dim=-1)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return -images.mean(dim=(1, 2, 3))

    def check_prompts(self, prompts: list[str]) -> None:
        pass


# --- a method: back-propagation through all of sampling ---------------------------------------------------------------


class ThroughSettings(Section):
    weight: float = Field(default=1.0, gt=0, description="what the loss is multiplied by")


class Settings(MethodSettings):
    through: ThroughSettings = ThroughSettings()


class ThroughSampling:
    """A Method whose updates draw their own samples and push the reward's gradient through every step."""

    samples_first = False

    def __init__(self, context):
        self.context = context

    def groups(self, epoch: int) -> Sequence[range]:
        size = self.context.samples_per_update
        return [range(begin, begin + size) for begin in range(0, self.context.samples, size)]

    def update(self, group: range) -> None:
        context = self.context
        context.watch("training", group.start, context.samples)

        def accumulate(part: slice) -> Trajectories:
            prompts, seeds = context.draws(group[part])
            latents, log_probs, kl, _ = denoise(context.policy, prompts, draw_noise(context.policy, seeds))
            scores = context.reward.score(context.policy.decode(latents[:, -1]), prompts)
            loss = -context.config.through.weight * scores.sum() / len(group)
            loss.backward()
            context.add("policy/loss", loss)
            return Trajectories(prompts, latents.detach(), log_probs.detach(), kl, scores.detach())

        context.progress.parts += context.update_policy(len(group), accumulate)

    def metrics(self, batch):
        return {"through/samples": float(len(batch))}

    def finish(self, batch):
        return {}

    def state(self):
        return {}, {}

    def load_state(self, tensors, plain):
        pass
