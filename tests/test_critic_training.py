"""The critic that sees: what it reads, how it learns from earlier epochs, and that it stays a fair baseline."""

import pytest
import torch
import torch.nn.functional as F
from toy import Brightness, new_run, toy_training

from comfy_tdpo.methods.critic import TemporalCritic
from comfy_tdpo.methods.neurons import critic_layers
from comfy_tdpo.models.conditioning import TensorConditioning
from comfy_tdpo.randomness import generator_at
from comfy_tdpo.reading import Reading
from comfy_tdpo.rollout import Decoder, Sampler, denoise, draw_noise

SEEING = {
    "reads": "clean",
    "prompt": True,
    "step": True,
    "architecture": "standardised",
    "activation": "relu",
    "history": 2,
}
PROMPTS, SEEDS = ["a red circle", "a blue star"], [("test", 0), ("test", 1)]


def test_it_reads_the_image_of_the_predicted_clean_latent(make_policy):
    policy, reward = make_policy(steps=3), Brightness()
    with torch.no_grad():
        sampler = Sampler(Decoder(policy, 4), reward, {}, Reading(reward.embed, clean=True))
        batch = sampler.sample(PROMPTS, SEEDS).trajectories()
        for k in range(3):
            latents, position = batch.latents[:, k], torch.full((2,), k)
            clean = policy.step(latents, position, policy.encode_prompts(PROMPTS)).clean
            expected = reward.embed(policy.decode(clean))
            torch.testing.assert_close(batch.image_embeds[:, k], expected, rtol=1e-5, atol=1e-5)  # float32
        last = denoise(policy, PROMPTS, draw_noise(policy, SEEDS)).clean[:, -1]
    assert not torch.allclose(batch.image_embeds[:, 0], batch.image_embeds[:, -1])
    torch.testing.assert_close(reward.embed(policy.decode(last)), batch.image_embeds[:, -1])


def test_the_final_images_are_embedded_by_the_reward(make_policy):
    policy, reward = make_policy(steps=3), Brightness()
    with torch.no_grad():
        batch = Sampler(Decoder(policy, 4), reward, {}).sample(PROMPTS, SEEDS).trajectories()
        expected = reward.embed(policy.decode(batch.latents[:, -1]))
    torch.testing.assert_close(batch.final_embeds, expected)


def test_it_may_know_the_prompt_and_the_step(make_policy, tmp_path):
    training = toy_training(new_run(tmp_path / "run", critic=SEEING), make_policy)
    training._sample()
    batch, critic = training.context.progress.batch(), training.method.critic
    summary = training.policy.encode_prompts(batch.prompts).summary()
    inputs = critic.inputs(batch)
    assert inputs.shape == (8, 3, 48 + summary.shape[1] + 3)
    for k in range(3):
        assert torch.equal(inputs[:, k, :48], batch.image_embeds[:, k])
        assert torch.equal(inputs[:, k, 48:-3], summary)
        assert torch.equal(inputs[:, k, -3:], F.one_hot(torch.full((8,), k), 3).float())


def test_a_summary_is_the_mean_over_tokens():
    states, pooled = torch.arange(12.0).view(2, 3, 2), torch.tensor([[7.0], [9.0]])
    got = TensorConditioning(states=states, pooled=pooled).summary()
    assert got.tolist() == [[2.0, 3.0, 7.0], [8.0, 9.0, 9.0]]


