"""The steps that an epoch trains: a window, a share of it drawn by epoch, and that only these are touched."""

import pytest
import torch
from toy import new_run, toy_config, toy_training

from comfy_tdpo.methods.sections import ClippedPolicySettings
from comfy_tdpo.methods.window import trained_steps, window

ALL = torch.ones(10, dtype=torch.bool)


def positions(mask) -> list[int]:
    return [k for k, trained in enumerate(mask.tolist()) if trained]


@pytest.mark.parametrize(
    ("begin", "end", "steps"),
    [
        (0, 1, range(10)),
        (0, 0.5, range(5)),
        (0.5, 1, range(5, 10)),
        (0.3, 0.8, range(3, 8)),
        (0, 0.8, range(8)),  # without the step before the last
        (0.29, 0.71, range(3, 7)),
    ],
)
def test_a_window_is_its_fractions_of_the_steps(begin, end, steps):
    assert positions(window(ClippedPolicySettings(train_from=begin, train_until=end), ALL)) == list(steps)


def test_two_windows_that_meet_have_every_step_once():
    for steps in range(2, 60):
        for cut in (0.29, 0.3, 0.5, 0.57, 0.7):
            every = torch.ones(steps, dtype=torch.bool)
            first, second = ClippedPolicySettings(train_until=cut), ClippedPolicySettings(train_from=cut)
            assert (window(first, every) ^ window(second, every)).all(), (steps, cut)


def test_steps_without_noise_are_never_trained():
    stochastic = ALL.clone()
    stochastic[-2:] = False
    assert positions(window(ClippedPolicySettings(train_from=0.6), stochastic)) == [6, 7]
    with pytest.raises(ValueError, match="only steps 1, 2, 3, 4, 5, 6, 7, 8 of 10 have any"):
        window(ClippedPolicySettings(train_from=0.8), stochastic)


def test_each_epoch_draws_its_share():
    settings = ClippedPolicySettings(train_from=0.2, train_until=0.8, train_share=0.5)
    epochs = [positions(trained_steps(settings, ALL, seed=1, epoch=epoch)) for epoch in range(1, 1001)]
    assert epochs == [positions(trained_steps(settings, ALL, seed=1, epoch=epoch)) for epoch in range(1, 1001)]
    assert all(len(steps) == 3 for steps in epochs)
    counts = [sum(k in steps for steps in epochs) for k in range(10)]
    assert counts[:2] == counts[8:] == [0, 0]
    # binomial with p = 1/2: a deviation of 16, so four of them
    assert all(abs(count - 500) < 64 for count in counts[2:8])
    assert epochs[:9] != [positions(trained_steps(settings, ALL, seed=2, epoch=epoch)) for epoch in range(1, 10)]


@pytest.mark.parametrize(("share", "count"), [(1e-3, 1), (0.1, 1), (0.26, 3), (0.99, 10), (1, 10)])
def test_a_share_is_at_least_one_step(share, count):
    assert trained_steps(ClippedPolicySettings(train_share=share), ALL, seed=1, epoch=1).sum() == count


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            {"train_from": 0.5, "train_until": 0.5},
            "train_from 0.5 and policy.train_until 0.5 leave none of the",
        ),
        ({"train_from": 0.7, "train_until": 0.2}, "train_from 0.7 and policy.train_until 0.2 leave none"),
        ({"train_from": 0.4, "train_until": 0.45}, "leave none of the 3 steps to train; expected at least one"),
        ({"train_until": 0.0}, "policy.train_until: got 0.0"),
        ({"train_share": 0.0}, "policy.train_share: got 0.0"),
    ],
)
def test_an_empty_window_is_one_sentence(policy, message):
    with pytest.raises(ValueError, match=message) as error:
        toy_config(policy=policy)
    assert "\n" not in str(error.value)


# --- in a training


@pytest.fixture
def make_training(make_policy, tmp_path):
    def make(**policy):
        settings = {"steps": 6, "epochs": 1, "policy": policy}
        return toy_training(new_run(tmp_path / str(len(list(tmp_path.iterdir()))), **settings), make_policy)

    return make


@pytest.mark.parametrize("algorithm", ["tdpo-r", "ddpo-2"])
def test_updates_are_of_the_trained_steps_of_every_sample(algorithm, make_policy, tmp_path):
    policy = {"train_from": 0.34, "train_share": 0.5}  # two of steps 2 to 5
    training = toy_training(new_run(tmp_path / "run", algorithm=algorithm, steps=6, policy=policy), make_policy)
    seen = set()
    for epoch in range(1, 9):
        groups = training.method.groups(epoch)
        pairs = [pair for rows, k in groups for pair in zip(rows.tolist(), k.tolist(), strict=True)]
        steps = {k for _, k in pairs}
        assert len(steps) == 2 and steps <= {2, 3, 4, 5}
        assert sorted(pairs) == [(row, k) for row in range(8) for k in sorted(steps)]
        seen |= steps
    assert seen == {2, 3, 4, 5}


def test_other_steps_change_nothing_that_is_learned(make_training):
    """Nor what is told of the critic: their embeddings may be anything."""
    learned = []
    for shift in (0.0, 100.0):
        training = make_training(train_from=0.34, train_until=0.67)
        training._sample()
        progress = training.context.progress
        batch, outside = progress.batch(), torch.tensor([0, 1, 4, 5])
        batch.image_embeds[:, outside] += shift
        with torch.no_grad():
            progress.targets = training.method.targets(batch, training._epoch_prompts(1))
        batch.log_probs[:, outside] += shift
        training._update()
        explained = training.method.metrics(batch)["critic/explained_variance"]
        learned.append(
            [*training.policy.parameters, *training.method.critic.network.parameters(), torch.tensor(explained)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*learned, strict=True))


def test_temporal_rewards_are_normalised_over_the_trained_steps(make_training):
    training = make_training(train_from=0.34, train_until=0.67)
    for weight in training.method.critic.network.parameters():  # at first it says the same of every step
        weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(weight.numel()))
    training._sample()
    temporal = training.context.progress.targets["temporal_rewards"][:, 2:4].double()
    assert temporal.mean().item() == pytest.approx(0, abs=1e-5)  # float32, and the mean was 17 deviations away from 0
    assert temporal.std(correction=0).item() == pytest.approx(1, abs=1e-6)  # float32 sums of 16 terms of size 1
    every = training.context.progress.targets["temporal_rewards"]
    assert abs(every.std(correction=0).item() - 1) > 0.01, "the steps differ"


def test_sampling_does_not_know_the_window(make_training):
    batches = []
    for policy in ({}, {"train_until": 0.5}):
        training = make_training(**policy)
        training._sample()
        batches.append(training.context.progress.batch())
    assert torch.equal(batches[0].latents, batches[1].latents)
