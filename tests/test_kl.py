"""The KL penalty restrains: its gradient against closed forms, and a policy that has drifted comes back."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from toy import Brightness, fast_training, new_run, toy_config

from comfy_tdpo.methods.advantages import returns_with_later_kl
from comfy_tdpo.methods.kl_control import ProportionalIntegral
from comfy_tdpo.methods.kl_penalty import KLPenalty
from comfy_tdpo.methods.objectives import policy_loss, step_normalised_log_ratio
from comfy_tdpo.process.gaussian import gaussian_kl, log_prob
from comfy_tdpo.rollout import denoise, draw_noise
from comfy_tdpo.trainer.training import Training

# --- the gradient, on a chain of two steps, equal in each of N elements
#
# x_0 is given, x_{k+1} ~ N(a x_k + theta, s_k^2), and the base model's step is N(0, s_k^2), so that in each element
# KL_k(x_k) = (a x_k + theta)^2 / (2 s_k^2) depends on the state, and the first step moves the KL of the second.

A, THETA, SIGMAS, X0, ELEMENTS, SAMPLES = 0.8, 0.3, (0.5, 0.8), 1.0, 4, 400_000
COEFFICIENT, SCALE = 0.6, 1.7


def parts_of_the_gradient() -> tuple[float, float, float]:
    """Those of d/dtheta of E[KL_0 + KL_1], by hand: of each step's own KL, and of KL_1 by way of step 0."""
    first = A * X0 + THETA
    second = A * first + THETA
    return tuple(
        ELEMENTS * part for part in (first / SIGMAS[0] ** 2, second / SIGMAS[1] ** 2, A * second / SIGMAS[1] ** 2)
    )


def penalised_gradient(objective: str, form: str = "exact", **kl: str) -> float:
    """The gradient of the policy's loss without a reward, at the policy that sampled, with temporal rewards divided by
    SCALE: times SCALE * N / COEFFICIENT, so that it does not depend on these."""
    config = toy_config(kl={"coefficient": COEFFICIENT, "form": form, **kl}, policy={"objective": objective})
    process = SimpleNamespace(sigma=torch.tensor(SIGMAS))
    penalty = KLPenalty(SimpleNamespace(config=config, policy=SimpleNamespace(process=process, latent_size=ELEMENTS)))
    theta = torch.tensor(THETA, requires_grad=True)
    shape = (SAMPLES, 1, 2, 2)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    states = [torch.full(shape, X0)]
    for k in range(2):
        states.append((A * states[k] + THETA) + SIGMAS[k] * noise[k])
    means, stds = [A * states[k] + theta for k in range(2)], [torch.full((SAMPLES, 1, 1, 1), s) for s in SIGMAS]
    kl_now = torch.stack([gaussian_kl(means[k], torch.zeros(shape), stds[k]) for k in range(2)], dim=1)
    penalty.begin(kl_now.detach(), torch.zeros(SAMPLES), {})
    temporal = penalty.returns(torch.zeros(SAMPLES), kl_now.detach(), gamma=1.0) / SCALE
    loss = torch.zeros(())
    for k in range(2):
        if objective == "clip":
            log_ratio = log_prob(states[k + 1], means[k], stds[k])
            log_ratio = log_ratio - log_ratio.detach()
        else:
            log_ratio = step_normalised_log_ratio(means[k], means[k].detach(), noise[k])
        loss = loss + policy_loss(log_ratio.exp(), temporal[:, k], 1.0).mean()
    if penalty.in_loss:
        loss = loss + (penalty.loss_weights(torch.tensor(SCALE)) * kl_now).sum(1).mean()
    (gradient,) = torch.autograd.grad(loss, theta)
    return gradient.item() * SCALE * ELEMENTS / COEFFICIENT


# a sample's score-function term has a standard deviation below 100 here; five standard errors of 400,000
NEAR = 0.8


