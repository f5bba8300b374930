"""The policy's update: the same for every micro-batch, from a ratio of 1, on the adapters alone."""

import pytest
import torch
from accelerate import Accelerator
from toy import Brightness, drifts, new_run

from comfy_tdpo.rollout import Decoder, Sampler, draw_noise, draw_noise_of
from comfy_tdpo.trainer.training import Training

PRECISIONS = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16, "autocast": torch.bfloat16},
}
GATE = 1e-5  # |ratio - 1| before the first update of an epoch


@pytest.fixture
def make_training(make_policy, tmp_path):
    """Trainings of one configuration and one policy, whose LoRA is not that of the start."""
    count = 0

    def make(settings: dict | None = None, /, **overrides) -> Training:
        nonlocal count
        count += 1
        run = new_run(tmp_path / str(count), **overrides)
        config = run.config
        policy = make_policy(steps=config.steps, guidance=config.guidance, trained=True, **(settings or {}))
        return Training(config, policy, Brightness(), {}, run, Accelerator(cpu=True))

    return make


def sampled(training: Training):
    """The samples of the first epoch and what its updates aim at."""
    training._sample()
    return training.context.progress.batch(), training.context.progress.targets


# --- the micro-batch


def keep_gradients(optimizer: torch.optim.Optimizer, kept: list[torch.Tensor]) -> None:
    """Have `kept` take in the gradients of each step of `optimizer`."""
    parameters = optimizer.param_groups[0]["params"]
    optimizer.register_step_pre_hook(lambda *_: kept.extend(parameter.grad.clone() for parameter in parameters))


UPDATES = {
    "tdpo-r": {},
    "ddpo-2": {"algorithm": "ddpo-2"},
    "step-normalised": {"policy": {"objective": "step-normalised"}},
    "trust-region": {"policy": {"objective": "trust-region", "trust_region": 0.16}},
    "kl": {"kl": {"coefficient": 0.03}},
}


def drift(training: Training) -> None:
    """Move the LoRA away from what it sampled with, so that some steps leave the range that is allowed."""
    draw = torch.Generator().manual_seed(1)
    for parameter in training.policy.parameters:
        parameter.data.add_(torch.randn(parameter.shape, generator=draw), alpha=0.01)


@pytest.mark.parametrize("name", UPDATES)
def test_the_update_does_not_know_the_micro_batch(make_training, name):
    settings = {"samples_per_epoch": 16, "samples_per_update": 8} | UPDATES[name]
    # at an epsilon of 1e-8 Adam's first step is the gradient's sign, which rounding decides near 0
    settings["policy"] = settings.get("policy", {}) | {"lr": 1e-4, "eps": 1e-3}
    sampled_by = make_training(micro_batch=8, **settings)
    batch, targets = sampled(sampled_by)
    seen = {}
    for micro_batch in (8, 1):
        training = make_training(micro_batch=micro_batch, **settings)
        if "objective" in settings["policy"]:
            drift(training)
        gradients, before = [], [p.detach().clone() for p in training.policy.parameters]
        keep_gradients(training.context.optimizer, gradients)
        rows, steps = training.method.groups(1)[0]
        assert len(rows) == (8 * len(training.policy.process) if name == "ddpo-2" else 8)
        training.method.update_policy(batch, targets, rows, steps)
        parameters = [p.detach() for p in training.policy.parameters]
        assert not any(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
        seen[micro_batch] = gradients, parameters, dict(training.context.progress.sums)
    (gradients, parameters, sums), (gradients_1, parameters_1, sums_1) = seen[8], seen[1]
    # of a norm of 0.05 and 0.09 here; float32 sums of thousands of terms in another order: measured 2e-8 and 2e-7
    torch.testing.assert_close(gradients_1, gradients, rtol=0, atol=1e-6)
    assert torch.cat([g.flatten() for g in gradients]).norm() > 0.01
    # Adam's first step is lr g / (|g| + eps): 2e-7 of the gradient are at most 2e-8 of a parameter, which near 1 is
    # rounded by 6e-8 besides
    torch.testing.assert_close(parameters_1, parameters, rtol=0, atol=2e-7)
    if "objective" in settings["policy"]:
        assert 0.1 < sums["policy/clip_fraction"].item() < 0.9, "some steps are outside the range, and some inside"
    for metric, value in sums.items():  # float32
        assert sums_1[metric].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), metric


