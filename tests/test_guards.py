"""Guards: GARDO's gate and its share, the penalty on a fall, and both in a training."""

import json
import statistics

import pytest
import torch
from toy import Contrast, fast_training, new_run, toy_config

from comfy_tdpo.methods.guards import Gate, GuardPenalty, Level, disagreement, share_beaten
from comfy_tdpo.rollout import Decoder, draw_images
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
    torch.testing.assert_close(disagreement(rewards, guards | {"b": rewards}), uncertain / 2)  # all guards count alike
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
    assert epoch(0.95) == pytest.approx(0.11)  # above the first three, but within 0.1 ... 1.0
    assert epoch(0.05) == pytest.approx(0.11 * 0.9)  # below 0.5, 1.0, 0.95
    assert epoch(1.0) == pytest.approx(0.11 * 0.9)  # the same as the largest


def test_an_epochs_disagreement_is_that_of_the_samples_that_the_reward_ranks_higher():
    rewards, gate = torch.arange(4.0), Gate(0.5, 1)
    gate(rewards, {"a": rewards})
    gate(rewards, {"a": -rewards})  # disagreements -1, -1/3, 1/3 and 1
    assert gate.state() == {"share": pytest.approx(0.55), "history": [pytest.approx(2 / 3)]}


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
    first = torch.tensor([1.0, 3.0, 10.0, 14.0])  # 7 on average
    std = statistics.pstdev(first.tolist())
    cat, dog = (1 + 3 + 2 * 7) / 4, (10 + 14 + 2 * 7) / 4
    level = Level.of_epoch(["cat", "cat", "dog", "dog"], first)
    later = torch.tensor([0.5, 13.0, 9.0, 6.0])  # the fox was not drawn in the first epoch
    expected = [(cat - 0.5) / std, (dog - 13) / std, (dog - 9) / std, (7 - 6) / std]
    got = level.fall(["cat", "dog", "dog", "fox"], later)
    assert got.tolist() == pytest.approx(expected, rel=1e-6)  # the 1e-6 beside std
    of_steps = level.fall(["cat", "dog", "dog", "fox"], later[:, None].expand(-1, 3))
    assert torch.equal(of_steps, got[:, None].expand(-1, 3))


def test_levels_by_empirical_bayes(generator):
    """They are nearer to the truth than the means of the prompts' own scores, as the formula says."""
    prompts, spread, noise, count = [f"prompt {i}" for i in range(2000)], 0.5, 1.0, 4
    truth = 3 + spread * torch.randn(2000, generator=generator)
    scores = truth[:, None] + noise * torch.randn(2000, count, generator=generator)
    level = Level.of_prompts(prompts, scores)
    assert level.std == pytest.approx(noise, rel=0.05)  # 6,000 degrees of freedom: 1 %
    found = torch.tensor([level.prompts[prompt] for prompt in prompts])
    error = ((found - truth) ** 2).mean().item()
    expected = 1 / (1 / spread**2 + count / noise**2)  # of the posterior, 0.125; that of the means is 0.25
    assert error == pytest.approx(expected, rel=0.15)  # a mean of 2,000 squares: 3 %, and the estimated shrinkage


def test_prompts_that_differ_by_chance_alone_share_a_level():
    scores = torch.tensor([[1.0, 3.0], [3.0, 1.0], [2.0, 2.0]])
    assert Level.of_prompts(["a", "b", "c"], scores).prompts == {"a": 2.0, "b": 2.0, "c": 2.0}
    assert Level.of_prompts(["a"], scores[:1]).prompts == {"a": 2.0}


def started(levels: dict[str, Level], *args, **settings) -> GuardPenalty:
    penalty = GuardPenalty(*args, **settings)
    penalty.start(levels)
    return penalty


LEVELS = {"a": Level(0.0, 1.0, {"cat": 1.0, "dog": 5.0}), "b": Level(2.0, 0.5)}