def test_loss_and_later_steps_returns_give_the_gradient_of_the_whole_kl():
    assert penalised_gradient("clip") == pytest.approx(sum(parts_of_the_gradient()), abs=NEAR)


def test_with_the_step_normalised_ratio_each_step_has_sigma_times_its_part():
    first, second, later = parts_of_the_gradient()
    expected = SIGMAS[0] * (first + later) + SIGMAS[1] * second
    assert penalised_gradient("step-normalised") == pytest.approx(expected, abs=NEAR)
    assert penalised_gradient("step-normalised", weighting="sigma") == pytest.approx(expected, abs=NEAR)
    uniform = SIGMAS[0] * later + first + second
    assert penalised_gradient("step-normalised", weighting="uniform") == pytest.approx(uniform, abs=NEAR)
    assert abs(uniform - expected) > 5 * NEAR


def test_returns_alone_lack_each_steps_own_term():
    """The exact KL as a step's reward has no gradient at its own step, which is why it is a term of the loss."""
    kl = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    assert returns_with_later_kl(torch.zeros(2), kl)[:, 1].tolist() == [0.0, 0.0]
    assert penalised_gradient("clip", form="sampled") == pytest.approx(parts_of_the_gradient()[2], abs=NEAR)


# --- a training


class Indifferent(Brightness):
    """The same score for every image."""

    def score(self, images, prompts):
        return images.new_zeros(len(images))


def kl_by_epoch(tmp_path, make_policy, algorithm: str, form: str) -> list[float]:
    """Of a policy that has drifted, trained on a reward that wants nothing."""
    settings = {
        "algorithm": algorithm,
        "epochs": 8,
        "samples_per_epoch": 8,
        "samples_per_update": 4,
        "micro_batch": 4,
        "policy": {"lr": 3e-3, "max_grad_norm": 1.0},
        "kl": {"coefficient": 1.0, "form": form},
    }
    run = new_run(tmp_path / "run", **settings)
    policy = make_policy(steps=run.config.steps, trained=True)
    training = Training(run.config, policy, Indifferent(), {}, run, Accelerator(cpu=True))
    return [metrics["kl/nats"] for metrics in training.epochs()]


@pytest.mark.parametrize("algorithm", ["tdpo", "ddpo-2"])
def test_a_policy_that_drifted_comes_back(tmp_path, make_policy, algorithm):
    """With the KL as a reward alone, exact or sampled, it grew to 1.4 to 4 times its first value in these epochs."""
    kl = kl_by_epoch(tmp_path, make_policy, algorithm, "exact")
    assert kl[0] > 50 and kl[-1] < 0.6 * kl[0]


def test_the_sampled_log_ratio_has_the_exact_kl_as_its_mean(make_policy):
    policy = make_policy(trained=True)
    prompts, seeds = ["a red circle"] * 64, [("noise", i) for i in range(64)]
    with torch.no_grad():
        noise = draw_noise(policy, seeds)
        exact, sampled = (denoise(policy, prompts, noise, form).kl for form in ("exact", "sampled"))
    # a step's log-ratio is Normal(D, 2 D): the mean difference of 64 samples within five standard errors
    error = (2 * exact.mean(0) / 64) ** 0.5
    assert ((sampled - exact).mean(0).abs() < 5 * error).all()
    assert (exact.mean(0) > 1).any()


# --- the reference


def kl_of(policy, form: str = "exact") -> torch.Tensor:
    """(B, T) of three trajectories."""
    with torch.no_grad():
        seeds = [("noise", i) for i in range(3)]
        return denoise(policy, ["a red circle"] * 3, draw_noise(policy, seeds), form).kl


