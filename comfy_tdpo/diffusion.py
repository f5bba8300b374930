"""One denoising step as a Gaussian policy (arXiv 2402.08552, Eq. 2 and 4): pure functions of tensors.

Shapes: B batch, T denoising steps, C H W latent. All arithmetic is float32, whatever the model's dtype.

Deviations from diffusers' DDIMScheduler:
- each step ends at the next step's timestep, where diffusers subtracts a fixed distance. The last step ends at timestep
  0 whatever `set_alpha_to_one` says, so that it keeps its variance and its log-probability exists, as in the authors'
  code;
- "linspace" spaces timesteps as diffusers' multistep solvers do (DPM-Solver, UniPC, DEIS). DDIM's own include timestep
  0, and a step from there has no noise;
- "trailing" gives as many timesteps as were asked for. Rounding gives diffusers one more in some cases (61 steps).
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

REFERENCE_LATENT_SIZE = 4 * 64 * 64  # elements of an SD 1.x latent at 512 px, for which clip ranges are stated


@dataclass(frozen=True)
class Schedule:
    """The denoising schedule's tables, on the policy's device, from noisy (k = 0) to clean (k = T - 1).

    timesteps (T,) int64, alpha_bar (T,), alpha_bar_prev (T,) and sigma (T,) float32.
    """

    timesteps: Tensor
    alpha_bar: Tensor
    alpha_bar_prev: Tensor
    sigma: Tensor
    prediction_type: str

    def __len__(self) -> int:
        return len(self.timesteps)


def make_schedule(scheduler: DDIMScheduler, steps: int, device: torch.device | str = "cpu") -> Schedule:
    """The DDIM schedule with eta = 1 over `steps` steps of the model's own `scheduler` configuration."""
    config = scheduler.config
    if not 1 <= steps <= config.num_train_timesteps:
        raise ValueError(f"got {steps} denoising steps; expected 1 to {config.num_train_timesteps}")
    timesteps = spaced_timesteps(scheduler, steps)
    if timesteps.max() >= config.num_train_timesteps:
        raise ValueError(
            f"got {steps} denoising steps, which with steps_offset {config.steps_offset} begin beyond the "
            f"{config.num_train_timesteps} the model was trained on; expected fewer"
        )
    following = torch.cat([timesteps[1:], torch.zeros(1, dtype=torch.int64)])
    alpha_bar, alpha_bar_prev = scheduler.alphas_cumprod[timesteps], scheduler.alphas_cumprod[following]
    if alpha_bar.min() <= 0 and config.prediction_type == "epsilon":
        raise ValueError(
            f"got prediction_type epsilon on a schedule with zero terminal SNR (rescale_betas_zero_snr): at timestep "
            f"{timesteps[0]} the latent is pure noise, and a prediction of it gives no image; expected prediction_type "
            "v_prediction: set it if the model was trained that way; otherwise set rescale_betas_zero_snr to false or "
            "timestep_spacing to leading in the model's scheduler_config.json"
        )
    return Schedule(
        timesteps.to(device),
        alpha_bar.to(device),
        alpha_bar_prev.to(device),
        step_sigma(alpha_bar, alpha_bar_prev).to(device),
        config.prediction_type,
    )


def spaced_timesteps(scheduler: DDIMScheduler, steps: int) -> Tensor:
    """The timesteps, int64 (T,), from noisy to clean, by the `timestep_spacing` of the scheduler's configuration."""
    config = scheduler.config
    if config.timestep_spacing == "linspace":
        points = np.linspace(0, config.num_train_timesteps - 1, steps + 1).round()[:0:-1]
        return torch.from_numpy(points.astype(np.int64))
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.cpu().long()[:steps]


def step_sigma(alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """sigma_k of Eq. 2 at eta = 1 (DDIM, Eq. 16 of arXiv 2010.02502)."""
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    return variance.clamp(min=0).sqrt()


def predict_clean_and_noise(
    output: Tensor, latents: Tensor, alpha_bar: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """The clean latent and the noise that the model's `output` stands for, each (B, C, H, W)."""
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction_type == "epsilon":
        return (latents - noise * output) / signal, output
    if prediction_type == "sample":
        return output, (latents - signal * output) / noise
    if prediction_type == "v_prediction":
        return signal * latents - noise * output, signal * output + noise * latents
    raise ValueError(f"got prediction type {prediction_type!r}; expected 'epsilon', 'v_prediction' or 'sample'")


def step_distribution(output: Tensor, latents: Tensor, positions: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Mean (B, C, H, W) and standard deviation (B, 1, 1, 1) of p(x_{k+1} | x_k, c), Eq. 2.

    `output` is the (guided) model output for `latents` x_k at schedule `positions` k, (B,).
    """
    output, latents = output.float(), latents.float()
    alpha_bar, alpha_bar_prev, sigma = (
        table[positions].view(-1, 1, 1, 1) for table in (schedule.alpha_bar, schedule.alpha_bar_prev, schedule.sigma)
    )
    clean, noise = predict_clean_and_noise(output, latents, alpha_bar, schedule.prediction_type)
    direction = (1 - alpha_bar_prev - sigma**2).clamp(min=0).sqrt() * noise
    return alpha_bar_prev.sqrt() * clean + direction, sigma


def log_prob(next_latents: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """log p(x_{k+1} | x_k, c), averaged over C, H and W, (B,).

    The mean and not the sum, as in the authors' code: with the sum the ratio of two policies overflows at once.
    """
    z = (next_latents.float() - mean) / sigma
    log_density = -0.5 * z**2 - sigma.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    return log_density.mean(dim=(1, 2, 3))


def gaussian_kl(mean: Tensor, reference_mean: Tensor, sigma: Tensor) -> Tensor:
    """KL(p || p_ref) of one step in nats, summed over C, H and W, (B,); both have the same sigma."""
    return (((mean - reference_mean) / sigma) ** 2).sum(dim=(1, 2, 3)) / 2


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598); scale 1 is the conditional model."""
    return unconditional + scale * (conditional - unconditional)


def scaled_clip_range(clip_range: float, latent_size: int) -> float:
    """The clip range for latents of `latent_size` = C * H * W elements that allows the same nats on a whole step.

    The log-probability is a mean over elements, so a range that is stated for SD 1.x at 512 px would be 64 times
    tighter on a latent 64 times smaller.
    """
    return clip_range * REFERENCE_LATENT_SIZE / latent_size
