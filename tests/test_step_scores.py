"""A critic that knows how the rewards score unfinished images: what it reads, and its regression for each step."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy import Brightness, Contrast, new_run, toy_config, toy_training

from comfy_tdpo.methods.step_regression import RIDGE, StepRegression
from comfy_tdpo.reading import Reading
from comfy_tdpo.rollout import Decoder, Sampler

PROMPTS, SEEDS = ["a red circle", "a blue star", "a green cross"], [("test", i) for i in range(3)]
READS_SCORES = {
    "reads": "clean",
    "architecture": "standardised",
    "activation": "relu",
    "history": 2,
    "scores": True,
    "gae_lambda": 0.5,
}


class ByPrompt(Brightness):
    """Scores that tell prompts apart: a mix-up of rows would show."""

    def score(self, images, prompts):
        return images.mean(dim=(1, 2, 3)) + torch.tensor([10.0 * len(prompt) for prompt in prompts])


@pytest.mark.parametrize("batch", [2, 64])
def test_the_training_reward_and_the_guards_score_each_predicted_clean_image(make_policy, batch):
    policy, reward, guards = make_policy(steps=3), ByPrompt(), {"contrast": Contrast(), "light": Brightness()}
    reading = Reading(reward.embed, clean=True, rewards=[reward, *guards.values()])
    sampler = Sampler(Decoder(policy, batch), reward, {}, reading)
    with torch.no_grad():
        found = sampler.sample(PROMPTS, SEEDS).trajectories()
        assert found.step_scores.shape == (3, 3, 3) and found.image_embeds.shape == (3, 3, 48)
        for k in range(3):
            step = policy.step(found.latents[:, k], torch.full((3,), k), policy.encode_prompts(PROMPTS))
            images = policy.decode(step.clean)
            expected = [judge.score(images, PROMPTS) for judge in (reward, *guards.values())]
            torch.testing.assert_close(
                found.step_scores[:, k], torch.stack(expected, 1), rtol=1e-5, atol=1e-5
            )  # float32
            torch.testing.assert_close(found.image_embeds[:, k], reward.embed(images), rtol=1e-5, atol=1e-5)  # float32


def test_the_regression_is_ridge_regression_at_each_step(generator):
    scores, returns = torch.randn(20, 4, 2, generator=generator), torch.randn(20, 4, generator=generator)
    found = StepRegression.fit(scores, returns)
    for k in range(4):
        x, y = scores[:, k].double().numpy(), returns[:, k].double().numpy()
        x, centre = x - x.mean(0), x.mean(0)
        # one more row for each coefficient, which asks it to be 0
        rows, values = np.vstack([x, RIDGE**0.5 * np.eye(2)]), np.append(y - y.mean(), [0, 0])
        weights = np.linalg.lstsq(rows, values, rcond=None)[0]
        assert found.weights[k].tolist() == pytest.approx(weights.tolist(), rel=1e-5, abs=1e-6)  # stored in float32
        expected = y.mean() + (scores[:, k].numpy() - centre) @ weights
        assert found(scores)[:, k].tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)


def test_scores_that_never_differ_predict_the_mean(generator):
    returns = torch.randn(10, 3, generator=generator)
    predicted = StepRegression.fit(torch.full((10, 3, 1), 7.0), returns)(torch.full((10, 3, 1), 7.0))
    torch.testing.assert_close(predicted, returns.mean(0).expand(10, 3))


def started(tmp_path, make_policy, **overrides):
    settings = {"critic": READS_SCORES, "guards": ["shapes-alignment"], "guard_penalty": 2.0, "guard_credit": True}
    training = toy_training(new_run(tmp_path / "run", **settings | overrides), make_policy)
    return training, training.epochs()


@pytest.mark.parametrize(
    "normalised", [{}, {"samples_per_prompt": 2, "moments": {"baseline": "group"}}], ids=["history", "group"]
)
def test_a_step_that_scores_like_the_image_is_normalised_like_it(tmp_path, make_policy, normalised):
    """Then reward and penalty make up the return, but for the mean of the penalties, which samples compared share."""
    training, _ = started(tmp_path, make_policy, samples_per_epoch=8, **normalised)
    training._sample()
    batch = training.context.progress.batch()
    final = torch.stack([batch.rewards, *batch.guard_rewards.values()], dim=1)
    batch.step_scores = final[:, None].expand(-1, 3, -1).contiguous()
    with torch.no_grad():
        targets = training.method.targets(batch, training._epoch_prompts(1))
    rewards, lost = targets["scores"].unbind(-1)
    if normalised:
        lost = 2 * (lost.unflatten(0, (4, 2)) - lost.unflatten(0, (4, 2)).mean(1, keepdim=True)).flatten(0, 1)
    else:
        lost = lost - lost.mean(0)
    torch.testing.assert_close(rewards - lost, targets["returns"], rtol=1e-4, atol=1e-4)  # float32


def test_what_an_epoch_scored_predicts_only_later_epochs(tmp_path, make_policy, monkeypatch):
    """Regression and network are fitted on the latest two epochs, after the policy's updates: the network on what the
    regression leaves."""
    training, epochs = started(tmp_path, make_policy, epochs=4)
    critic, seen, aims, mse_loss = training.method.critic, [], [], F.mse_loss
    monkeypatch.setattr(F, "mse_loss", lambda ours, aim: aims.append(aim) or mse_loss(ours, aim))
    targets_of = training.method.targets

    def targets(batch, prompts):
        found = targets_of(batch, prompts)
        network = critic.network(critic.inputs(batch))
        if seen:
            scores, returns = (torch.cat([epoch[name] for epoch in seen[-2:]]) for name in ("scores", "returns"))
            by_scores = StepRegression.fit(scores, returns)(found["scores"])
            torch.testing.assert_close(found["residuals"], network + by_scores)
            assert by_scores.abs().max() > 0.01
        else:
            assert not found["residuals"].any()
        assert critic.gae_lambda == (0.5 if seen else 1.0)
        seen.append(found)
        return found

    training.method.targets = targets
    for _ in range(4):
        next(epochs)
        scores, returns = (torch.cat([epoch[name] for epoch in seen[-2:]]) for name in ("scores", "returns"))
        left = (returns - critic.regression(scores)).flatten()
        torch.testing.assert_close(torch.cat(aims).sort().values, left.repeat(critic.config.passes).sort().values)
        aims.clear()
    assert len(seen) == 4


def test_it_needs_clean_images_and_a_history():
    for change in ({"reads": "noisy"}, {"history": 0}):
        with pytest.raises(ValueError, match=r"critic.scores needs .* critic.reads is .* critic.history is"):
            toy_config(critic=READS_SCORES | change)


def test_it_reads_one_step_more_than_are_trained(tmp_path, make_policy):
    """Later steps are neither decoded nor predicted; there the return stands for a prediction."""
    critic = READS_SCORES | {"gae_lambda": 0.0}
    training, epochs = started(tmp_path, make_policy, steps=6, policy={"train_until": 0.5}, critic=critic, epochs=2)
    next(epochs)
    training._sample()
    batch, targets = training.context.progress.batch(), training.context.progress.targets
    assert training.method.critic.steps == batch.image_embeds.shape[1] == batch.step_scores.shape[1] == 4
    assert torch.equal(targets["residuals"][:, 4:], targets["returns"][:, 4:])
    raw = targets["residuals"][:, 1:4] - targets["residuals"][:, :3]
    expected = (raw - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(targets["temporal_rewards"][:, :3], expected, rtol=1e-4, atol=1e-5)  # float32


def test_guards_that_only_open_a_gate_do_not_score_the_steps(tmp_path, make_policy):
    gate = {"guard_penalty": 0.0, "kl": {"coefficient": 0.1, "gate": True}}
    training, _ = started(tmp_path, make_policy, **gate)
    training._sample()
    assert training.context.progress.batch().step_scores.shape == (8, 3, 1)
    assert training.context.progress.targets["scores"].shape == (8, 3, 1)
