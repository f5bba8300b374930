"""Algorithm 1 of the paper, epoch by epoch: sample, temporal rewards, update, reset.

One loop serves all four algorithms. DDPO is the case without a critic, whose temporal reward is the normalised reward
at every step, and DDPO-2 the case whose update takes in all steps of a trajectory at once.

Shapes: N samples of an epoch in this process, B of a micro-batch, M (sample, step) pairs of one gradient update, T
denoising steps.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from comfy_tdpo import __version__, advantages, objectives
from comfy_tdpo.critic import TemporalCritic
from comfy_tdpo.diffusion import log_prob, scaled_clip_range
from comfy_tdpo.lora import save_lora
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.prompts import load_prompts
from comfy_tdpo.randomness import generator_at, seeded_at
from comfy_tdpo.rewards import RewardModel, load_reward
from comfy_tdpo.rollout import Sampler, Trajectories, critic_residuals, draw_images

from .config import TrainConfig
from .neuron_states import NeuronStates
from .plots import save_image_grid
from .run import EpochMetrics, RunFolder, write_atomically
from .state import Progress, Targets, TrainState

Watch = Callable[[str, int, int], None]  # (phase, done, total)

RATIO_TOLERANCE = 1e-5  # of the ratio gate: |ratio - 1| before the first update of an epoch
CPU_MICRO_BATCH = 16  # where nothing is configured: more rows gain nothing there, and RAM does not say when it ends


class Stopped(Exception):
    """The stop event was set; raised between micro-batches."""


class Training:
    """One run. It knows no threads and no terminal: `epochs` yields metrics, `stop` ends it, `watch` sees it move.

    Args:
        config: the run's configuration; policy, reward, eval_rewards: what it trains, on what, watched by what.
        run: where everything is kept; accelerator: device and processes.
        stop: asked between micro-batches; the state is saved in mid-epoch and `epochs` ends.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: DiffusionPolicy,
        reward: RewardModel,
        eval_rewards: dict[str, RewardModel],
        run: RunFolder,
        accelerator: Accelerator,
        stop: threading.Event | None = None,
        watch: Watch = lambda phase, done, total: None,
    ):
        self.config, self.policy, self.run, self.accelerator = config, policy, run, accelerator
        self.reward, self.eval_rewards = reward, eval_rewards
        self.stop, self.watch = stop or threading.Event(), watch
        self.prompts = load_prompts(config.prompts)
        self.stopped = False
        self.samples = self._own_share(config.samples_per_epoch)
        self.samples_per_update = self._own_share(config.samples_per_update)
        self.clip_range = scaled_clip_range(config.policy.clip_range, policy.latent_size)
        self.encoder = self._critic_encoder() if config.critic.enabled else None
        limit = config.micro_batch or (CPU_MICRO_BATCH if policy.device.type == "cpu" else self.samples_per_update)
        micro_batch = self._largest_divisor(limit)
        self.state = TrainState(config, policy, self.encoder.embed_dim if self.encoder else None, micro_batch)

    def _own_share(self, samples: int) -> int:
        processes = self.accelerator.num_processes
        if samples % processes:
            raise ValueError(f"got {samples} samples for {processes} processes; expected a multiple of {processes}")
        return samples // processes

    def _largest_divisor(self, limit: int) -> int:
        """Every forward has the same number of rows, so that sampling and training agree to the last bit."""
        return max(d for d in range(1, self.samples_per_update + 1) if self.samples_per_update % d == 0 and d <= limit)

    def _critic_encoder(self) -> RewardModel:
        name = self.config.critic.encoder
        model = load_reward(name, self.policy.device) if name else self.reward
        if model.embed_dim is None:
            raise ValueError(
                f"reward {model.name!r} has no image encoder to serve the critic; set critic.encoder to a reward that "
                "has one, or choose an algorithm without a critic (ddpo-2, ddpo-100)"
            )
        return model

    # --- the epochs -------------------------------------------------------------------------------------------------

    def epochs(self) -> Iterator[EpochMetrics]:
        """Run the epochs that are left, from the newest checkpoint on, and yield the metrics of each."""
        state = self.state
        state.restore(self.run.checkpoints, self._epoch_prompts)
        if self.accelerator.is_main_process:
            self.run.forget_after(state.epoch)
        try:
            if state.epoch == 0 and not state.progress.parts:
                self._fit_micro_batch()
                self._save_grid()
            while state.epoch < self.config.epochs:
                yield self._run_epoch()
        except Stopped:
            self.stopped = True
            self._save_unfinished()

    def _run_epoch(self) -> EpochMetrics:
        epoch, progress, start = self.state.epoch + 1, self.state.progress, time.perf_counter()
        batch = self._sample(epoch)
        if progress.targets is None:
            progress.targets = self._targets(batch, epoch)
        self._update(epoch, batch, progress.targets)
        metrics = self._metrics(epoch, batch, progress.targets) | self._score_and_reset_neurons(batch)
        metrics["time/epoch_s"] = time.perf_counter() - start
        self._finish_epoch(metrics)
        return metrics

    @property
    def _critic(self) -> TemporalCritic:
        assert self.state.critic is not None, "the algorithm has no critic"
        return self.state.critic

    def _gather(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks."""
        return self.accelerator.gather(tensor)

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise Stopped

    # --- sampling ---------------------------------------------------------------------------------------------------

    def _sample(self, epoch: int) -> Trajectories:
        """N trajectories from the current policy, a micro-batch at a time."""
        sampler, start, progress = self._sampler(), time.perf_counter(), self.state.progress
        prompts, first = self._epoch_prompts(epoch), self.accelerator.process_index * self.samples
        while (begin := progress.samples) < self.samples:
            self.watch("sampling", begin, self.samples)
            rows = range(first + begin, first + min(begin + self.state.micro_batch, self.samples))
            seeds = [(self.config.seed, "noise", epoch, row) for row in rows]
            try:
                progress.parts.append(sampler.sample([prompts[row] for row in rows], seeds))
            except torch.cuda.OutOfMemoryError:
                self._shrink_micro_batch()
        progress.times["sample"] += time.perf_counter() - start
        return Trajectories.concatenate(progress.parts)

    def _sampler(self) -> Sampler:
        config = self.config
        return Sampler(
            self.policy,
            self.reward,
            self.eval_rewards,
            embed=self.encoder.embed if self.encoder else None,
            embed_image_size=config.critic.image_size,
            decode_batch=config.decode_batch,
            with_kl=config.kl.coefficient > 0,
            check=self._check_stop,
        )

    def _epoch_prompts(self, epoch: int) -> list[str]:
        """The prompt of each sample of the epoch, in all processes."""
        generator = generator_at(self.config.seed, "prompts", epoch)
        chosen = torch.randint(len(self.prompts), (self.config.samples_per_epoch,), generator=generator)
        return [self.prompts[i] for i in chosen.tolist()]

    # --- temporal rewards -------------------------------------------------------------------------------------------

    def _targets(self, batch: Trajectories, epoch: int) -> Targets:
        """Eq. 5-7. Moments are those of all processes; each keeps its own rows."""
        gather = self._gather
        kl = gather(batch.kl)
        normalized = self.state.moments.normalize(self._epoch_prompts(epoch), gather(batch.rewards))
        returns = advantages.returns(normalized, self.state.kl.value * kl, self.config.gamma)
        self.state.kl.update(kl.sum(1).mean().item(), len(kl))
        begin = self.accelerator.process_index * self.samples
        own = slice(begin, begin + self.samples)
        if self.encoder is None:
            clip = self.config.advantage_clip
            return Targets(returns[own].clamp(-clip, clip) if clip else returns[own], returns[own], None)
        assert batch.image_embeds is not None
        residuals = critic_residuals(self._critic, batch.image_embeds)
        temporal = advantages.temporal_rewards(returns, gather(residuals))
        return Targets(temporal[own], returns[own], residuals)

    # --- the update -------------------------------------------------------------------------------------------------

    def _update(self, epoch: int, batch: Trajectories, targets: Targets) -> None:
        """Eq. 8-10: one gradient update of policy and critic for each group of (sample, step) pairs."""
        start = time.perf_counter()
        updates = self._updates(epoch)
        for index in range(self.state.progress.updates, len(updates)):
            self.watch("updating", index, len(updates))
            rows, steps = updates[index]
            self._update_policy(batch, targets, rows, steps, first=index == 0)
            if targets.residuals is not None:
                self._update_critic(batch, targets, rows, steps, seed=(epoch, index))
            self.state.progress.updates += 1
        self.state.progress.times["train"] += time.perf_counter() - start

    def _updates(self, epoch: int) -> list[tuple[Tensor, Tensor]]:
        """The epoch's gradient updates as (rows, steps), int64 (M,) each, on the CPU: naming prompts needs no sync."""
        generator = generator_at(self.config.seed, "order", epoch, self.accelerator.process_index)
        rows = torch.randperm(self.samples, generator=generator)
        steps = torch.arange(len(self.policy.schedule)).repeat(self.samples, 1)  # (N, T)
        if self.config.policy.timestep_order == "shuffled":
            steps = torch.rand(steps.shape, generator=generator).argsort(dim=1)
        groups = rows.split(self.samples_per_update)
        if self.config.updates == "trajectory":
            return [(group.repeat_interleave(steps.shape[1]), steps[group].flatten()) for group in groups]
        return [(group, steps[group, j]) for j in range(steps.shape[1]) for group in groups]

    def _update_policy(self, batch: Trajectories, targets: Targets, rows: Tensor, steps: Tensor, first: bool) -> None:
        """Eq. 8, averaged over the M pairs, a micro-batch at a time."""
        while True:
            sums = dict(self.state.progress.sums)
            try:
                self._accumulate_policy(batch, targets, rows, steps, first)
                break
            except (Stopped, torch.cuda.OutOfMemoryError) as error:
                self.state.progress.sums = sums
                self.state.optimizer.zero_grad()
                if isinstance(error, Stopped):
                    raise
                self._shrink_micro_batch()
        self._optimizer_step(self.state.optimizer, self.config.policy.max_grad_norm)

    def _accumulate_policy(
        self, batch: Trajectories, targets: Targets, rows: Tensor, steps: Tensor, first: bool
    ) -> None:
        size = self.state.micro_batch
        for micro_rows, micro_steps in zip(rows.split(size), steps.split(size), strict=True):
            self._check_stop()
            ratio, log_ratio = self._ratio(batch, micro_rows, micro_steps)
            advantage = targets.temporal_rewards[micro_rows, micro_steps]
            loss = objectives.policy_loss(ratio, advantage, self.clip_range).sum() / len(rows)
            loss.backward()
            share, ratio, log_ratio = len(micro_rows) / len(rows), ratio.detach(), log_ratio.detach()
            self._add("policy/loss", loss.detach())
            self._add("policy/approx_kl", share * objectives.approximate_kl(log_ratio * self.policy.latent_size))
            self._add("policy/clip_fraction", share * objectives.clip_fraction(ratio, self.clip_range))
            if first:
                self._raise_to("policy/ratio_drift", (ratio - 1).abs().max())

    def _fit_micro_batch(self) -> None:
        """Shrink the micro-batch until a training step of that many rows fits into memory."""
        while True:
            size = self.state.micro_batch
            start = torch.zeros(size, dtype=torch.long, device=self.policy.device)
            embeds = self.policy.encode_prompts(self.prompts[:1]).expand(size, -1, -1)
            try:
                latents = torch.zeros(size, *self.policy.latent_shape, device=self.policy.device)
                self.policy.step(latents, start, embeds)[0].sum().backward()
                break
            except torch.cuda.OutOfMemoryError:
                self._shrink_micro_batch()
            finally:
                self.state.optimizer.zero_grad()

    def _shrink_micro_batch(self) -> None:
        """Halve the micro-batch, or as near as a divisor allows; the update it is a part of stays the same."""
        if self.state.micro_batch == 1:
            raise ValueError(
                "got out of memory with one sample at a time; expected room for that: lower resolution, set "
                "policy.gradient_checkpointing to true, precision to bf16, or close what else uses the device"
            )
        self.state.micro_batch = self._largest_divisor(self.state.micro_batch // 2)
        torch.cuda.empty_cache()

    def _ratio(self, batch: Trajectories, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """rho of Eq. 8 and its logarithm for pairs of samples and steps, (B,) each."""
        prompt_embeds = self.policy.encode_prompts([batch.prompts[row] for row in rows.tolist()])
        rows, steps = rows.to(self.policy.device), steps.to(self.policy.device)
        mean, sigma = self.policy.step(batch.latents[rows, steps], steps, prompt_embeds)
        log_ratio = log_prob(batch.latents[rows, steps + 1], mean, sigma) - batch.log_probs[rows, steps]
        return log_ratio.exp(), log_ratio

    def _update_critic(
        self, batch: Trajectories, targets: Targets, rows: Tensor, steps: Tensor, seed: tuple[int, int]
    ) -> None:
        """Eq. 9-10 over the M pairs at once: the critic is small, and its dropout then knows no micro-batches."""
        assert batch.image_embeds is not None and targets.residuals is not None
        self._critic.train()
        with seeded_at(self.config.seed, "dropout", *seed, self.accelerator.process_index):
            residuals = self._critic(batch.image_embeds[rows, steps])
        loss = objectives.critic_loss(
            residuals, targets.residuals[rows, steps], targets.returns[rows, steps], self.config.critic.clip_range
        ).mean()
        loss.backward()
        self._add("critic/loss", loss.detach())
        self._optimizer_step(self.state.critic_optimizer, self.config.critic.max_grad_norm)

    def _optimizer_step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        parameters = optimizer.param_groups[0]["params"]
        if self.accelerator.num_processes > 1:
            for parameter in parameters:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    def _score_and_reset_neurons(self, batch: Trajectories) -> EpochMetrics:
        """Eq. 11-12: measure every epoch, reset every F epochs."""
        states = NeuronStates(self.config, self.state, self.accelerator)
        metrics: EpochMetrics = {}
        if batch.image_embeds is not None:
            metrics |= states.of_critic(batch.image_embeds)
        if self.config.neurons.policy_reset != "none":
            metrics |= states.of_policy(batch)
        return metrics

    def _add(self, name: str, value: Tensor) -> None:
        sums = self.state.progress.sums
        sums[name] = sums.get(name, 0) + value

    def _raise_to(self, name: str, value: Tensor) -> None:
        sums = self.state.progress.sums
        sums[name] = torch.maximum(sums.get(name, value), value)

    # --- what is kept -----------------------------------------------------------------------------------------------

    def _metrics(self, epoch: int, batch: Trajectories, targets: Targets) -> EpochMetrics:
        gather, updates = self._gather, self.state.progress.updates
        metrics: EpochMetrics = {"epoch": epoch, "reward_queries": epoch * self.config.samples_per_epoch}
        rewards = gather(batch.rewards)
        metrics[f"reward/{self.reward.name}/mean"] = rewards.mean().item()
        metrics[f"reward/{self.reward.name}/std"] = rewards.std(correction=0).item()
        for name, scores in batch.eval_rewards.items():
            metrics[f"eval/{name}/mean"] = gather(scores).mean().item()
        for name, total in self.state.progress.sums.items():
            metrics[name] = total.item() if name == "policy/ratio_drift" else total.item() / updates
        if targets.residuals is not None:
            explained = objectives.explained_variance(gather(targets.residuals), gather(targets.returns))
            metrics["critic/explained_variance"] = explained.item()
        if self.config.kl.coefficient > 0:
            metrics |= {"kl/nats": gather(batch.kl).sum(1).mean().item(), "kl/coefficient": self.state.kl.value}
        metrics |= {f"time/{name}_s": seconds for name, seconds in self.state.progress.times.items()}
        metrics["memory/peak_bytes"] = _peak_memory(self.policy.device)
        return metrics

    def _finish_epoch(self, metrics: EpochMetrics) -> None:
        """The epoch is done: keep it on disk, the checkpoint last."""
        self.state.epoch, self.state.progress = self.state.epoch + 1, Progress()
        if not self.accelerator.is_main_process:
            return
        epoch, config = self.state.epoch, self.config.output
        last = epoch == self.config.epochs
        self.run.append_metrics(metrics)
        self.accelerator.log(metrics, step=epoch)
        if last or epoch % config.samples_every == 0:
            self._save_grid()
            self._save_lora(self.run.lora(epoch))
        if last or epoch % config.checkpoint_every == 0:
            self._save_state()

    def _save_unfinished(self) -> None:
        """Stopped in mid-epoch: keep what there is of it. With several processes the epoch is run again instead."""
        if self.accelerator.num_processes == 1 and (self.state.epoch or self.state.progress.parts):
            self._save_state()

    def _save_state(self) -> None:
        self._save_lora(self.run.latest_lora)
        self.state.save(self.run.checkpoints, self.config.output.keep_checkpoints)

    def _save_grid(self) -> None:
        """Images of fixed prompts from fixed noise."""
        if not self.accelerator.is_main_process:
            return
        prompts = load_prompts(self.config.grid_prompts) if self.config.grid_prompts else self.prompts
        count = self.config.output.grid_images
        picked = [prompts[i * len(prompts) // count] for i in range(count)]
        seeds = [(self.config.seed, "grid", i) for i in range(count)]
        self.watch("drawing samples", 0, count)
        images = draw_images(self.policy, picked, seeds, self.state.micro_batch)
        save_image_grid(images, self.run.sample_grid(self.state.epoch))

    def _save_lora(self, path: Path) -> None:
        metadata = {
            "base_model": _model_name(self.config.model),
            "algorithm": self.config.algorithm,
            "reward": self.reward.name,
            "epoch": str(self.state.epoch),
            "comfy_tdpo": __version__,
        }
        write_atomically(path, lambda file: save_lora(self.policy.unet, file, self.policy.alpha, metadata))


def _model_name(model: str) -> str:
    """A model's name without the folders it lies in, which are nobody's business."""
    return Path(model).name if Path(model).exists() else model


def _peak_memory(device: torch.device) -> int:
    """The most memory this process has held: on the GPU where it trains there, else in RAM; bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