def test_the_standardised_architecture(generator):
    critic = TemporalCritic(6, "relu", torch.Generator().manual_seed(0), "standardised")
    inputs = 5 + 0.01 * torch.randn(2000, 6, generator=generator)
    critic.see(inputs)
    critic.see(inputs + 100)  # what was seen first counts
    torch.testing.assert_close(critic.mean, inputs.mean(0))
    torch.testing.assert_close(critic.std, inputs.std(0, correction=0))
    assert not critic(inputs).any(), "it starts at 0"
    assert [tuple(layer.weight.shape) for layer in critic.layers] == [(256, 6), (256, 256), (1, 256)]
    hidden = F.relu(critic.layers[1](F.relu(critic.layers[0]((inputs - critic.mean) / critic.std))))
    # He's rule keeps the mean square of what enters a layer: 1 here
    assert hidden.square().mean().item() == pytest.approx(1, rel=0.25)  # 1536 and 65 thousand draws, 2,000 inputs
    stds = [(layer.incoming_std, layer.outgoing_std) for layer in critic_layers(critic).values()]
    assert stds == [pytest.approx((3**-0.5, 128**-0.5)), pytest.approx((128**-0.5, 0))]


def trained(tmp_path, make_policy, **critic):
    training = toy_training(new_run(tmp_path / "run", critic=SEEING | critic), make_policy)
    return training, training.epochs()


def test_it_learns_from_the_latest_epochs_and_only_after_the_policy(tmp_path, make_policy):
    training, epochs = trained(tmp_path, make_policy)
    critic, seen = training.method.critic, []
    targets_of = training.method.targets

    def targets(batch, prompts):
        targets = targets_of(batch, prompts)
        assert torch.equal(targets["residuals"], critic.network(critic.inputs(batch)))
        seen.append((batch.image_embeds, targets["returns"]))
        return targets

    training.method.targets = targets
    assert not critic.history
    for count in (1, 2, 2):
        next(epochs)
        assert len(critic.history) == count
    for kept, (embeds, returns) in zip(critic.history, seen[-2:], strict=True):
        assert torch.equal(kept["image_embeds"], embeds) and torch.equal(kept["returns"], returns)


def test_its_regression_is_that_of_plain_adamw(tmp_path, make_policy):
    training, epochs = trained(tmp_path, make_policy, history=1, passes=3, batch=5)
    critic, config = training.method.critic, training.config
    draw = generator_at(config.seed, "critic")
    copy = TemporalCritic(critic.network.layers[0].in_features, "relu", draw, "standardised")
    next(epochs)
    (kept,) = critic.history
    steps = torch.eye(3).expand(8, -1, -1)
    inputs = torch.cat([kept["image_embeds"], kept["summaries"][:, None].expand(-1, 3, -1), steps], -1).flatten(0, 1)
    returns = kept["returns"].flatten()
    copy.see(inputs)
    settings = {"lr": config.critic.lr, "weight_decay": config.critic.weight_decay, "eps": config.critic.eps}
    optimizer = torch.optim.AdamW(copy.parameters(), **settings)
    draw = generator_at(config.seed, "regression", 1)
    for _ in range(3):
        for rows in torch.randperm(24, generator=draw).split(5):
            optimizer.zero_grad()
            ((copy(inputs[rows], dropout=draw) - returns[rows]) ** 2).mean().backward()
            torch.nn.utils.clip_grad_norm_(copy.parameters(), config.critic.max_grad_norm)
            optimizer.step()
    for ours, theirs in zip(critic.network.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)  # float32, 15 steps


def test_the_explained_variance_by_thirds(tmp_path, make_policy, generator):
    training = toy_training(new_run(tmp_path / "run", steps=7), make_policy)
    returns, residuals = torch.randn(2, 8, 7, generator=generator)
    residuals[:, 5:] = returns[:, 5:]  # the last third of seven steps: two of them
    residuals[:, 3:5] = 0.3
    metrics = training.method.critic.metrics(
        {"returns": returns, "residuals": residuals}, torch.ones(7, dtype=torch.bool)
    )
    assert metrics["critic/explained_variance_last"] == pytest.approx(1)
    assert metrics["critic/explained_variance_middle"] == pytest.approx(0, abs=1e-6)
    first = 1 - (returns - residuals)[:, :3].var(correction=0) / returns[:, :3].var(correction=0)
    assert metrics["critic/explained_variance_first"] == pytest.approx(first.item(), rel=1e-5)
