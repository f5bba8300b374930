"""The training loop, epoch by epoch: everything that all algorithms have in common.

What an algorithm itself samples, aims at and updates is up to its Method; see comfy_tdpo/methods.

Shapes: N samples of an epoch in this process, T denoising steps.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial

import torch
from accelerate import Accelerator

from comfy_tdpo import arithmetic
from comfy_tdpo.counts import number_of
from comfy_tdpo.interrupts import heeding
from comfy_tdpo.memory.budget import (
    MemoryBudget,
    better_in_main_memory,
    bytes_of_trajectories,
    first_micro_batch,
)
from comfy_tdpo.memory.gauges import gauge_of
from comfy_tdpo.memory.running_out import within_memory
from comfy_tdpo.methods import TensorGroup, make_method
from comfy_tdpo.methods.context import Context, Progress
from comfy_tdpo.models import describe_unread
from comfy_tdpo.optimizers import bytes_of_moments, policy_optimizer, scheduled_lr, set_lr
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.processes import FAILS, LACKS, LOST, SAVED, STOPS, Parted, Processes
from comfy_tdpo.randomness import generator_at
from comfy_tdpo.rehearsal import Rehearsal
from comfy_tdpo.rewards import RewardError, RewardModel
from comfy_tdpo.rewards.networks import needed, unneeded
from comfy_tdpo.rewards.taste import tastes_among
from comfy_tdpo.rollout import Decoder, Sampled, Trajectories

from .alarm import SINCE, told, unguarded
from .config import TrainConfig
from .epoch_metrics import reward_metrics, update_metrics
from .keeping import Keeper
from .overoptimisation import Overoptimisation
from .run import EpochMetrics, RunFolder
from .run.disk import check_disk
from .run.identity import identity
from .run.neuron_log import append_neurons, append_policy_neurons
from .run.tastes import told_of_changes
from .state import TrainState, Watch

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The stop event was set; raised between micro-batches."""


def check_warmup(config: TrainConfig, updates: int) -> None:
    """Raise ValueError if a run of `updates` updates an epoch ends before its learning rate has its full value."""
    warmup, total = config.policy.warmup_updates, config.epochs * updates
    if warmup >= total:
        raise ValueError(
            f"got policy.warmup_updates {warmup} for a run of {number_of(total, 'update')}; expected fewer: "
            "lower policy.warmup_updates or raise epochs"
        )


