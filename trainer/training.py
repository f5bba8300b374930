"""Algorithm 1 of the paper, epoch by epoch: sample, temporal rewards, update, reset.

One loop serves all four algorithms. DDPO is the case without a critic, whose temporal reward is the normalised reward
at every step, and DDPO-2 the case whose update takes in all steps of a trajectory at once.

Shapes: N samples of an epoch in this process, T denoising steps.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor

from comfy_tdpo import advantages, objectives
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.randomness import generator_at
from comfy_tdpo.rewards import RewardModel, load_reward
from comfy_tdpo.rollout import Decoder, Sampler, Trajectories, critic_residuals

from .config import TrainConfig
from .identity import identity
from .keeping import Keeper
from .memory import first_micro_batch, fitting_micro_batch, peak_memory, smaller_micro_batch
from .neuron_states import NeuronStates
from .run import EpochMetrics, RunFolder
from .state import Progress, Targets, TrainState, Watch
from .update import Updater

RATIO_TOLERANCE = 1e-5  # of the ratio gate: |ratio - 1| before the first update of an epoch


class Stopped(Exception):
    """The stop event was set; raised between micro-batches, with several processes between epochs."""


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
        self.prompts = run.prompts(config)
        for model in (reward, *eval_rewards.values()):
            model.check_prompts(self.prompts)
        self.stopped = False
        self.samples = self._own_share(config.samples_per_epoch)
        self.samples_per_update = self._own_share(config.samples_per_update)
        self.encoder = self._critic_encoder() if config.critic.enabled else None
        self.decoder = Decoder(policy, config.decode_batch)
        micro_batch = first_micro_batch(config.micro_batch, self.samples_per_update, policy.device)
        embed_dim = self.encoder.embed_dim if self.encoder else None
        own = identity(config, policy, self.prompts)
        self.state = TrainState(config, policy, own, embed_dim, micro_batch, accelerator.num_processes)
        self.updater = Updater(config, self.state, accelerator, self.samples, self.samples_per_update, self._check_stop)
        grid_prompts = run.grid_prompts(config)
        self.keeper = Keeper(config, self.decoder, self.state, run, accelerator, reward.name, grid_prompts, self.watch)

    def _own_share(self, samples: int) -> int:
        processes = self.accelerator.num_processes
        if samples % processes:
            raise ValueError(f"got {samples} samples for {processes} processes; expected a multiple of {processes}")
        return samples // processes

    def _critic_encoder(self) -> RewardModel:
        name = self.config.critic.encoder
        how = (self.policy.device, self.config.reward_precision, self.config.reward_weights)
        model = load_reward(name, *how) if name else self.reward
        if model.embed_dim is None:
            raise ValueError(
                f"reward {model.name!r} has no image encoder to serve the critic; set critic.encoder to a reward that "
                "has one, or choose an algorithm without a critic (ddpo-2, ddpo-100)"
            )
        return model

    # --- the epochs -------------------------------------------------------------------------------------------------

    def epochs(self) -> Iterator[EpochMetrics]:
        """Run the epochs that are left, from the newest checkpoint on, and yield the metrics of each.

        The run is locked meanwhile, so that no other process writes to it.

        Raises:
            ValueError: there is nothing to go on from: a damaged checkpoint, too little memory for one sample.
            TrainingError, RewardError: it cannot go on; the last checkpoint is whole.
        """
        with self.run.lock() if self.accelerator.is_main_process else nullcontext():
            yield from self._epochs()

    def _epochs(self) -> Iterator[EpochMetrics]:
        state = self.state
        restored = state.restore(self.run.checkpoints, self._epoch_prompts)
        if state.epoch > self.config.epochs:
            raise ValueError(f"got {self.config.epochs} epochs for a run of {state.epoch}; expected as many or more")
        if self.accelerator.is_main_process:
            self.keeper.put_in_order(restored)
        self.keeper.open_trackers()
        try:
            if state.epoch == 0 and not state.progress.parts:
                self._begin()
            while state.epoch < self.config.epochs:
                self._agree_to_stop()
                yield self._run_epoch()
        except Stopped:
            self.stopped = True
            self._save_unfinished()
        finally:
            self.keeper.close_trackers()

    def _begin(self) -> None:
        """What comes before the first epoch: the micro-batch that fits, and what the model draws untrained."""
        self._check_stop()
        self.state.micro_batch = fitting_micro_batch(
            self.policy, self.prompts[0], self.state.micro_batch, self.samples_per_update
        )
        if self.accelerator.is_main_process:
            self.keeper.keep_grid(self._check_stop)

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

    def _gather(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks."""
        return self.accelerator.gather(tensor)

    def _check_stop(self) -> None:
        """Several processes wait for one another in mid-epoch, so there none of them may leave alone."""
        if self.stop.is_set() and self.accelerator.num_processes == 1:
            raise Stopped

    def _agree_to_stop(self) -> None:
        """One process that is asked to stop takes all others with it."""
        asked = torch.tensor([self.stop.is_set()], dtype=torch.int, device=self.accelerator.device)
        if self._gather(asked).any():
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
                self.state.micro_batch = smaller_micro_batch(self.state.micro_batch, self.samples_per_update)
        progress.times["sample"] += time.perf_counter() - start
        progress.parts = [Trajectories.concatenate(progress.parts)]
        return progress.parts[0]

    def _sampler(self) -> Sampler:
        config = self.config
        return Sampler(
            self.decoder,
            self.reward,
            self.eval_rewards,
            embed=self.encoder.embed if self.encoder else None,
            embed_image_size=config.critic.image_size,
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
            clip = self.config.advantage_clip or torch.inf
            return Targets(returns[own].clamp(-clip, clip), returns[own], None)
        assert self.state.critic is not None and batch.image_embeds is not None
        residuals = critic_residuals(self.state.critic, batch.image_embeds)
        temporal = advantages.temporal_rewards(returns, gather(residuals))
        return Targets(temporal[own], returns[own], residuals)

    # --- the update -------------------------------------------------------------------------------------------------

    def _update(self, epoch: int, batch: Trajectories, targets: Targets) -> None:
        """Eq. 8-10: one gradient update of policy and critic for each group of (sample, step) pairs."""
        start = time.perf_counter()
        groups = self.updater.groups(epoch)
        for index in range(self.state.progress.updates, len(groups)):
            self.watch("updating", index, len(groups))
            self.updater.update(batch, targets, *groups[index])
        self.state.progress.times["train"] += time.perf_counter() - start

    def _score_and_reset_neurons(self, batch: Trajectories) -> EpochMetrics:
        """Eq. 11-12: measure every epoch, reset every F epochs."""
        states = NeuronStates(self.config, self.state, self.accelerator, self.run)
        metrics: EpochMetrics = {}
        if batch.image_embeds is not None:
            metrics |= states.of_critic(batch.image_embeds)
        if self.config.neurons.policy_reset != "none" or self.config.neurons.policy_measure:
            metrics |= states.of_policy(batch)
        return metrics

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
            totals = gather(total[None])
            metrics[name] = totals.max().item() if name == "policy/ratio_drift" else totals.mean().item() / updates
        if targets.residuals is not None:
            explained = objectives.explained_variance(gather(targets.residuals), gather(targets.returns))
            metrics["critic/explained_variance"] = explained.item()
        if self.config.kl.coefficient > 0:
            metrics |= {"kl/nats": gather(batch.kl).sum(1).mean().item(), "kl/coefficient": self.state.kl.value}
        metrics |= {f"time/{name}_s": seconds for name, seconds in self.state.progress.times.items()}
        metrics["memory/peak_bytes"] = peak_memory(self.policy.device)
        return metrics

    def _finish_epoch(self, metrics: EpochMetrics) -> None:
        self.state.epoch, self.state.progress = self.state.epoch + 1, Progress()
        if self.accelerator.is_main_process:
            self.keeper.keep_epoch(metrics)

    def _save_unfinished(self) -> None:
        """Stopped: keep what there is, of an unfinished epoch too."""
        if self.accelerator.is_main_process and (self.state.epoch or self.state.progress.parts):
            self.keeper.keep_state()
