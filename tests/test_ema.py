"""The average of the LoRA: a recursion by hand, what is drawn and saved with it, and the weights restored exactly."""

import pytest
import torch
from safetensors.torch import load_file
from toy import new_run, same, toy_training

from comfy_tdpo.ema import MovingAverage
from comfy_tdpo.rollout import denoise, draw_noise

RATE = 0.3  # reached by the warm-up at the third update: 1/10, 2/11, 3/12, then 4/13 > 0.3


def weights_of(policy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.trainable.parameters.items()}


def clones(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def recorded(training):
    """The LoRA before the training and after each update of it, and the averages after each."""
    policy, optimizer, history, averages = training.policy, training.context.optimizer, [], []
    history.append(weights_of(policy))
    optimizer.register_step_post_hook(lambda *_: history.append(weights_of(policy)))
    optimizer.register_step_pre_hook(lambda *_: averages.append(clones(policy.average.weights)))
    return history, averages


def averages_by_hand(history, rate: float) -> list[dict[str, torch.Tensor]]:
    """In float64, before each update and after the last."""
    averages = [{name: weight.double() for name, weight in history[0].items()}]
    for n, weights in enumerate(history[1:]):
        decay = min((1 + n) / (10 + n), rate)
        averages.append({name: decay * old + (1 - decay) * weights[name] for name, old in averages[-1].items()})
    return averages


@pytest.fixture(scope="module")
def trained(make_policy, tmp_path_factory):
    """A training of two epochs that has ended, the LoRA before and after each of its updates, and the averages."""
    run = new_run(tmp_path_factory.mktemp("trained") / "run", epochs=2, policy={"ema": RATE, "lr": 0.01})
    training = toy_training(run, make_policy)
    history, averages = recorded(training)
    list(training.epochs())
    return training, history, [*averages, training.policy.average.weights]


def test_the_average_is_the_recursion(trained):
    training, history, averages = trained
    assert len(history) == 1 + 2 * 2 * 3, "two epochs of two updates for each of three steps"
    for average, expected in zip(averages, averages_by_hand(history, RATE), strict=True):
        assert average.keys() == expected.keys()
        for name, weight in average.items():
            assert weight.dtype == torch.float32
            # float32 sums of two terms, whose errors shrink by 0.3 an update; weights are at most about 4
            torch.testing.assert_close(weight.double(), expected[name], rtol=1e-6, atol=1e-7)
    live = weights_of(training.policy)
    assert max((live[name] - average[name]).abs().max() for name in live) > 1e-3


def test_a_constant_is_its_own_average_and_a_jump_is_followed_at_the_rate():
    parameter = torch.nn.Parameter(torch.ones(3))
    average = MovingAverage({"a.b": parameter}, 0.5)
    for _ in range(20):
        average.update()
    assert torch.equal(average.weights["a.b"], torch.ones(3))
    parameter.data.fill_(3.0)
    assert torch.equal(average.weights["a.b"], torch.ones(3)), "a copy of its own, not the parameter's memory"
    average.update()  # the 21st: the warm-up allows 21/30
    torch.testing.assert_close(average.weights["a.b"], torch.full((3,), 2.0), rtol=0, atol=0)


def test_inside_the_block_the_policy_is_the_one_into_which_the_average_was_loaded(trained, make_policy):
    training = trained[0]
    policy = training.policy
    other = make_policy(steps=3, guidance=training.config.guidance, seed=training.config.seed)
    for name, parameter in other.trainable.parameters.items():
        parameter.data.copy_(policy.average.weights[name])
    live = drawn(policy)
    with policy.averaged():
        averaged = drawn(policy)
    assert torch.equal(averaged, drawn(other)) and not torch.equal(averaged, live)
    assert torch.equal(drawn(policy), live)


@torch.no_grad()
def drawn(policy) -> torch.Tensor:
    prompts = ["a red circle", "two blue squares"]
    return denoise(policy, prompts, draw_noise(policy, [(1, "x"), (2, "x")]))[0]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("block", ["averaged", "evaluating"])
def test_the_weights_are_back_however_the_block_ends(trained, block, error):
    policy = trained[0].policy
    parameters, before = policy.parameters, weights_of(policy)
    with pytest.raises(error), getattr(policy, block)():
        assert all(torch.equal(weight, policy.average.weights[name]) for name, weight in weights_of(policy).items())
        raise error
    after = weights_of(policy)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(a is b and a.requires_grad for a, b in zip(policy.parameters, parameters, strict=True))


def test_blocks_may_lie_in_one_another(trained):
    policy = trained[0].policy
    before = weights_of(policy)
    with policy.averaged():
        with policy.evaluating():
            pass
        assert all(torch.equal(weight, policy.average.weights[name]) for name, weight in weights_of(policy).items())
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(policy).items())