class Training:
    """One run, independent of threads and terminals: `epochs` yields metrics, `stop` ends it, `watch` sees progress.

    Args:
        config: the run's configuration; policy: what is trained; reward: the training reward, by name and weight;
            eval_rewards: rewards that are only tracked, by name; guards: rewards that restrain the training, by name.
        run: the folder where everything is saved; accelerator: device and processes.
        stop: checked between micro-batches; once set, the state is saved, even in mid-epoch, and `epochs` ends.
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
        guards: dict[str, RewardModel] | None = None,
    ):
        self.config, self.policy, self.run, self.accelerator = config, policy, run, accelerator
        self.stop, self.watch = stop or threading.Event(), watch
        self.prompts = run.prompts(config)
        guards = guards or {}
        for model in (reward, *eval_rewards.values(), *guards.values()):
            model.check_prompts(self.prompts)
        self.stopped = False
        self.gauge = gauge_of(policy.device)
        self.processes = Processes(accelerator)
        tastes = tastes_among([reward, *eval_rewards.values(), *guards.values()])
        whole = identity(config, policy, self.prompts, tastes)
        room = check_disk(run, config, policy)
        if config.policy.shard and self.processes.count > 1:
            policy.shard(self.processes)
        self.context = self._context(reward, eval_rewards, guards)
        self.method = make_method(config.algorithm, self.context)
        check_warmup(config, len(self.method.groups(1)))
        self.overoptimisation = Overoptimisation(config.overoptimisation, self.prompts, config.samples_per_prompt)
        self.state = TrainState(self.context, self.method, self.overoptimisation, whole)
        grid_prompts = run.grid_prompts(config)
        self._warn(describe_unread(self.policy.model, [*self.prompts, *grid_prompts]))
        self._warn(unguarded(config))
        self._warn(told_of_changes(run, config))
        self._warn(room)
        self.keeper = Keeper(
            config, self.context.decoder, self.state, run, reward.name, tastes, grid_prompts, accelerator
        )

    @property
    def arithmetic(self) -> str:
        """How the device computes, in a few words; empty if there is nothing to choose."""
        return arithmetic.described(self.config.deterministic, self.policy.device)

    def _warn(self, text: str | None) -> None:
        if self.accelerator.is_main_process and text:
            logger.warning("%s", text)

    def _context(
        self, reward: RewardModel, eval_rewards: dict[str, RewardModel], guards: dict[str, RewardModel]
    ) -> Context:
        config, policy = self.config, self.policy
        samples, samples_per_update = map(self._own_share, (config.samples_per_epoch, config.samples_per_update))
        return Context(
            config=config,
            policy=policy,
            optimizer=policy_optimizer(policy.parameters, config.policy, config.seed),
            decoder=Decoder(policy, config.decode_batch),
            reward=reward,
            eval_rewards=eval_rewards,
            guards=guards,
            processes=self.processes,
            samples=samples,
            samples_per_update=samples_per_update,
            micro_batch=self._first_micro_batch(samples_per_update),
            prompts=self._epoch_prompts,
            all_prompts=self.prompts,
            check=self._check_stop,
            record=partial(self._keep_neurons, append_neurons),
            record_policy=partial(self._keep_neurons, append_policy_neurons),
            watch=self._tell,
            scaler=torch.amp.GradScaler(policy.device.type, enabled=config.precision == "fp16"),
        )

    def _first_micro_batch(self, samples_per_update: int) -> int:
        """Where the model is sharded, one sample on GPUs: all processes take equally many, so none can choose."""
        configured, device = self.config.micro_batch, self.policy.device
        if self.policy.trainable.sharded and device.type != "cpu":
            configured = configured or 1
        return first_micro_batch(configured, samples_per_update, device, self.config.rows_together)

    def _own_share(self, samples: int) -> int:
        processes = self.processes.count
        if samples % processes:
            raise ValueError(
                f"got {number_of(samples, 'sample')} for {processes} processes; expected a multiple of {processes}"
            )
        return samples // processes

    # --- the epochs -------------------------------------------------------------------------------------------------

    def epochs(self) -> Iterator[EpochMetrics]:
        """Run the remaining epochs, starting from the newest checkpoint, and yield the metrics of each.

        The run is locked meanwhile, so that no other process writes to it.

        Raises:
            ValueError: the run cannot start: its checkpoint is damaged, or memory does not suffice for one sample.
            TrainingError, Parted: the run cannot continue; the last checkpoint is intact.
            RewardError: a reward failed; everything before that is saved.
        """
        lock = self.run.lock() if self.accelerator.is_main_process else nullcontext()
        with lock, arithmetic.switched(self.config.deterministic):
            try:
                yield from self._epochs()
            except BaseException as error:  # the others must not wait for this process
                self._call_off()
                self._tell_others(error)
                raise
            finally:
                self.keeper.end()

    def _epochs(self) -> Iterator[EpochMetrics]:
        context = self.context
        if self.arithmetic:
            logger.info("%s on %s: %s", self.run.path.name, self.policy.device, self.arithmetic)
        context.in_main_memory = self._keeps_in_main_memory()
        with self._at_the_disk():
            restored = self.state.restore(self.run.checkpoints)
        if context.epoch > self.config.epochs:
            raise ValueError(
                f"got {number_of(self.config.epochs, 'epoch')} for a run that has finished {context.epoch}; expected "
                "as many or more"
            )
        if self.keeper.takes_part:
            with self._at_the_disk():
                self.keeper.put_in_order(restored)
        self.keeper.open_trackers()
        try:
            with torch.no_grad(), unneeded(context.rewards):
                self.policy.encode_ahead([*self.prompts, *self.keeper.grid_prompts], self._check_stop)
            if context.epoch == 0 and not context.progress.parts:
                with self._heeding():
                    self._begin()
            while not self._is_over:
                self._check_stop()
                self.processes.meet()
                with self._heeding():
                    metrics = self._run_epoch()
                yield metrics
        except (Stopped, RewardError, Parted) as end:
            self._end_early(end)

    def _tell_others(self, error: BaseException) -> None:
        """Tell the other processes that this one fails; raises Parted if `error` is that torch has lost one of them.

        Where the model is sharded, the others may be waiting inside torch and never hear it, so `error` is told first.
        """
        sharded = self.policy.trainable.sharded
        if sharded and not isinstance(error, Parted):
            logger.error("process %d: %s: %s", self.processes.rank, type(error).__name__, error)
        try:
            self.processes.part(FAILS)
        except Parted as parted:
            if sharded and isinstance(error, RuntimeError) and parted.why == LOST:
                raise parted from error

    def _heeding(self) -> AbstractContextManager[None]:
        """Inside the block, what waits heeds a stop, and shows what it waits for."""
        return heeding(self._check_stop, self.context.wait)

    def _at_the_disk(self) -> AbstractContextManager[None]:
        """Inside the block, a stop is not heeded, so that what is read or written is whole."""
        return heeding(self.processes.sign)

    def _end_early(self, end: Stopped | RewardError | Parted) -> None:
        """Save what there is where all processes are at the same point; raises `end` unless that is a stop."""
        why = end.why if isinstance(end, Parted) else LACKS if isinstance(end, RewardError) else STOPS
        try:
            if why == LACKS:
                self._call_off()
            if why in SAVED:
                self.processes.part(why)
        except Parted as worse:
            why, end = worse.why, end if isinstance(end, RewardError) else worse
        if why in SAVED:
            self._save_unfinished()
        if why != STOPS:
            raise end
        self.stopped = True

    def _call_off(self) -> None:
        """Have the other processes stop soon: what they do now is for nothing."""
        if self.processes.count > 1:
            self.stop.set()  # which is passed on

    @property
    def _is_over(self) -> bool:
        """Whether all epochs have finished, or the run is to end because it overoptimises."""
        overoptimises = self.overoptimisation.since is not None
        return self.context.epoch >= self.config.epochs or (overoptimises and self.config.stop_on_overoptimisation)

    def _begin(self) -> None:
        """Before the first epoch, find what fits into memory, and draw samples with the untrained model."""
        self._check_stop()
        self._settle()
        if self.keeper.takes_part:
            self.keeper.keep_grid(self._check_stop)

    def _settle(self) -> None:
        """Choose how many rows go through at once, and whether with gradient checkpointing."""
        context, config = self.context, self.config
        if self.policy.trainable.sharded:
            return
        longest = max(self.prompts, key=len)
        rehearsal = Rehearsal(self.policy, longest, context.rewards, config.needs_gradient)
        reserve, elsewhere = bytes_of_moments(self.policy.count, config.policy), self._trajectories
        if not context.in_main_memory:
            reserve, elsewhere = reserve + elsewhere, 0
        most = context.samples_per_update, context.micro_batch, context.decoder.batch
        reserve = reserve if self.gauge.exact else 0
        budget = MemoryBudget(self.gauge, *most, reserve, elsewhere, config.rows_together)
        with self.policy.uncompiled():  # or torch would compile for one row and for two
            choice, told = budget.settle(rehearsal)
        context.micro_batch, context.decoder.batch = choice.micro_batch, choice.decode_batch
        self._warn(told)

    def _keeps_in_main_memory(self) -> bool:
        """Whether an epoch's latents, which are the same to the last bit wherever they are, go to main memory."""
        return self.gauge.exact and better_in_main_memory(self._trajectories, self.gauge.free())

    @property
    def _trajectories(self) -> int:
        samples = self.context.samples if self.method.samples_first else 0
        return bytes_of_trajectories(self.config, self.policy, samples)

    def _run_epoch(self) -> EpochMetrics:
        context, method, start = self.context, self.method, time.perf_counter()
        self.gauge.reset()
        if method.samples_first:
            self._sample()
        self._update()
        with torch.no_grad():
            batch = context.progress.batch()
            metrics = self._metrics(batch) | method.finish(batch)
        metrics["time/epoch_s"] = time.perf_counter() - start
        self._finish_epoch(metrics)
        return metrics

    def _check_stop(self) -> None:
        """Raise Stopped on request. The other processes hear of it as soon as they would send something."""
        self.processes.sign()
        if self.stop.is_set():
            raise Stopped

    def _tell(self, phase: str, done: float, total: int) -> None:
        self.processes.sign()
        self.watch(phase, done, total)

    # --- sampling and updates ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _sample(self) -> None:
        """Sample N trajectories from the current policy, then the targets of the updates."""
        progress, start = self.context.progress, time.perf_counter()
        self._sample_all()
        progress.times["sample"] += time.perf_counter() - start
        if progress.targets is None:
            progress.targets = self.method.targets(progress.batch(), self._epoch_prompts(self.context.epoch + 1))

    def _sample_all(self) -> None:
        """One micro-batch after the other; while another program scores one, the next one is drawn."""
        context, progress = self.context, self.context.progress
        waiting: list[Sampled] = []  # at most one

        def sample() -> Sampled:
            rows = range(begin, min(begin + context.micro_batch, context.samples))
            context.begin("sampling", begin, len(rows), context.samples)
            sampled = self.method.sample(*context.draws(rows))
            if sampled.is_scored:
                sampled.trajectories()  # here, where memory may run out
            return sampled

        def keep() -> None:
            found = waiting[0].trajectories()
            progress.parts.append(found.in_main_memory() if context.in_main_memory else found)
            del waiting[0]

        try:
            while (begin := progress.samples + sum(map(len, waiting))) < context.samples:
                sampled = within_memory(sample, context.shrink)
                if waiting:
                    keep()
                waiting.append(sampled)
                sampled.ask()
                if sampled.is_scored:
                    keep()
            if waiting:
                keep()
        except BaseException:
            if waiting and waiting[0].is_scored:
                with suppress(RewardError, Stopped):  # others than the one that is raised
                    keep()
            raise
        finally:
            for sampled in waiting:
                sampled.give_up()

    def _epoch_prompts(self, epoch: int) -> list[str]:
        """The prompt of each sample of the epoch, across all processes, in groups of samples_per_prompt."""
        generator, size = generator_at(self.config.seed, "prompts", epoch), self.config.samples_per_prompt
        chosen = torch.randint(len(self.prompts), (self.config.samples_per_epoch // size,), generator=generator)
        return [self.prompts[i] for i in chosen.repeat_interleave(size).tolist()]

    def _update(self) -> None:
        """Run the remaining gradient updates of the epoch."""
        progress, start = self.context.progress, time.perf_counter()
        groups = self.method.groups(self.context.epoch + 1)
        where = unneeded if self.method.samples_first else needed  # the backward pass needs them too
        with where(self.context.rewards):
            for index in range(progress.updates, len(groups)):
                if self.method.samples_first:  # otherwise the method says how many samples it has drawn
                    self.context.begin("updating", index, 1, len(groups))
                set_lr(self.context.optimizer, self._lr(index, len(groups)))
                self.method.update(groups[index])
                progress.updates += 1
        progress.times["train"] += time.perf_counter() - start

    def _lr(self, index: int, updates: int) -> float:
        """The policy's learning rate in an update of the current epoch, which has `updates` in all."""
        done = self.context.epoch * updates
        return scheduled_lr(self.config.policy, done + index, self.config.epochs * updates)

    # --- metrics and saving -----------------------------------------------------------------------------------------

    def _metrics(self, batch: Trajectories) -> EpochMetrics:
        """The metrics that all algorithms have, and those of the method."""
        context, epoch = self.context, self.context.epoch + 1
        prompts = self._epoch_prompts(epoch)
        queries = self.config.samples_per_epoch * self.config.queries_per_sample
        metrics: EpochMetrics = {"epoch": epoch, "reward_queries": epoch * queries}
        metrics |= reward_metrics(context, batch, prompts)
        watched = self.config.overoptimisation.reward
        if watched in batch.eval_rewards:  # a method that samples in its updates may score the training reward alone
            rewards, scores = context.gather(batch.rewards), context.gather(batch.eval_rewards[watched])
            metrics |= self.overoptimisation.end_epoch(epoch, rewards.mean().item(), scores, prompts)
        metrics |= update_metrics(context) | self.method.metrics(batch)
        if self.config.policy.lr_schedule != "constant" or self.config.policy.warmup_updates:
            updates = context.progress.updates
            metrics["policy/lr"] = self._lr(updates - 1, updates)  # of the last update
        metrics |= {f"time/{name}_s": seconds for name, seconds in context.progress.times.items()}
        metrics["memory/peak_bytes"] = self.gauge.peak()
        return metrics

    def _keep_neurons(self, append: Callable[..., None], epoch: int, *groups: TensorGroup) -> None:
        if self.accelerator.is_main_process:
            append(self.run.path, epoch, *groups)

    def _finish_epoch(self, metrics: EpochMetrics) -> None:
        self.context.epoch, self.context.progress = self.context.epoch + 1, Progress()
        if self.keeper.takes_part:
            rang = any(SINCE in line for line in self.state.metrics)
            with self._at_the_disk():
                self.keeper.keep_epoch(metrics, last=self._is_over)
            if self.keeper.writes and self.overoptimisation.since is not None and not rang:
                logger.warning("%s", told(self.run, self.state.metrics, self.config))

    def _save_unfinished(self) -> None:
        """After a stop or a reward's failure, save what there is, including an unfinished epoch."""
        unfinished = self.state.unfinished()
        if self.keeper.takes_part and (self.context.epoch or unfinished):
            with self._at_the_disk():
                self.keeper.keep_state(unfinished)
        self.processes.wait()  # a launcher may end all processes as soon as one has ended
