"""The KL penalty, which keeps the policy near a reference: in the loss, in the returns, on which samples, how strong.

A step's exact KL depends only on the state, so it would have no gradient as that step's reward. It is therefore a term
of the loss, and the return contains only the KL of later steps. DPOK (arXiv 2305.16381) leaves these out: it penalises
KL_k at the sampled x_k alone, and what a step does to the KL of later states does not count.

A LoRA is turned off to measure the reference, at every step and in every update. If all weights are trained, those of
the reference lie on the CPU, and are swapped in once an epoch: after sampling, its means at all states are measured and
kept, and the policy's follow from its samples and their noise. What the KL is at a state does not depend on the order.

The coefficient is in normalised reward per nat of a trajectory. The policy's surrogate loss has log-probabilities that
are means over the C * H * W elements of a latent, so the same penalty per nat averaged over the elements is C * H * W
times as large.

Shapes: N samples of an epoch in this process, B of all processes, T denoising steps.
"""

from typing import Any

import torch
from torch import Tensor

from ..process import Step
from ..process.gaussian import gaussian_kl, log_prob
from ..rollout import Trajectories, draw_noise
from ..swapping import brought
from . import Metrics, TensorGroup, advantages
from .context import Context
from .guards import Gate, Scores
from .kl_control import Controller, KLCoefficient, ProportionalIntegral


