"""SDPO: the rewards of steps from three queries, pairs from one noise, and the gradient of their difference."""

import pytest
import torch
from toy import drifts, fast_training, new_run, toy_config

from comfy_tdpo.methods.sdpo import anchors, dense_rewards, pair_loss

SETTINGS = {"algorithm": "sdpo", "samples_per_update": 8, "steps": 4}


def sampled(path, **settings):
    """A training with a policy away from the base model, its samples and their targets."""
    training = fast_training(new_run(path, **SETTINGS | settings), trained=True)
    training._sample()
    return training, training.context.progress.batch(), training.context.progress.targets


def latents(*vectors) -> torch.Tensor:
    """One trajectory's clean latents, (1, T, 2, 1, 1)."""
    return torch.tensor(vectors, dtype=torch.float32).view(1, len(vectors), 2, 1, 1)


# --- the rewards of steps


def test_equal_queries_give_that_reward_at_each_step(generator):
    clean = torch.randn(3, 6, 4, 2, 2, generator=generator)
    queried = torch.tensor([[0, 2, 5], [0, 1, 5], [0, 4, 5]])
    rewards = torch.tensor([[2.0] * 3, [-1.5] * 3, [7.0] * 3])
    torch.testing.assert_close(dense_rewards(clean, queried, rewards), rewards[:, :1].expand(-1, 6))


def test_a_step_between_has_the_mean_weighted_by_similarity():
    """At 0, 60 and 90 degrees; the step at 30 is similar to them by cos 30, cos 30 and cos 60."""
    clean = latents((1, 0), (3**0.5 / 2, 0.5), (1, 3**0.5), (0, 5))
    found = dense_rewards(clean, torch.tensor([[0, 2, 3]]), torch.tensor([[1.0, 2.0, 4.0]]))
    near, far = 3**0.5 / 2, 0.5
    between = (near * 1 + near * 2 + far * 4) / (2 * near + far)
    assert found.tolist()[0] == pytest.approx([1, between, 2, 4], rel=1e-5)


def test_the_anchor_is_least_like_both_ends():
    turned = latents((1, 0), (1, 0.2), (-1, 0.1), (0.5, 1), (1, 0.1))
    assert anchors(turned).item() == 2
    opposite_ends = latents((1, 0), (0, 1), (-1, 0))
    assert anchors(opposite_ends).item() == 1
    alike_inside = latents((0, 1), (1, 1), (1, 1), (1, 0))  # the ends are the least similar, but queried anyway
    assert anchors(alike_inside).item() in (1, 2)


def test_predictions_unlike_every_query_have_the_mean():
    """Their similarities sum to 0, or to less."""
    clean = latents((1, 0), (-1, 0), (0, -1), (0, 1), (1, 0))
    found = dense_rewards(clean, torch.tensor([[0, 3, 4]]), torch.tensor([[1.0, 2.0, 6.0]]))
    assert found[0, 1].item() == pytest.approx(3)  # against cosines of -1, 0 and -1
    assert found[0, 2].item() == pytest.approx(3)  # of 0, -1 and 0


# --- the loss

CLIP = 0.1
PAIRS = {  # (log-ratios, advantages, weight, loss)
    "unmoved": ((0.0, 0.0), (1.0, 0.5), 1.0, 0.5**2),
    "on its way": ((0.05, -0.05), (1.0, 0.5), 1.0, 0.4**2),
    "too far: the clipped one is larger": ((0.5, -0.05), (1.0, 0.5), 1.0, (0.15 - 0.5) ** 2),
    "the wrong way": ((-0.5, 0.05), (1.0, 0.5), 1.0, (0.55 + 0.5) ** 2),
    "a later step": ((0.05, -0.05), (1.0, 0.5), 0.9, (0.09 - 0.5) ** 2),
}


@pytest.mark.parametrize("case", PAIRS)
def test_the_loss_of_a_pair(case):
    ratios, advantages, weight, expected = PAIRS[case]
    found = pair_loss(torch.tensor([ratios]), torch.tensor([advantages]), torch.tensor([weight]), CLIP)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def gradient(training, batch, advantages, rows, steps) -> list[torch.Tensor]:
    training.context.optimizer.zero_grad()
    training.method._accumulate(batch, advantages, rows, steps, len(rows))
    return [parameter.grad.clone() for parameter in training.policy.parameters]


ROWS, STEPS = torch.arange(8), torch.tensor([0, 0, 3, 3, 1, 1, 2, 2])