@pytest.mark.parametrize("credit", [False, True])
def test_a_fall_costs_its_weight_and_a_rise_counts_on_request(credit):
    penalty = started(LEVELS, 3.0, credit)
    got = penalty(["cat", "dog"], {"a": torch.tensor([0.0, 7.0]), "b": torch.tensor([3.0, 1.0])})
    rise = -1.0 if credit else 0.0
    expected = [3 * 1.0, 3 * rise * 2, 3 * rise * 2, 3 * 2.0]
    assert got.T.flatten().tolist() == pytest.approx(expected, rel=1e-5)  # the 1e-6 beside deviations of 1 and 0.5


def test_weights_follow_their_prompts_falls():
    penalty = started({"a": LEVELS["a"]}, 1.0, True, adaptation=0.5, slack=0.1)
    scores = {"a": torch.tensor([0.2, 0.6, 5.4])}  # falls of 0.8, 0.4 and -0.4
    penalty.adapt(["cat", "cat", "dog"], scores)
    weights = penalty.weights["a"]
    assert weights.of("cat") == pytest.approx(1 + 0.5 * (0.6 - 0.1), rel=1e-5)
    assert weights.of("dog") == pytest.approx(1 + 0.5 * (-0.4 - 0.1), rel=1e-5)
    mean = (0.8 + 0.4 - 0.4) / 3
    assert weights.of("fox") == pytest.approx(1 + 0.5 * (mean - 0.1), rel=1e-5)  # what prompts have in common
    for _ in range(30):
        penalty.adapt(["cat", "cat", "dog"], scores)
    assert (weights.of("cat"), weights.of("dog")) == (pytest.approx(4.0), pytest.approx(1 / 3))
    penalty.adapt(["cat", "cat", "dog"], {"a": torch.tensor([3.0, 3.0, 5.0])})
    assert weights.of("cat") < 3.1, "nothing has been wound up beyond the bound"


def test_a_prompt_that_is_always_below_its_level_ends_at_the_highest_weight():
    """Also if what prompts have in common has reached the bound long before."""
    penalty = started({"a": Level(0.0, 1.0)}, 1.0, True, adaptation=0.5)
    for _ in range(60):
        penalty.adapt(["cat", "dog"], {"a": torch.tensor([-0.2, -1.0])})
    assert penalty.weights["a"].of("cat") == penalty.weights["a"].of("dog") == 4.0


def test_weights_of_prompts_that_are_not_drawn_stay_within_the_bounds():
    penalty = started({"a": Level(0.0, 1.0)}, 1.0, True, adaptation=0.5)
    penalty.adapt(["cat", "dog"], {"a": torch.tensor([3.0, -3.0])})
    for _ in range(4):
        penalty.adapt(["dog"], {"a": torch.tensor([2.0])})
    assert penalty.weights["a"].of("cat") == pytest.approx(1 / 3)


def test_a_guard_that_never_differs_within_a_prompt_falls_in_units_of_all_scores():
    level = Level.of_prompts(["a", "b"], torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert level.std == 0.5 and level.prompts == {"a": 0.0, "b": 1.0}


def test_the_weight_settles_where_the_constraint_holds():
    """A prompt whose fall is 2 - w settles at a fall of `slack`."""
    penalty, weight = started({"a": Level(0.0, 1.0)}, 1.0, True, adaptation=0.3, slack=0.2), 1.0
    for _ in range(60):
        penalty.adapt(["cat"], {"a": torch.tensor([weight - 2])})
        weight = penalty.weights["a"].of("cat")
    assert weight == pytest.approx(1.8, rel=1e-4)


def test_the_penalty_does_not_know_a_guards_scale(generator):
    scores = torch.randn(2, 12, generator=generator)
    found, prompts = [], ["cat", "dog"] * 6
    for scale, shift in ((1, 0), (1000, -30)):
        penalty = started({"a": Level.of_epoch(prompts, scale * scores[0] + shift)}, 1.0)
        found.append(penalty(prompts, {"a": scale * scores[1] + shift}))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)  # float32 scores near 1000
    assert (found[0] > 0).any()


