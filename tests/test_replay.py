"""The replay buffer: what it keeps, what is drawn from it, and that replaying one's own samples changes nothing."""

import pytest
import torch
from toy import fast_training, new_run, toy_config

from comfy_tdpo.rollout import draw_noise

OBJECTIVES = ["clip", "step-normalised", "trust-region"]


def sampled(path, replay=1, **settings):
    """A training whose buffer holds the samples of its first epoch, as if they were of an epoch before."""
    policy = settings.pop("policy", {}) | {"replay": replay}
    run = new_run(path, samples_per_update=8, policy=policy, **settings)
    training = fast_training(run, trained=True)
    training._sample()
    batch, targets = training.context.progress.batch(), training.context.progress.targets
    training.method.replay.add(batch, targets)
    return training, batch, targets


def moved(training) -> None:
    """The policy, no longer the one that sampled."""
    generator = torch.Generator().manual_seed(5)
    for parameter in training.policy.parameters:
        parameter.data.add_(0.003 * torch.randn(parameter.shape, generator=generator))


def gradient(training, batch, targets, rows, steps) -> list[torch.Tensor]:
    training.context.optimizer.zero_grad()
    training.method._accumulate(batch, targets, rows, steps, training.method.replay.new(rows), len(rows))
    return [parameter.grad.clone() for parameter in training.policy.parameters]


@pytest.mark.parametrize("kl", [0.0, 1.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("drift", [False, True])
def test_a_replayed_sample_counts_as_it_did_when_it_was_new(tmp_path, objective, kl, drift):
    """With a ratio of 1, under the policy that drew it, and after the same drift."""
    policy = {"objective": objective, "clip_range": 0.01}
    training, batch, targets = sampled(tmp_path / "run", policy=policy, kl={"coefficient": kl})
    if drift:
        moved(training)
    rows, steps = torch.arange(8), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    new = gradient(training, batch, targets, rows, steps)
    blank = {name: torch.full_like(value, torch.nan) for name, value in targets.items()}
    kept = gradient(training, batch, blank, rows + 8, steps)
    assert all(torch.equal(a, b) for a, b in zip(new, kept, strict=True))
    assert max(g.abs().max() for g in new) > 0
    both = gradient(training, batch, targets, torch.cat([rows[:4], rows[4:] + 8]), steps)
    torch.testing.assert_close(both, new, rtol=1e-5, atol=1e-9)  # float32; the cat may change how sums are blocked
    found = training.context.progress.sums
    assert [found[f"{kind}/approx_kl"].item() > 1e-4 for kind in ("policy", "replay")] == [drift, drift]


def test_an_update_on_both_is_the_mean_over_both(tmp_path):
    training, batch, targets = sampled(tmp_path / "run")
    moved(training)
    rows, steps = torch.arange(8), torch.zeros(8, dtype=torch.int64)
    new = gradient(training, batch, targets, rows, steps)
    twice = gradient(training, batch, targets, torch.cat([rows, rows + 8]), steps.repeat(2))
    torch.testing.assert_close(twice, new, rtol=1e-4, atol=1e-8)  # float32


def test_it_keeps_the_latest_epochs(tmp_path):
    """As many as asked for, with the prompts and the noise with which they were drawn."""
    run = new_run(tmp_path / "run", epochs=4, policy={"replay": 2})
    training, seen = fast_training(run), []
    replay, context = training.method.replay, training.context
    add = replay.add
    replay.add = lambda batch, targets: (seen.append((batch, targets)), add(batch, targets))
    for _ in training.epochs():
        drawn = seen[-2:]
        for name in ("latents", "log_probs"):
            assert torch.equal(replay.samples[name], torch.cat([getattr(batch, name) for batch, _ in drawn]))
        kept = torch.cat([targets["temporal_rewards"] for _, targets in drawn])
        assert torch.equal(replay.samples["temporal_rewards"], kept)
        for tensor in replay.samples.values():  # what was dropped is not held any more
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert replay.prompts == [prompt for batch, _ in drawn for prompt in batch.prompts]
        assert [replay.prompt(drawn[-1][0], row) for row in (7, 8)] == [drawn[-1][0].prompts[7], drawn[0][0].prompts[0]]
        seeds = [replay.noise_of(context.samples + i) for i in range(len(replay.prompts))]
        assert torch.equal(draw_noise(training.policy, seeds)[:, 0], replay.samples["latents"][:, 0])
    assert len(seen) == 4 and len(replay.prompts) == 16


@pytest.mark.parametrize("updates", ["timestep", "trajectory"])
@pytest.mark.parametrize("order", ["shuffled", "denoising"])
def test_updates_are_extended_by_samples_of_earlier_epochs(tmp_path, updates, order):
    settings = {"updates": updates, "samples_per_epoch": 16, "samples_per_update": 8}
    without, replaying = (
        fast_training(
            new_run(tmp_path / str(epochs), policy={"replay": epochs, "timestep_order": order}, **settings)
        ).method
        for epochs in (0, 2)
    )
    width, drawn = 3 if updates == "trajectory" else 1, {}
    for epoch, limit in ((1, 0), (2, 16), (3, 32), (4, 32)):
        for (rows, steps), (new_rows, new_steps) in zip(replaying.groups(epoch), without.groups(epoch), strict=True):
            count = len(new_rows)
            assert torch.equal(rows[:count], new_rows) and torch.equal(steps[:count], new_steps)
            kept, expected = rows[count:], count // 2 if limit else 0
            assert len(kept) == len(steps[count:]) == expected and torch.equal(steps[count:], new_steps[:expected])
            assert ((kept >= 16) & (kept < 16 + limit)).all()
            assert (kept.unflatten(0, (-1, width)) == kept[::width, None]).all(), "all steps of a sample together"
            drawn.setdefault(epoch, []).extend(kept.tolist())
    assert {row // 16 for row in drawn[4]} == {1, 2}, "from both epochs"
    assert drawn[3] != drawn[4]


def test_the_critic_learns_from_new_samples_alone(tmp_path):
    training, batch, targets = sampled(tmp_path / "run")
    critic, seen = training.method.critic, []
    critic.update = lambda batch, targets, rows, steps: seen.append((rows, steps))
    rows, steps = torch.arange(12), torch.arange(12) % 3
    training.method.update((rows, steps))
    assert torch.equal(seen[0][0], rows[:8]) and torch.equal(seen[0][1], steps[:8])


def test_it_restores_what_a_reset_has_lost(tmp_path):
    """A policy that is back at the base model, after the samples of a better one: replaying them alone, without a new
    sample, makes the good ones more likely again."""
    training, batch, targets = sampled(tmp_path / "run", algorithm="ddpo-100", policy={"lr": 1e-2, "eps": 1e-4})
    for parameter in training.policy.parameters[1:]:
        parameter.data.zero_()
    rows, steps = torch.arange(8) + 8, torch.zeros(8, dtype=torch.int64)
    good = targets["temporal_rewards"][:, 0]

    def towards() -> float:
        with torch.no_grad():
            return (training.method._ratio_now(batch, rows, steps) * good).mean().item()

    before = towards()
    for _ in range(20):
        training.method.update_policy(batch, targets, rows, steps)
    assert towards() > before + 1e-3


def test_without_it_nothing_is_kept(tmp_path):
    training = fast_training(new_run(tmp_path / "run", epochs=1))
    list(training.epochs())
    assert not training.method.replay.samples and "replay" not in training.method.state()[0]
    assert toy_config().policy.replay == 0 and toy_config(algorithm="dpok").policy.replay == 1