def test_the_gradient_in_pairwise_form(tmp_path):
    """-2 w dA (s_i - s_j) for the policy that sampled, s being the gradient of the mean log-probability."""
    training, batch, targets = sampled(tmp_path / "run")
    found = gradient(training, batch, targets["advantages"], ROWS, STEPS)
    method, parameters = training.method, training.policy.parameters
    expected = [torch.zeros_like(parameter) for parameter in parameters]
    for i in range(0, 8, 2):
        step = STEPS[i].item()
        scores = [
            torch.autograd.grad(method._log_ratio(batch, ROWS[j : j + 1], STEPS[j : j + 1]).sum(), parameters)
            for j in (i, i + 1)
        ]
        difference = (targets["advantages"][i, step] - targets["advantages"][i + 1, step]).item()
        for total, ours, theirs in zip(expected, *scores, strict=True):
            total -= 2 * 0.99**step * difference * (ours - theirs) / 4
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)  # float32; ratios of 1 are so to 1e-7
    assert max(g.abs().max() for g in found) > 1e-4


def test_identical_partners_have_no_gradient(tmp_path):
    training, batch, targets = sampled(tmp_path / "run")
    batch.latents[1::2], batch.log_probs[1::2] = batch.latents[::2], batch.log_probs[::2]
    found = gradient(training, batch, targets["advantages"], ROWS, STEPS)
    others = gradient(training, batch, targets["advantages"], ROWS.roll(-1), STEPS.roll(-1))
    assert max(g.abs().max() for g in found) < 1e-6 < 1e-4 < max(g.abs().max() for g in others)


def test_the_update_does_not_know_the_micro_batch(tmp_path):
    """Partners are never parted, not even where one sample is asked for, or three."""
    _, batch, targets = sampled(tmp_path / "sampled", samples_per_epoch=12, samples_per_update=12)
    seen = []
    for size, used in ((1, 2), (3, 2), (4, 4), (12, 12)):
        run = new_run(
            tmp_path / str(size), **SETTINGS | {"samples_per_epoch": 12, "samples_per_update": 12, "micro_batch": size}
        )
        training, found = fast_training(run, trained=True), []
        assert training.context.micro_batch == used
        training.context.progress.parts, training.context.progress.targets = [batch], targets
        training.context.optimizer.register_step_pre_hook(
            lambda *_, training=training, found=found: found.extend(p.grad.clone() for p in training.policy.parameters)
        )
        training.method.update(training.method.groups(1)[0])
        seen.append((found, training.context.progress.sums["policy/loss"]))
    for found, loss in seen[:-1]:
        torch.testing.assert_close(found, seen[-1][0], rtol=1e-4, atol=1e-7)  # float32, another order of sums
        torch.testing.assert_close(loss, seen[-1][1])


def test_a_run_that_was_saved_with_an_odd_micro_batch_goes_on_with_an_even_one(tmp_path):
    """As older versions have chosen them."""
    run = new_run(tmp_path / "run", **SETTINGS | {"samples_per_epoch": 12, "samples_per_update": 12, "epochs": 1})
    training = fast_training(run)
    list(training.epochs())
    training.context.micro_batch = 3
    training.state.save(run.checkpoints, 1, {})
    again = fast_training(run)
    list(again.epochs())
    assert again.context.micro_batch == 2


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
@pytest.mark.parametrize("step", range(4))
def test_the_ratio_drift_is_of_all_trained_steps(tmp_path, step, micro_batch):
    """The log-probabilities of one step are off: exp(-0.01) - 1, in float32 from log-probabilities of size 1."""
    training, batch, _ = sampled(tmp_path / "run", micro_batch=micro_batch, policy={"timestep_order": "denoising"})
    batch.log_probs[:, step] += 0.01
    training.context.progress.parts = [batch]
    drift, after = drifts(training)
    assert drift == pytest.approx(1 - 0.990050, abs=1e-5)
    assert after == drift, "the second update is by a policy that has moved"


# --- the training


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_partners_share_the_first_noise_and_no_other(tmp_path, micro_batch):
    _, batch, _ = sampled(tmp_path / "run", micro_batch=micro_batch)
    assert torch.equal(batch.latents[::2, 0], batch.latents[1::2, 0])
    assert not torch.equal(batch.latents[0, 0], batch.latents[2, 0])
    assert batch.prompts[::2] == batch.prompts[1::2]
    different = (batch.latents[::2, 1:] != batch.latents[1::2, 1:]).flatten(2).any(-1)
    assert different.all()


