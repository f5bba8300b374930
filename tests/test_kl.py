"""The KL penalty restrains: its gradient against closed forms, and a policy that has drifted comes back."""

import pytest
import torch
from accelerate import Accelerator
from toy import Brightness, new_run

from comfy_tdpo.methods.advantages import returns, returns_with_later_kl
from comfy_tdpo.process.gaussian import gaussian_kl, log_prob
from comfy_tdpo.rollout import denoise, draw_noise
from comfy_tdpo.trainer.training import Training

# --- the gradient, on a chain of two scalar steps
#
# x_0 is given, x_{k+1} ~ N(a x_k + theta, s^2), and the base model's step is N(0, s^2), so that
# KL_k(x_k) = (a x_k + theta)^2 / (2 s^2) depends on the state, and the first step moves the KL of the second.

A, THETA, S, X0, SAMPLES = 0.8, 0.3, 0.5, 1.0, 400_000


def expected_gradient() -> float:
    """d/dtheta of E[KL_0 + KL_1], by hand."""
    first = A * X0 + THETA
    return (first + (A * first + THETA) * (A + 1)) / S**2


def estimated_gradient(in_loss: bool, in_returns: bool) -> float:
    """What the surrogate's gradient at the policy that sampled is, with the KL in either place or both."""
    theta = torch.tensor(THETA, requires_grad=True)
    sigma = torch.full((SAMPLES, 1, 1, 1), S)
    noise = torch.randn(2, SAMPLES, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    states = [torch.full((SAMPLES, 1, 1, 1), X0)]
    for k in range(2):
        states.append((A * states[k] + THETA) + sigma * noise[k])
    means = [A * states[k] + theta for k in range(2)]
    kl = torch.stack([gaussian_kl(mean, torch.zeros_like(mean), sigma) for mean in means], dim=1)
    penalties = kl.detach()
    gains = (returns_with_later_kl if in_loss else returns)(torch.zeros(SAMPLES), penalties)
    log_probs = torch.stack([log_prob(states[k + 1], means[k], sigma) for k in range(2)], dim=1)
    loss = torch.zeros(())
    if in_returns:
        loss = loss - (gains * log_probs).sum(1).mean()
    if in_loss:
        loss = loss + kl.sum(1).mean()
    (gradient,) = torch.autograd.grad(loss, theta)
    return gradient.item()


def test_loss_and_later_steps_returns_give_the_gradient_of_the_whole_kl():
    # a sample's score-function term has a standard deviation of about 30 here; five standard errors of 400,000
    assert estimated_gradient(in_loss=True, in_returns=True) == pytest.approx(expected_gradient(), abs=0.25)


def test_returns_alone_lack_each_steps_own_term():
    """The exact KL as a step's reward: its own term, (a x_k + theta) / s^2 in the mean, has no gradient there."""
    first = A * X0 + THETA
    own = (first + (A * first + THETA)) / S**2
    assert estimated_gradient(in_loss=False, in_returns=True) == pytest.approx(expected_gradient() - own, abs=0.25)
    assert own > 9


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


@pytest.mark.parametrize("algorithm", ["tdpo", "ddpo-100", "ddpo-2"])
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