class KLPenalty:
    """The KL penalty of a run.

    in_loss: whether each step's own KL is a term of the loss.
    used, chosen: the current epoch's coefficient, and what the KL of each sample counts for, (B, 1) or 1.
    """

    def __init__(self, context: Context):
        self.context, self.policy, self.config = context, context.policy, context.config.kl
        config = self.config
        self.enabled = config.coefficient > 0
        self.in_loss = self.enabled and config.form in ("exact", "loss")
        self.controller: Controller = KLCoefficient(config.coefficient, config.target, config.horizon)
        if config.target is not None and config.controller == "proportional-integral":
            self.controller = ProportionalIntegral(config.coefficient, config.target)
        self.used, self.chosen = self.controller.value, torch.ones(())
        self.gate = Gate(config.gate_share, config.gate_window) if config.gate else None
        self.resets = self.last_reset = 0  # how many, and the epoch after which the last was

    @property
    def form(self) -> str:
        """What sampling measures, see `rollout.denoise`."""
        if not self.enabled or self.config.measures_afterwards(self.policy.kl_reference):
            return "none"
        return "exact" if self.in_loss else "sampled"

    def measure(self, batch: Trajectories) -> None:
        """Measure what sampling left out, because it would have swapped the reference in at every step."""
        if not self.config.measures_afterwards(self.policy.kl_reference):
            return
        context, size = self.context, self.context.micro_batch
        context.optimizer.zero_grad()  # the gradients' memory is needed for the reference
        parts = [range(begin, min(begin + size, len(batch))) for begin in range(0, len(batch), size)]
        context.begin("measuring the KL", 0, len(batch), len(batch))
        with self.policy.reference():
            found = [self._measured(batch, rows) for rows in parts]
        context.processes.meet()
        batch.kl, batch.reference_means = (torch.cat(tensors) for tensors in zip(*found, strict=True))

    def _measured(self, batch: Trajectories, rows: range) -> tuple[Tensor, Tensor]:
        """The KL of each step, (B, T), and the reference's means, (B, T, C, H, W), of B rows."""
        context, policy, part = self.context, self.policy, slice(rows.start, rows.stop)
        latents = brought(batch.latents[part], policy.device)
        conditioning = policy.encode_prompts(batch.prompts[part])
        noise = draw_noise(policy, [context.noise_of(row) for row in rows])
        means, kl = torch.zeros_like(latents[:, 1:]), torch.zeros_like(batch.kl[part])
        for k, stochastic in enumerate(policy.process.stochastic.tolist()):
            if not stochastic:
                continue
            context.check()
            positions = torch.full((len(rows),), k, device=policy.device)
            reference, std, _ = policy.step(latents[:, k], positions, conditioning)
            if self.in_loss:
                kl[:, k] = gaussian_kl(latents[:, k + 1] - std * noise[:, k + 1], reference, std)
            else:
                log_ratio = batch.log_probs[part, k] - log_prob(latents[:, k + 1], reference, std)
                kl[:, k] = log_ratio * policy.latent_size
            means[:, k] = reference
            context.tell((rows.start + len(rows) * (k + 1) / len(policy.process)) / len(batch))
        return kl, means.to(batch.latents.device)

    # --- targets

    def begin(self, kl: Tensor, rewards: Tensor, guards: Scores) -> None:
        """Fix the epoch's coefficient and what each sample's KL counts for, then adapt both for the next epoch.

        Args:
            kl: (B, T) in nats; rewards, guards: of the same samples, (B,).
        """
        self.used = self.controller.value
        if self.gate:
            self.chosen = self.gate(rewards, guards)[:, None]
        self.controller.update(kl.sum(1).mean().item(), len(kl))

    def returns(self, rewards: Tensor, kl: Tensor, gamma: float) -> Tensor:
        """G_k, (B, T), of normalised rewards (B,) and the KL of each step, (B, T) in nats."""
        if self.config.form == "loss":
            return advantages.returns(rewards, torch.zeros_like(kl), gamma)
        returns_of = advantages.returns_with_later_kl if self.in_loss else advantages.returns
        return returns_of(rewards, self.used * self.chosen * kl, gamma)

    def loss_weights(self, scale: Tensor) -> Tensor:
        """What to multiply the KL of each step by in the loss, (B, T) or (T,).

        The policy's loss has a log-probability that is a mean over C * H * W elements and not their sum, and temporal
        rewards that are divided by `scale`. Its gradient at step k is sigma_k times as large with the step-normalised
        objective. The KL of later steps, in the returns, has these factors from the policy's loss itself.
        """
        return self.used / (self.policy.latent_size * scale) * self.chosen * self._step_weights

    @property
    def _step_weights(self) -> Tensor:
        """What each step's KL counts for in the loss, (T,).

        "noise": the loss of DPOK's code, kappa mean((eps - eps_ref)^2) over the N = C * H * W elements. It is
        kappa 2 sigma_k^2 / (N c_k^2) KL_k, where c_k = d mean / d eps.
        """
        process = self.policy.process
        normalised = self.context.config.policy.objective == "step-normalised"
        weighting = self.config.weighting or ("sigma" if normalised else "uniform")
        if weighting == "noise":
            return 2 * (process.sigma / process.mean_by_noise) ** 2
        return process.sigma if weighting == "sigma" else torch.ones_like(process.sigma)

    # --- updates

    def now(self, step: Step, inputs: Any, known: Tensor | None = None) -> Tensor:
        """KL of the policy's `step` from the reference's at the same `inputs` of policy.step, in nats, (B,).

        known: the reference's means, (B, C, H, W), if they have been measured.
        """
        if known is None:
            with torch.no_grad(), self.policy.reference():
                known = self.policy.step(*inputs).mean
        return gaussian_kl(step.mean, known, step.std)

    # --- after the updates

    def metrics(self, batch: Trajectories) -> Metrics:
        if not self.enabled:
            return Metrics()
        metrics = {
            "kl/nats": self._nats(batch),
            "kl/coefficient": self.used,
            "kl/coefficient_per_element": self.used * self.policy.latent_size,
        }
        if self.gate:
            metrics["kl/gate_share"] = self.gate.share
        if self._may_reset:
            metrics["kl/reference_resets"] = self.resets
        return metrics

    def _nats(self, batch: Trajectories) -> float:
        return self.context.gather(batch.kl).sum(1).mean().item()

    @property
    def _may_reset(self) -> bool:
        return self.config.reset_above is not None or self.config.reset_every is not None

    def finish(self, batch: Trajectories) -> None:
        """Make the policy the reference if the epoch's samples were too far from it, or after enough epochs (GARDO)."""
        if not self._may_reset:
            return
        above, every, epoch = self.config.reset_above, self.config.reset_every, self.context.epoch + 1
        too_far = above is not None and self._nats(batch) > above
        if too_far or (every is not None and epoch - self.last_reset >= every):
            self.policy.kl_reference.reset()
            self.controller.restart()
            self.resets, self.last_reset = self.resets + 1, epoch

    # --- saved state

    def state(self) -> tuple[dict[str, TensorGroup], dict[str, Any]]:
        weights = self.policy.kl_reference.weights
        plain = {
            "controller": self.controller.state(),
            "used": self.used,
            "gate": self.gate.state() if self.gate else None,
            "resets": self.resets,
            "last_reset": self.last_reset,
        }
        return ({"kl_reference": weights} if weights else {}), {"kl": plain}

    def load_state(self, tensors: dict[str, TensorGroup], plain: dict[str, Any]) -> None:
        if "kl" not in plain:  # versions before the reference could be reset
            self.controller.load({"value": plain["kl_coefficient"]})
            self.used = self.controller.value
            return
        state = plain["kl"]
        self.controller.load(state["controller"])
        self.used, self.resets, self.last_reset = state["used"], state["resets"], state["last_reset"]
        if self.gate:
            self.gate.load(state["gate"])
        self.policy.kl_reference.load(tensors.get("kl_reference", {}))