def test_its_state_goes_through_json_without_loss(generator):
    first, later = torch.randn(2, 8, generator=generator)
    prompts, scores = ["cat", "fox"] * 4, {"a": later, "b": later}
    levels = {name: Level.of_epoch(["cat", "dog"] * 4, found) for name, found in (("a", first), ("b", -first))}
    original = started(levels, 1.0, True, adaptation=0.7)
    original.adapt(prompts, scores)
    restored = GuardPenalty(1.0, True, 0.7)
    restored.load(json.loads(json.dumps(original.state())))
    for _ in range(2):
        assert torch.equal(original(prompts, scores), restored(prompts, scores))
        original.adapt(prompts, scores)
        restored.adapt(prompts, scores)


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


def test_the_model_draws_the_levels_before_it_is_trained(make_training, tmp_path):
    (tmp_path / "few.txt").write_text("a red circle\na green star\n")
    settings = {"guard_images": 3, "guard_adaptation": 0.5, "guard_credit": True}
    training = make_training(epochs=2, prompts=str(tmp_path / "few.txt"), **settings)
    policy, config, prompts = training.policy, training.config, list(dict.fromkeys(training.prompts))
    guard = training.context.guards["contrast"]
    expected = {}
    with torch.no_grad():
        for prompt in prompts:
            seeds = [(config.seed, "guards", prompt, i) for i in range(3)]
            expected[prompt] = guard.score(draw_images(Decoder(policy, 3), [prompt] * 3, seeds, 3), [prompt] * 3)
    level = Level.of_prompts(prompts, torch.stack(list(expected.values())))
    first, second = training.epochs()
    found = training.method.rewards.guards.levels["contrast"]
    assert found.prompts == pytest.approx(level.prompts, rel=1e-4)  # float32, in batches of another size
    assert found.std == pytest.approx(level.std, rel=1e-3)  # of scores that differ by a hundredth
    assert first["guard/contrast/penalty"] == config.guard_penalty != second["guard/contrast/penalty"]


def test_too_many_prompts_for_levels_of_their_own(make_training):
    """Four epochs of eight images are one for each of 45 prompts at most."""
    training = make_training(guard_images=8)
    batch, _ = targets_of(training)
    expected = Level.of_epoch(training._epoch_prompts(1), batch.guard_rewards["contrast"])
    assert vars(training.method.rewards.guards.levels["contrast"]) == vars(expected)


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
        ({"guards": ["shapes-gold"]}, "guards lists 'shapes-gold', which may only evaluate what others"),
        ({"guards": ["shapes-judge"]}, "guards lists 'shapes-judge', which may only evaluate what others"),
        ({"guards": ["shapes-alinement"]}, "got reward 'shapes-alinement'; expected one of"),
        ({"guards": ["shapes-alignment"], "guard_images": 1}, "guard_images is 1, too few"),
        ({"guards": ["shapes-alignment"], "guard_adaptation": 0.5}, "guard_adaptation needs a level for each prompt"),
        ({"guards": ["shapes-alignment"], "guard_slack": 0.5}, "guard_slack is for guard_adaptation, which is 0"),
        ({"guard_images": 8}, "guard_images is for the penalty of guards, but there is none"),
        ({"guards": ["shapes-alignment"], "guard_penalty": 0}, "but nothing uses them: set guard_penalty above 0 or"),
        (
            {
                "guards": ["shapes-alignment"],
                "samples_per_prompt": 2,
                "moments": {"baseline": "group", "group_std": "none"},
            },
            "moments.group_std none leaves rewards in their own units, but guard_penalty is in normalised reward; set",
        ),
        ({"kl": {"gate": True, "coefficient": 0.1}}, "kl.gate compares the training reward with guards, but guards is"),
        ({"guards": ["shapes-alignment"], "kl": {"gate": True}}, "kl.gate needs a KL penalty, but kl.coefficient is 0"),
    ],
)
def test_contradictions_are_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        toy_config(**settings)
    assert "\n" not in str(error.value)


def test_a_held_out_reward_of_the_preset_may_become_a_guard():
    config = make_config("sd14-pickscore", overrides={"algorithm": "tdpo-g", "guards": "imagereward"})
    assert (config.guards, config.eval_rewards) == (["imagereward"], [])
    config = make_config("shapes", overrides={"guards": "shapes-match"})
    assert (config.guards, config.overoptimisation.reward) == (["shapes-match"], None)