# --- the ratio gate


def all_ratios(training: Training, batch) -> torch.Tensor:
    """|rho - 1| of every sample and step, (N, T), in the micro-batches in which the epoch's updates compute them."""
    drift = torch.full(batch.log_probs.shape, torch.nan)
    for rows, steps in training.method.groups(1):
        size = training.context.micro_batch
        for micro_rows, micro_steps in zip(rows.split(size), steps.split(size), strict=True):
            ratio = training.method._ratio_now(batch, micro_rows, micro_steps).exp()
            assert ratio.requires_grad, "as in the update"
            drift[micro_rows, micro_steps] = (ratio.detach() - 1).abs()
    assert drift.isfinite().all(), "every sample and step once"
    return drift


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 12])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_ratio_of_fresh_samples_is_1(make_training, precision, micro_batch):
    training = make_training(
        PRECISIONS[precision], samples_per_epoch=12, samples_per_update=12, micro_batch=micro_batch, steps=5
    )
    assert training.context.micro_batch == micro_batch
    drift = all_ratios(training, sampled(training)[0])
    assert drift.shape == (12, 5) and drift.max() < GATE


def test_the_gate_fails_where_latents_are_rounded_after_they_were_scored(make_training):
    training = make_training(samples_per_epoch=4, samples_per_update=4)
    batch, _ = sampled(training)
    batch.latents = batch.latents.bfloat16().float()
    drift = all_ratios(training, batch)
    assert drift.max() > 10 * GATE
    assert drift[:, -1].min() > GATE, "the last step has the smallest sigma: every sample is out"


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_the_gate_is_a_metric_of_all_trained_steps(make_training, step, micro_batch):
    """The log-probabilities of one step are off: exp(-0.01) - 1, in float32 from log-probabilities of size 1."""
    training = make_training(samples_per_epoch=4, samples_per_update=4, micro_batch=micro_batch)
    sampled(training)
    (part,) = training.context.progress.parts
    part.log_probs[:, step] += 0.01
    drift, after = drifts(training)
    assert drift == pytest.approx(1 - 0.990050, abs=1e-5)
    assert after == drift, "the second update is by a policy that has moved"


def test_the_gate_sees_what_a_device_computes_only_with_gradients(make_training):
    """As where its kernels for calls that need none are others."""
    training = make_training(samples_per_epoch=4, samples_per_update=4)
    sampled(training)
    step = training.policy.step

    def other_kernels(*inputs):
        found = step(*inputs)
        return found._replace(mean=found.mean + 0.01 * found.mean.requires_grad)

    training.policy.step = other_kernels
    assert drifts(training)[0] > 100 * GATE


def test_the_noise_of_one_step_is_that_of_the_trajectory(make_training):
    policy, steps = make_training().policy, torch.tensor([0, 2])
    seeds = [(1, "noise", 0), (1, "noise", 1)]
    whole = draw_noise(policy, seeds)
    assert torch.equal(draw_noise_of(policy, seeds, steps), torch.stack([whole[0, 1], whole[1, 3]]))


@pytest.mark.parametrize(("resolution", "factor"), [(16, 64.0), (32, 16.0)])
def test_the_clip_range_scales_with_the_latent(make_training, resolution, factor):
    training = make_training({"resolution": resolution}, policy={"clip_range": 1e-4})
    assert training.policy.latent_size == 16_384 / factor
    assert training.method.clip_range == pytest.approx(1e-4 * factor, rel=1e-12)  # float64