def drift(policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters:
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("form", ["exact", "sampled"])
def test_the_kl_is_zero_right_after_a_reset_and_then_measured_from_there(make_policy, form):
    policy = make_policy(trained=True)
    assert (kl_of(policy, form).abs() > 0).all()
    policy.kl_reference.reset()
    assert torch.equal(kl_of(policy, form), torch.zeros(3, 4))
    anchor, before = make_policy(trained=True), [p.detach().clone() for p in policy.parameters]
    drift(policy, 1)
    moved = kl_of(policy)
    assert (moved > 0).all()
    # the same from two policies, one of which is where the other was reset
    with torch.no_grad():
        seeds = [("noise", i) for i in range(3)]
        path = denoise(policy, ["a red circle"] * 3, draw_noise(policy, seeds))
        conditioning = policy.encode_prompts(["a red circle"] * 3)
        for k, sigma in enumerate(policy.process.sigma):
            steps = torch.full((3,), k)
            ours, theirs = (p.step(path.latents[:, k], steps, conditioning).mean for p in (policy, anchor))
            torch.testing.assert_close(moved[:, k], gaussian_kl(ours, theirs, sigma), rtol=1e-5, atol=0)
    with policy.reference():
        assert all(torch.equal(a, b) for a, b in zip(policy.parameters, before, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(policy.parameters, before, strict=True))


def test_the_kl_in_the_loss_has_no_gradient_through_the_reference(tmp_path):
    """Its gradient is that of a policy whose reference is another policy, computed apart and held constant."""
    run = new_run(tmp_path / "run", algorithm="ddpo-100", kl={"coefficient": 0.1})
    training, anchor = (fast_training(run, trained=True) for _ in range(2))
    policy = training.policy
    policy.kl_reference.reset()
    drift(policy, 1)
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    inputs = latents, torch.tensor([0, 2]), policy.encode_prompts(["a red circle", "a star"])
    gradients = []
    for apart in (False, True):
        step = policy.step(*inputs)
        if apart:
            kl = gaussian_kl(step.mean, anchor.policy.step(*inputs).mean.detach(), step.std)
        else:
            kl = training.method.kl.now(step, inputs)
        gradients.append(torch.autograd.grad(kl.sum(), policy.parameters))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(gradient.any() for gradient in gradients[0])


def test_the_trained_weights_are_back_however_the_reference_ends(make_policy):
    policy = make_policy(trained=True)
    policy.kl_reference.reset()
    drift(policy, 1)
    before = [parameter.detach().clone() for parameter in policy.parameters]
    with pytest.raises(KeyboardInterrupt), policy.reference():
        raise KeyboardInterrupt
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters, before, strict=True))
    assert all(parameter.requires_grad for parameter in policy.parameters)


@pytest.mark.parametrize(
    ("when", "at_zero"),
    [
        ({"reset_every": 2}, [False, True, False, True]),  # in epochs 2 to 5
        ({"reset_above": 1e-9}, [True, False, True, False]),  # after epochs 1, 3 and 5, whose samples have a KL
        ({"reset_above": 1e5}, [False] * 4),
        ({}, [False] * 4),
    ],
)
def test_a_training_resets_the_reference(tmp_path, when, at_zero):
    settings = {"algorithm": "ddpo-100", "epochs": 5, "kl": {"coefficient": 0.1, **when}, "policy": {"lr": 1e-3}}
    run = new_run(tmp_path / "run", **settings)
    metrics = list(fast_training(run, trained=True).epochs())  # away from the base model in the first epoch too
    assert [epoch["kl/nats"] == 0 for epoch in metrics] == [False, *at_zero]
    if when:
        counts = [sum(at_zero[:epoch]) for epoch in range(5)]  # as of each epoch's sampling
        assert [epoch["kl/reference_resets"] for epoch in metrics] == counts
    else:
        assert "kl/reference_resets" not in metrics[0]


# --- the coefficient


class Plant:
    """How a policy's distance d from its reference answers to a coefficient: the reward pulls with 1, and the penalty,
    KL = d^2 / 2, with coefficient * d, in twenty updates per epoch. With gradients of a limited size, the speed is
    limited too."""

    def __init__(self, speed: float, limited: bool):
        self.distance, self.speed, self.limited = 0.0, speed, limited

    def epoch(self, coefficient: float) -> None:
        for _ in range(20):
            pull = 1 - coefficient * self.distance
            if self.limited:
                pull = min(max(pull / 0.3, -1), 1)
            self.distance = max(self.distance + self.speed / 20 * pull, 0)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("speed", [1.5, 2.5, 4.0])
