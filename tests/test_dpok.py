"""DPOK: its value function, and a KL penalty whose gradient is that of the KL at the sampled states alone."""

import pytest
import torch
from toy import fast_training, new_run, toy_config

from comfy_tdpo.methods.critic import TemporalCritic
from comfy_tdpo.methods.neurons import critic_layers
from comfy_tdpo.process.gaussian import gaussian_kl

SETTINGS = {"algorithm": "dpok", "micro_batch": 4, "samples_per_update": 8}


def sampled(tmp_path, **settings):
    """A training with a policy away from the base model, its samples and their targets."""
    training = fast_training(new_run(tmp_path / "run", **SETTINGS | settings), trained=True)
    training._sample()
    return training, training.context.progress.batch(), training.context.progress.targets


def gradient_of_update(training, batch, targets, rows, steps) -> list[torch.Tensor]:
    """As the optimizer gets it."""
    found = []
    training.context.optimizer.register_step_pre_hook(
        lambda *_: found.extend(parameter.grad.clone() for parameter in training.policy.parameters)
    )
    training.method.update_policy(batch, targets, rows, steps)
    return found


# --- the KL


def test_the_gradient_of_a_steps_kl_in_closed_form(generator):
    """Of mean W x, sigma 0.7: the sum over samples of delta x^T / sigma^2, where delta is the mean's distance."""
    x, y = (torch.randn(6, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(8, 8, generator=generator, dtype=torch.float64).requires_grad_()
    mean = x @ weight.T
    gaussian_kl(mean.view(6, 2, 2, 2), y.view(6, 2, 2, 2), torch.full((1, 1, 1, 1), 0.7).double()).sum().backward()
    expected = (mean.detach() - y).T @ x / 0.7**2
    torch.testing.assert_close(weight.grad, expected, rtol=1e-6, atol=1e-6)  # 0.7 is a float32


def test_the_penalty_is_the_error_of_the_predicted_noise(tmp_path):
    """Without rewards, an update's gradient is that of kappa mean((eps - eps_ref)^2), of the U-Net's own outputs, and
    beside it the rewards are as they are: kappa is divided by the deviation by which temporal rewards are."""
    training, batch, targets = sampled(tmp_path, policy={"max_grad_norm": 1e5}, kl={"coefficient": 0.5})
    policy, (rows, steps) = training.policy, training.method.groups(1)[0]
    scale = (targets["returns"] - targets["residuals"]).std(correction=0)
    conditioning = policy.encode_prompts([batch.prompts[row] for row in rows.tolist()])
    inputs = batch.latents[rows, steps], policy.process.times[steps], conditioning
    with torch.no_grad(), policy.reference():
        reference = policy._guided_output(*inputs)
    loss = 0.5 / scale * (policy._guided_output(*inputs) - reference).square().mean()
    expected = torch.autograd.grad(loss, policy.parameters)
    targets["temporal_rewards"] = torch.zeros_like(targets["temporal_rewards"])
    found = gradient_of_update(training, batch, targets, rows, steps)
    torch.testing.assert_close(found, list(expected), rtol=1e-3, atol=1e-6)  # the mean in float32, where c_k is small
    assert max(gradient.abs().max() for gradient in found) > 1e-3


def test_the_returns_are_the_rewards_alone(tmp_path):
    training, batch, targets = sampled(tmp_path, kl={"coefficient": 10.0})
    rewards = batch.rewards.double()
    expected = ((rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)).float()
    assert (batch.kl > 0).all()
    torch.testing.assert_close(targets["returns"], expected[:, None].expand(-1, 3), rtol=1e-4, atol=1e-5)  # float32


def test_the_kl_is_measured_in_nats(tmp_path):
    training, batch, _ = sampled(tmp_path)
    metrics = training.method.kl.metrics(batch)
    assert metrics["kl/nats"] == pytest.approx(batch.kl.sum(1).mean().item())
    exact, _, _ = sampled(tmp_path / "exact", kl={"form": "exact"})
    torch.testing.assert_close(exact.context.progress.batch().kl, batch.kl)


# --- the value function


def test_the_value_function_by_hand(generator):
    critic = TemporalCritic(7 + 3, "relu", generator, "dpok", steps=3)
    for parameter in critic.parameters():
        parameter.data.normal_(generator=generator)
    x, step = torch.randn(5, 7, generator=generator), torch.tensor([0, 2, 1, 1, 0])
    h = x
    for layer in critic.layers[:-1]:
        h = (h @ layer.weight.T + layer.bias).clamp(min=0)
    expected = (h * critic.gate[step]) @ critic.layers[-1].weight[0] + critic.layers[-1].bias
    found = critic(torch.cat([x, torch.eye(3)[step]], 1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)  # float32, values of 1e4
    assert [layer.incoming.out_features for layer in critic_layers(critic).values()] == [256] * 3
    assert critic.gate.shape == (3, 256)


def test_it_reads_latent_prompt_and_step(tmp_path):
    training, batch, targets = sampled(tmp_path)
    critic, policy = training.method.critic, training.policy
    inputs, size = critic.inputs(batch), policy.latent_size
    assert critic.encoder is None and batch.image_embeds is None
    summary = policy.encode_prompts(batch.prompts).summary()
    for k in range(3):
        assert torch.equal(inputs[:, k, :size], batch.latents[:, k].flatten(1))
        assert torch.equal(inputs[:, k, size:-3], summary)
        assert torch.equal(inputs[:, k, -3:], torch.eye(3)[k].expand(8, -1))
    rows, steps = torch.tensor([3, 0, 3]), torch.tensor([2, 1, 0])
    assert torch.equal(critic._inputs_at(batch, rows, steps), inputs[rows, steps])
    assert torch.equal(targets["residuals"], torch.zeros(8, 3)), "its last layer starts at zero"


def test_its_loss_is_the_squared_error_however_far_it_has_moved(tmp_path):
    training, batch, targets = sampled(tmp_path)
    targets["residuals"] = targets["residuals"] + 100
    rows, steps = training.method.groups(1)[0]
    training.method.critic.update(batch, targets, rows, steps)
    expected = 0.5 * targets["returns"][rows, steps].square().mean()  # it predicts 0
    assert training.context.progress.sums["critic/loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_no_encoder_is_loaded(tmp_path):
    config = toy_config(algorithm="dpok", rewards={"shapes-gold": 1.0})
    assert config.further_rewards == [] and toy_config(rewards={"shapes-gold": 1.0}).further_rewards


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"critic": {"encoder": "shapes-aesthetic"}}, "but critic.reads is latent, and such a critic sees no images"),
        ({"critic": {"step": False}}, "critic.architecture dpok has weights for each step, but critic.step is false"),
    ],
)
def test_what_does_not_count_is_refused(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        toy_config(algorithm="dpok", **settings)
    assert "\n" not in str(error.value)