def test_a_sample_costs_three_queries(tmp_path):
    run = new_run(tmp_path / "run", **SETTINGS | {"epochs": 2})
    training, scored = fast_training(run), []
    score = training.context.reward.score
    training.context.reward.score = lambda images, prompts: (scored.append(len(images)), score(images, prompts))[1]
    lines = [metrics["reward_queries"] for metrics in training.epochs()]
    assert lines == [24, 48] and sum(scored) == 48


def test_the_queries_are_the_predictions_and_the_image(tmp_path, generator):
    training, batch, _ = sampled(tmp_path / "run")
    policy, reward, prompts = training.policy, training.context.reward, batch.prompts
    clean = torch.randn(8, 5, *policy.latent_shape, generator=generator)
    chosen, rows = anchors(clean), range(8)
    assert {1, 2, 3} <= set(chosen.tolist())
    found = training.method._dense_rewards(clean, prompts, batch.rewards)
    for k, step in enumerate((0, chosen)):
        expected = reward.score(policy.decode(clean[rows, step]), prompts)
        torch.testing.assert_close(found[rows, step], expected, msg=("first", "anchor")[k])
    assert torch.equal(found[:, -1], batch.rewards)
    with torch.no_grad():  # what is predicted at the first step
        step = policy.step(batch.latents[:, 0], torch.zeros(8, dtype=torch.long), policy.encode_prompts(prompts))
        expected = reward.score(policy.decode(step.clean), prompts)
    torch.testing.assert_close(batch.dense_rewards[:, 0], expected, rtol=1e-4, atol=1e-5)  # float32


def test_advantages_are_normalised_discounted_sums(tmp_path):
    """By prompt and step; with too few of a prompt's, by those of the epoch."""
    training, batch, targets = sampled(tmp_path / "run", moments={"min_count": 100, "buffer_size": 100})
    returns = [sum(0.99 ** (j - k) * batch.dense_rewards[:, j].double() for j in range(k, 4)) for k in range(4)]
    expected = torch.stack([(g - g.mean()) / (g.std(correction=0) + 1e-6) for g in returns], dim=1).float()
    torch.testing.assert_close(targets["advantages"], expected, rtol=1e-3, atol=1e-4)  # sums in float32
    _, batch, targets = sampled(tmp_path / "by prompt", moments={"min_count": 2}, prompts="shapes-complex")
    for prompt in set(batch.prompts):
        mine = targets["advantages"][[i for i, other in enumerate(batch.prompts) if other == prompt]]
        torch.testing.assert_close(mine.mean(0), torch.zeros(4), rtol=0, atol=1e-3)
    assert training.method.state()[1]["step_moments"][0].keys() == set(training._epoch_prompts(1))


@pytest.mark.parametrize("order", ["shuffled", "denoising"])
def test_each_pair_is_trained_once_on_each_step_of_the_window(tmp_path, order):
    policy = {"timestep_order": order, "train_until": 0.75}
    settings = SETTINGS | {"samples_per_update": 4, "policy": policy}
    groups = fast_training(new_run(tmp_path / "run", **settings)).method.groups(1)
    assert len(groups) == 2 * 3
    seen = [pair for pairs, steps in groups for pair in zip(pairs.tolist(), steps.tolist(), strict=True)]
    assert sorted(seen) == [(pair, step) for pair in range(4) for step in range(3)]
    assert [step for _, steps in groups for step in steps.tolist()] == sorted(step for _, step in seen) or (
        order == "shuffled"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples_per_prompt": 1}, "samples_per_prompt is 1, but sdpo compares two images of one prompt; set it to 2"),
        ({"samples_per_epoch": 6, "samples_per_update": 3}, "samples_per_update is 3, but sdpo trains on pairs"),
        ({"steps": 2}, "steps is 2, but sdpo scores the first step, the last and one between them"),
        ({"policy": {"train_from": 0.9}}, "leave none of the 4 steps to train"),
        ({"moments": {"min_count": 64}}, "moments.min_count is larger than moments.buffer_size"),
        ({"critic": {"lr": 1e-3}}, "critic is for other algorithms; remove it, or choose"),
        ({"kl": {"coefficient": 0.1}}, "kl is for other algorithms; remove it, or choose"),
        ({"policy": {"replay": 1}}, "policy.replay is for other algorithms; remove it, or choose"),
        ({"moments": {"baseline": "group"}}, "moments.baseline is for other algorithms; remove it, or choose"),
        ({"guards": ["shapes-match"]}, "this algorithm uses no guards"),
    ],
)
def test_what_it_cannot_do_is_refused(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        toy_config(**SETTINGS | settings)
    assert "\n" not in str(error.value)