def test_what_was_loaded_before_the_first_update_is_what_is_drawn(make_policy):
    """As for a saved LoRA, which is an average already."""
    policy = make_policy(ema=0.9, trained=True)
    live = drawn(policy)
    with policy.evaluating():
        assert torch.equal(drawn(policy), live)


def test_grids_and_saved_loras_are_of_the_average(make_policy, tmp_path):
    plain, average = (new_run(tmp_path / str(rate), epochs=2, policy={"ema": rate, "lr": 0.01}) for rate in (0.0, 0.9))
    trainings = [toy_training(run, make_policy) for run in (plain, average)]
    metrics = [list(training.epochs()) for training in trainings]
    policies = [training.policy for training in trainings]
    assert same(*[[p.detach() for p in policy.parameters] for policy in policies]), "training does not know it"
    rewards = [[line["reward/brightness/mean"] for line in lines] for lines in metrics]
    assert rewards[0] == rewards[1], "training images are of the LoRA itself"
    assert plain.sample_grid(0).read_bytes() == average.sample_grid(0).read_bytes()
    assert plain.sample_grid(2).read_bytes() != average.sample_grid(2).read_bytes()
    for path in (average.latest_lora, average.lora(2)):
        saved, expected = load_file(path), exported_average(policies[1], tmp_path / "expected.safetensors")
        assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)
    live = load_file(plain.latest_lora)
    assert not all(torch.equal(live[name], expected[name]) for name in live)


def exported_average(policy, path) -> dict[str, torch.Tensor]:
    """What a policy exports into whose LoRA the average was copied."""
    for name, parameter in policy.trainable.parameters.items():
        parameter.data.copy_(policy.average.weights[name])
    policy.trainable.export(path, {})
    return load_file(path)


def test_without_an_average_nothing_is_kept(make_policy, tmp_path):
    run = new_run(tmp_path / "run", epochs=1)
    training = toy_training(run, make_policy)
    list(training.epochs())
    assert training.policy.average is None
    assert not list(run.checkpoints.rglob("policy_average*"))


def test_a_reset_neuron_begins_its_average_anew(make_policy, tmp_path):
    """Its old self and its new one are two neurons, and their mean is neither."""
    settings = {"neurons": {"every": 2, "policy_reset": "dormant", "policy_threshold": 0.9}, "policy": {"ema": 0.9}}
    training = toy_training(new_run(tmp_path / "run", epochs=2, **settings), make_policy)
    before = {}
    method, of_policy = training.method, training.method.neurons.of_policy

    def seen(batch):
        before.update(weights=weights_of(training.policy), average=clones(training.policy.average.weights))
        return of_policy(batch)

    method.neurons.of_policy = seen
    metrics = list(training.epochs())[-1]
    assert metrics["policy_neurons/reset_count"] > 0
    after, average, reset = weights_of(training.policy), training.policy.average.weights, 0
    for name, weight in after.items():
        changed = weight != before["weights"][name]
        reset += changed.sum().item()
        assert torch.equal(average[name][changed], weight[changed])
        assert torch.equal(average[name][~changed & (weight != 0)], before["average"][name][~changed & (weight != 0)])
    assert reset > 0
