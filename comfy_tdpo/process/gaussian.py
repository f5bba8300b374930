"""Gaussian steps (arXiv 2402.08552, Eq. 2 and 4): one formula for all processes, and their densities.

With x_k = a_t x_0 + b_t eps, every process here is p(x_{k+1} | x_k, c) = N(a_s x_0 + kappa eps, sigma^2 I), where x_0
and eps are the model's predictions. Processes differ only in their tables.

Shapes: B batch, T denoising steps, C H W latent. All arithmetic is float32, whatever the model's dtype.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import Step

REFERENCE_LATENT_SIZE = 4 * 64 * 64  # elements of an SD 1.x latent at 512 px, for which clip ranges are stated


@dataclass(frozen=True)
class TableProcess:
    """A Process defined by tables, on the policy's device, from noisy (k = 0) to clean (k = T - 1).

    times (T,): the denoiser's time input. The other tables are (T,) float32: signal a_t and noise b_t of x_k,
    next_signal a_s and kappa of the mean, and sigma. prediction_type: what the model predicts, see
    `predict_clean_and_noise`.
    """

    times: Tensor
    signal: Tensor
    noise: Tensor
    next_signal: Tensor
    kappa: Tensor
    sigma: Tensor
    prediction_type: str

    def __len__(self) -> int:
        return len(self.times)

    @property
    def stochastic(self) -> Tensor:
        return self.sigma.cpu() > 0

    @property
    def mean_by_noise(self) -> Tensor:
        return self.kappa - self.next_signal * self.noise / self.signal

    @property
    def sensitivity(self) -> Tensor:
        if self.prediction_type == "epsilon":
            mean_by_output = self.mean_by_noise
        elif self.prediction_type == "sample":
            mean_by_output = self.next_signal - self.kappa * self.signal / self.noise
        else:
            mean_by_output = self.kappa * self.signal - self.next_signal * self.noise
        return mean_by_output.abs() / self.sigma

    def initial(self, noise: Tensor) -> Tensor:
        return noise

    def noised(self, clean: Tensor, noise: Tensor, positions: Tensor) -> Tensor:
        signal, scale = (table[positions].view(-1, 1, 1, 1) for table in (self.signal, self.noise))
        return signal * clean + scale * noise

    def step(self, output: Tensor, latents: Tensor, positions: Tensor) -> Step:
        output, latents = output.float(), latents.float()
        signal, noise, next_signal, kappa, sigma = (
            table[positions].view(-1, 1, 1, 1)
            for table in (self.signal, self.noise, self.next_signal, self.kappa, self.sigma)
        )
        clean, predicted_noise = predict_clean_and_noise(output, latents, signal, noise, self.prediction_type)
        return Step(next_signal * clean + kappa * predicted_noise, sigma, clean)


def predict_clean_and_noise(
    output: Tensor, latents: Tensor, signal: Tensor, noise: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """The clean latent and the noise implied by the model's `output`, each (B, C, H, W).

    `latents` are x = signal * clean + noise * eps. Raises ValueError for an unknown prediction type.
    """
    if prediction_type == "epsilon":
        return (latents - noise * output) / signal, output
    if prediction_type == "sample":
        return output, (latents - signal * output) / noise
    if prediction_type == "v_prediction":
        return signal * latents - noise * output, signal * output + noise * latents
    if prediction_type == "flow_prediction":  # of models with signal + noise = 1
        return latents - noise * output, latents + signal * output
    raise ValueError(
        f"got prediction type {prediction_type!r}; expected 'epsilon', 'v_prediction', 'sample' or 'flow_prediction'"
    )


def log_prob(next_latents: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """log p(x_{k+1} | x_k, c), averaged over C, H and W, (B,).

    It is the mean and not the sum, as in the authors' code: with the sum, the ratio of two policies soon overflows.
    """
    z = (next_latents.float() - mean) / sigma
    log_density = -0.5 * z**2 - sigma.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    return log_density.mean(dim=(1, 2, 3))


def gaussian_kl(mean: Tensor, reference_mean: Tensor, sigma: Tensor) -> Tensor:
    """KL(p || p_ref) of one step in nats, summed over C, H and W, (B,); both distributions have the same sigma."""
    return (((mean - reference_mean) / sigma) ** 2).sum(dim=(1, 2, 3)) / 2


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598); scale 1 gives the conditional model."""
    return unconditional + scale * (conditional - unconditional)


def scaled_clip_range(clip_range: float, latent_size: int) -> float:
    """The clip range that allows a step the same change in nats on latents of `latent_size` = C * H * W elements.

    The log-probability is a mean over elements, so a range chosen for SD 1.x at 512 px would be 64 times tighter on a
    latent that is 64 times smaller.
    """
    return clip_range * REFERENCE_LATENT_SIZE / latent_size
