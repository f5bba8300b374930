"""Guards: GARDO's gate and its share, the penalty on a fall, and both in a training."""

import json
import statistics

import pytest
import torch
from toy import Contrast, fast_training, new_run, toy_config

from comfy_tdpo.methods.guards import Gate, GuardLevels, disagreement, share_beaten
from comfy_tdpo.trainer.config import make_config

# --- the gate


def test_the_share_beaten_counts_by_hand():
    assert share_beaten(torch.tensor([5.0, 1.0, 3.0, 3.0])).tolist() == pytest.approx([1, 0, 0.5, 0.5], abs=1e-12)
    assert share_beaten(torch.full((7,), 2.0)).tolist() == [0.5] * 7


def test_what_the_reward_likes_and_both_guards_do_not_disagrees_most():
    rewards = torch.tensor([9.0, 1.0, 2.0, 3.0])
    guards = {"a": torch.tensor([0.0, 2.0, 3.0, 4.0]), "b": torch.tensor([-1.0, 5.0, 6.0, 7.0])}
    uncertain = disagreement(rewards, guards)
    assert uncertain.argmax() == 0 and uncertain[0] == 1
    assert torch.equal(Gate(0.25, 20)(rewards, guards), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    # the other way round, it is the sample that agrees least in the other direction, and never restrained
    reverse = disagreement(guards["a"], {"a": rewards})
    assert reverse.argmin() == 0 and Gate(1.0, 20)(guards["a"], {"a": rewards})[0] == 0


def test_equal_rankings_agree_and_restrain_nothing(generator):
    rewards = torch.randn(16, generator=generator)
    guards = {"a": rewards.exp(), "b": 3 * rewards - 7}
    assert torch.equal(disagreement(rewards, guards), torch.zeros(16, dtype=torch.float64))
    assert not Gate(1.0, 20)(rewards, guards).any()


@pytest.mark.parametrize(("share", "count"), [(0.1, 2), (0.25, 5), (1.0, 10)])
def test_the_gate_chooses_its_share(share, count):
    rewards = torch.arange(20.0)
    chosen = Gate(share, 20)(rewards, {"a": -rewards})  # the upper half disagrees
    assert chosen.tolist() == [0.0] * (20 - count) + [1.0] * count


def test_the_share_follows_the_disagreement():
    gate, levels = Gate(0.1, 3), iter(range(100))

    def epoch(level: float) -> float:
        next(levels)
        gate._adapt(level)
        return gate.share

    assert [epoch(level) for level in (0.3, 0.9, 0.1)] == [0.1] * 3, "the window is not full yet"
    assert epoch(0.5) == 0.1  # within 0.1 ... 0.9
    assert epoch(1.0) == pytest.approx(0.11)  # above 0.9, 0.1, 0.5
    assert epoch(0.05) == pytest.approx(0.11 * 0.9)  # below 0.1, 0.5, 1.0
    assert epoch(0.2) == pytest.approx(0.11 * 0.9)  # within 0.05 ... 1.0


def test_the_share_stays_between_a_fifth_and_twice_its_start():
    gate = Gate(0.1, 1)
    for level in range(30):
        gate._adapt(level)
    assert gate.share == 0.2
    for level in range(60):
        gate._adapt(-level)
    assert gate.share == pytest.approx(0.02)


# --- the penalty


def test_a_fall_is_below_the_first_epochs_level_of_the_prompt():
    levels = GuardLevels()
    first = torch.tensor([1.0, 3.0, 10.0, 14.0])  # 7 on average
    std = statistics.pstdev(first.tolist())
    cat, dog = (1 + 3 + 2 * 7) / 4, (10 + 14 + 2 * 7) / 4
    prompts = ["cat", "cat", "dog", "dog"]
    expected = [(cat - 1) / std, (cat - 3) / std, 0, 0]
    assert levels.fall(prompts, {"a": first})[:, 0].tolist() == pytest.approx(expected, rel=1e-6)  # the 1e-6 beside std
    later = {"a": torch.tensor([0.5, 13.0, 9.0, 6.0])}  # the fox was not drawn in the first epoch
    expected = [(cat - 0.5) / std, 0, (dog - 9) / std, (7 - 6) / std]
    assert levels.fall(["cat", "dog", "dog", "fox"], later)[:, 0].tolist() == pytest.approx(expected, rel=1e-6)
    levels.both_ways = True
    expected[1] = (dog - 13) / std
    assert levels.fall(["cat", "dog", "dog", "fox"], later)[:, 0].tolist() == pytest.approx(expected, rel=1e-6)


def test_the_penalty_does_not_know_a_guards_scale(generator):
    scores = torch.randn(2, 12, generator=generator)
    falls = []
    for scale, shift in ((1, 0), (1000, -30)):
        levels, prompts = GuardLevels(), ["cat", "dog"] * 6
        levels.fall(prompts, {"a": scale * scores[0] + shift})
        falls.append(levels.fall(prompts, {"a": scale * scores[1] + shift}))
    torch.testing.assert_close(falls[0], falls[1], rtol=1e-4, atol=1e-4)  # float32 scores near 1000
    assert (falls[0] > 0).any()


def test_levels_go_through_json_without_loss(generator):
    first, later = torch.randn(2, 8, generator=generator)
    original, restored = GuardLevels(), GuardLevels()
    original.fall(["cat", "dog"] * 4, {"a": first, "b": -first})
    restored.load(json.loads(json.dumps(original.state())))
    prompts = ["cat", "fox"] * 4
    assert torch.equal(*(levels.fall(prompts, {"a": later, "b": later}) for levels in (original, restored)))


# --- in a training


@pytest.fixture
def make_training(tmp_path):
    def make(**settings):
        run = new_run(tmp_path / str(len(list(tmp_path.iterdir()))), guards=["shapes-alignment"], **settings)
        return fast_training(run, guards={"contrast": Contrast()}, trained=True)

    return make


def targets_of(training):
    training._sample()
    return training.context.progress.batch(), training.context.progress.targets


@pytest.mark.parametrize("algorithm", ["tdpo", "ddpo-100"])
@pytest.mark.parametrize("form", ["exact", "sampled"])
def test_the_gate_switches_the_kl_of_a_sample(make_training, algorithm, form):
    kl = {"coefficient": 0.5, "form": form, "gate_share": 0.5}
    settings = {"algorithm": algorithm, "advantage_clip": None}
    _, free = targets_of(make_training(kl=kl, guard_penalty=1.0, **settings))
    batch, gated = targets_of(make_training(kl=kl | {"gate": True}, guard_penalty=1.0, **settings))
    chosen = Gate(0.5, 20)(batch.rewards, batch.guard_rewards)
    assert 0 < chosen.sum() <= 4
    plain = make_training(guard_penalty=1.0, **settings)
    _, without = targets_of(plain)
    if form == "exact":
        scale = (gated["kl_weight"] / free["kl_weight"])[chosen.bool()]  # a critic normalises by another deviation
        assert torch.equal(gated["kl_weight"] > 0, chosen.bool()[:, None].expand(-1, 3))
        assert (scale == scale[0, 0]).all() if algorithm == "ddpo-100" else (scale > 0).all()
        # the returns of samples that are not restrained differ by the mean, which is the baseline, alone
        difference = (gated["returns"] - without["returns"])[~chosen.bool()]
        torch.testing.assert_close(difference, difference[:1].expand_as(difference), rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(gated["returns"][~chosen.bool()], without["returns"][~chosen.bool()])
        assert torch.equal(gated["returns"][chosen.bool()], free["returns"][chosen.bool()])


def test_the_penalty_lowers_the_returns_of_what_the_guard_dislikes(make_training):
    settings = {"algorithm": "ddpo-100", "advantage_clip": None}
    batch, restrained = targets_of(make_training(guard_penalty=2.0, **settings))
    training = make_training(guard_penalty=0.0, kl={"coefficient": 1e-9, "gate": True}, **settings)
    prompts = training._epoch_prompts(1)
    _, free = targets_of(training)
    scores, falls = batch.guard_rewards["contrast"].tolist(), []
    for prompt, score in zip(prompts, scores, strict=True):
        own = [s for p, s in zip(prompts, scores, strict=True) if p == prompt]
        level = statistics.fmean([*own, *2 * [statistics.fmean(scores)]])
        falls.append(max(0, level - score) / statistics.pstdev(scores))
    expected = [-2 * (fall - statistics.fmean(falls)) for fall in falls]
    difference = (restrained["returns"] - free["returns"])[:, 0].tolist()
    assert difference == pytest.approx(expected, abs=2e-3)  # the 1e-6 beside a deviation of about 0.002
    assert max(falls) > 0.1


def test_guards_are_measured(make_training):
    training = make_training(epochs=1)
    (metrics,) = training.epochs()
    assert 0 < metrics["guard/contrast/mean"] < 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guards": ["shapes-aesthetic"]}, "guards lists 'shapes-aesthetic', which is in rewards too; remove it"),
        (
            {"guards": ["shapes-alignment"], "eval_rewards": ["shapes-alignment"]},
            "guards lists 'shapes-alignment', which is in eval_rewards too; remove it",
        ),
        ({"guards": ["shapes-alignment", "shapes-alignment"]}, "guards lists a reward twice"),
        ({"guards": ["shapes-alinement"]}, "got reward 'shapes-alinement'; expected one of"),
        ({"guards": ["shapes-alignment"], "guard_penalty": 0}, "but nothing uses them: set guard_penalty above 0 or"),
        ({"kl": {"gate": True, "coefficient": 0.1}}, "kl.gate compares the training reward with guards, but guards is"),
        ({"guards": ["shapes-alignment"], "kl": {"gate": True}}, "kl.gate needs a KL penalty, but kl.coefficient is 0"),
    ],
)
def test_contradictions_are_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        toy_config(**settings)
    assert "\n" not in str(error.value)


def test_a_held_out_reward_of_the_preset_may_become_a_guard():
    config = make_config("shapes", overrides={"guards": "shapes-judge"})
    assert (config.guards, config.eval_rewards) == (["shapes-judge"], ["shapes-gold"])
