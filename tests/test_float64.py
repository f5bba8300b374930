"""On a device without float64, such as Apple's GPUs, an epoch's statistics are those of the CPU, to the last bit."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from elsewhere import DEVICE, Device
from torch import Tensor
from toy import Brightness, Contrast, fast_training, new_run, toy_training

from comfy_tdpo.diversity import diversity
from comfy_tdpo.methods import groups
from comfy_tdpo.methods.advantages import RewardMoments
from comfy_tdpo.methods.guards import Gate, GuardPenalty, Level
from comfy_tdpo.methods.normalised import NormalisedRewards
from comfy_tdpo.methods.step_regression import StepRegression
from comfy_tdpo.rewards.answers import checked, scores_of

PROMPTS = ["a cat", "a dog", "a cat", "a dog", "a fox", "a cat", "a dog", "a fox"]


def test_the_device_has_no_float64():
    with Device():
        there = torch.arange(4.0).to(DEVICE)
        assert there.device == DEVICE and (2 * there).tolist() == [0, 2, 4, 6]
        for wrong in (there.double, lambda: torch.ones(4).double().to(DEVICE), lambda: there + torch.ones(4)):
            with pytest.raises(AssertionError, match="no float64|mixes devices"):
                wrong()


def by_history(rewards: Tensor, scores: Tensor) -> list[Tensor]:
    standard = RewardMoments(8, 2).add(PROMPTS, rewards)
    return [standard(rewards), standard(scores)]


def by_group(std: str):
    def found(rewards: Tensor, scores: Tensor) -> list[Tensor]:
        standard = groups.standard(rewards, 4, std)
        return [standard(rewards), standard(scores)]

    return found


def by_gate(rewards: Tensor, scores: Tensor) -> list[Tensor]:
    return [Gate(0.5, 3)(rewards, {"a": scores[:, 0], "b": scores[:, 1]})]


def by_levels(rewards: Tensor, scores: Tensor) -> list[Tensor]:
    penalty = GuardPenalty(1.5)
    penalty.start({"a": Level.of_epoch(PROMPTS, rewards), "b": Level.of_prompts(PROMPTS, scores)})
    return [penalty(PROMPTS, {"a": rewards, "b": scores[:, 0]})]


def by_diversity(rewards: Tensor, scores: Tensor) -> list[Tensor]:
    embeds = F.normalize(scores, dim=-1)
    return [groups.diversity_factors(embeds, 4), torch.tensor(diversity(embeds, PROMPTS))]


def by_regression(rewards: Tensor, scores: Tensor) -> list[Tensor]:
    regression = StepRegression.fit(scores[..., None], scores - rewards[:, None])
    return [regression.weights, regression.intercept, regression(scores[..., None])]


def by_function(rewards: Tensor, scores: Tensor) -> list[Tensor]:
    """What a user's function returns: a list and an array."""
    answers = rewards.tolist(), rewards.cpu().double().numpy(), rewards.cpu().double()
    return [checked("mine", scores_of("mine", answer, scores), scores) for answer in answers]


CASES = [by_history, by_group("batch"), by_group("group"), by_group("none"), by_gate, by_levels, by_diversity]
CASES += [by_regression, by_function]


@pytest.mark.parametrize("case", CASES)
def test_statistics_do_not_depend_on_the_device(generator, case):
    rewards, scores = torch.randn(8, generator=generator), torch.randn(8, 3, generator=generator)
    expected = case(rewards, scores)
    with Device():
        got = [found.cpu() for found in case(rewards.to(DEVICE), scores.to(DEVICE))]
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    assert all(found.float().std() > 0 for found in expected if found.numel() > 1)


@pytest.mark.parametrize("baseline", ["history", "group"])
def test_a_trainings_rewards_are_normalised_on_its_device(tmp_path, baseline):
    settings = {"guards": ["shapes-alignment"], "samples_per_prompt": 4, "moments": {"baseline": baseline}}
    settings |= {"critic": {"reads": "clean", "history": 2, "scores": True}}
    training = fast_training(new_run(tmp_path / "run", **settings), guards={"contrast": Contrast()})
    training._sample()
    context, batch = training.context, training.context.progress.batch()

    def normalised(move) -> list[Tensor]:
        rewards, guards = NormalisedRewards(context), {name: move(found) for name, found in batch.guard_rewards.items()}
        rewards.start(batch.prompts, guards)
        images = rewards.of_images(batch.prompts, move(batch.rewards), guards)
        return [images, rewards.of_steps(replace(batch, step_scores=move(batch.step_scores)))]

    expected = normalised(lambda tensor: tensor)
    with Device():
        got = normalised(lambda tensor: tensor.to(DEVICE))
        assert all(found.device == DEVICE for found in got)
        got = [found.cpu() for found in got]
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_a_run_that_watches_a_reward_resumes_there(tmp_path, make_policy):
    settings = {"epochs": 1, "eval_rewards": ["shapes-judge"], "overoptimisation": {"reward": "shapes-judge"}}
    run, held_out = new_run(tmp_path / "run", algorithm="ddpo-2", **settings), {"shapes-judge": Brightness()}
    list(toy_training(run, make_policy, held_out=held_out).epochs())
    training = toy_training(run, make_policy, held_out=held_out)
    training.policy.device = DEVICE
    with Device(), torch.no_grad():
        assert training.state.restore(run.checkpoints)
    assert len(training.overoptimisation.tensors()["scores"]) == 1