# --- what is trained


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_epoch_trains_the_adapters_and_nothing_else(make_training, precision):
    training = make_training(PRECISIONS[precision], epochs=1, samples_per_epoch=4, samples_per_update=4)
    policy = training.policy
    networks = {"unet": policy.model.network, "vae": policy.model.decode.network, "text": policy.model.encode.network}
    everything = {f"{n}.{k}": p for n, network in networks.items() for k, p in network.named_parameters()}
    before = {name: p.detach().clone() for name, p in everything.items()}
    metrics = list(training.epochs())
    assert len(metrics) == 1 and metrics[0]["policy/ratio_drift"] < GATE
    for name, parameter in everything.items():
        if "lora_" in name:
            assert parameter.dtype == torch.float32 and parameter.requires_grad
            assert not torch.equal(parameter, before[name])
        else:
            assert parameter.dtype == PRECISIONS[precision].get("dtype", torch.float32)
            assert not parameter.requires_grad and parameter.grad is None
            assert torch.equal(parameter, before[name])


def test_a_training_leaves_torchs_global_generator_alone(make_training):
    """Another thread may be using it: ComfyUI seeds it to draw a sampler's noise."""
    training = make_training(epochs=2, samples_per_epoch=4, samples_per_update=4, neurons={"every": 1})
    state = torch.get_rng_state()
    assert len(list(training.epochs())) == 2
    assert torch.equal(torch.get_rng_state(), state)


# --- the frozen reference


@torch.no_grad()
def mean_of_a_step(policy) -> torch.Tensor:
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    embeds = policy.encode_prompts(["a red circle", "two blue squares"])
    return policy.step(latents, torch.tensor([0, 3]), embeds)[0]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_reference_is_the_base_model(make_policy, precision):
    policy, untrained = (make_policy(trained=trained, **PRECISIONS[precision]) for trained in (True, False))
    base = mean_of_a_step(untrained)  # B is zero
    trained = mean_of_a_step(policy)
    with policy.reference():
        reference = mean_of_a_step(policy)
    assert torch.equal(reference, base) and not torch.equal(trained, base)
    assert torch.equal(mean_of_a_step(policy), trained)


def test_the_adapters_are_back_and_trained_however_the_reference_ends(make_policy):
    policy = make_policy(trained=True)
    trained = mean_of_a_step(policy)
    with pytest.raises(KeyboardInterrupt), policy.reference():
        raise KeyboardInterrupt
    assert torch.equal(mean_of_a_step(policy), trained)
    assert policy.parameters and all(parameter.requires_grad for parameter in policy.parameters)


def test_the_penalty_is_the_distance_from_the_base_model(make_policy):
    prompts, seeds = ["a red circle", "two blue squares"], [(1, "noise"), (2, "noise")]
    settings = {"reward": Brightness(), "eval_rewards": {}, "kl": "exact"}
    assert torch.equal(Sampler(Decoder(make_policy(), 4), **settings).sample(prompts, seeds).path.kl, torch.zeros(2, 4))
    policy, base = make_policy(trained=True), make_policy()
    trajectories = Sampler(Decoder(policy, 4), **settings).sample(prompts, seeds).trajectories()
    with torch.no_grad():
        for k, sigma in enumerate(policy.process.sigma):
            embeds, positions = policy.encode_prompts(prompts), torch.full((2,), k)
            distance = (
                policy.step(trajectories.latents[:, k], positions, embeds)[0]
                - base.step(trajectories.latents[:, k], positions, embeds)[0]
            )
            expected = distance.double().square().sum((1, 2, 3)) / (2 * sigma.double() ** 2)
            assert (expected > 0).all()
            # a float32 sum of 256 terms: 256 * 6e-8 at worst
            torch.testing.assert_close(trajectories.kl[:, k].double(), expected, rtol=1.5e-5, atol=0)