@pytest.mark.parametrize("start", [0.06, 0.25, 1.0])
def test_a_target_is_held_from_the_eleventh_epoch_on(limited, speed, start):
    """A KL of 8 nats, which the coefficient 0.25 holds; the start may be wrong by a factor of 4 either way."""
    plant, controller, kl = Plant(speed, limited), ProportionalIntegral(start, target=8.0), []
    for _ in range(25):
        kl.append(plant.distance**2 / 2)
        controller.update(kl[-1], 96)
        plant.epoch(controller.value)
    if start <= 0.25 or speed > 1.5 or limited:
        assert sum(kl[10:15]) / 5 == pytest.approx(8, rel=0.2)
    assert kl[15:] == pytest.approx([8] * 10, rel=0.2)


def test_a_slow_policy_arrives_too():
    plant, controller, kl = Plant(0.7, True), ProportionalIntegral(0.125, target=8.0), []
    for _ in range(25):
        kl.append(plant.distance**2 / 2)
        controller.update(kl[-1], 96)
        plant.epoch(controller.value)
    assert max(kl) < 2 * 8
    assert kl[15:] == pytest.approx([8] * 10, rel=0.2)


def test_a_kl_that_still_rises_does_not_lower_the_coefficient():
    controller = ProportionalIntegral(0.3, target=8.0)
    for kl in (0.0, 0.1, 0.3, 0.8, 1.5):
        controller.update(kl, 96)
        assert controller.value >= 0.3
    stuck = controller.value
    controller.update(1.5, 96)
    assert controller.value < stuck
    for kl in (2.0, 1.5, 1.9):  # noise, not the way up
        before = controller.value
        controller.update(kl, 96)
        assert controller.value < before
    controller.restart()
    before = controller.value
    controller.update(0.0, 96)
    assert controller.value == before


@pytest.mark.parametrize(("kl", "before", "change"), [(8.0, 8.0, 0), (16.0, 8.0, 0.6), (4.0, 8.0, -0.6)])
def test_the_coefficient_moves_by_the_logarithm_of_the_ratio(kl, before, change):
    controller = ProportionalIntegral(0.3, target=8.0)
    controller.before, controller.rising = before, False
    controller.update(kl, 96)
    assert controller.value == pytest.approx(0.3 * 2**change, rel=1e-12)  # float64


@pytest.mark.parametrize("controller", ["ziegler", "proportional-integral"])
def test_the_metric_is_the_coefficient_that_the_epoch_used(tmp_path, controller):
    kl = {"coefficient": 0.1, "target": 1e-3, "horizon": 8, "controller": controller}
    run = new_run(tmp_path / "run", algorithm="ddpo-100", epochs=2, kl=kl)
    first, second = fast_training(run, trained=True).epochs()
    assert first["kl/coefficient"] == 0.1 < second["kl/coefficient"]
    assert first["kl/coefficient_per_element"] == pytest.approx(0.1 * 3 * 8 * 8)


@pytest.mark.parametrize(
    ("kl", "message"),
    [
        ({"reset_every": 2}, "kl.reset_every needs a KL penalty, but kl.coefficient is 0; set kl.coefficient above 0"),
        ({"reset_above": 2.0}, "kl.reset_above needs a KL penalty, but kl.coefficient is 0"),
        ({"coefficient": 0.1, "target": 5.0, "reset_above": 5.0}, "kl.reset_above 5 is not above kl.target 5, so the"),
    ],
)
def test_contradictions_are_one_sentence(kl, message):
    with pytest.raises(ValueError, match=message) as error:
        toy_config(kl=kl)
    assert "\n" not in str(error.value)
