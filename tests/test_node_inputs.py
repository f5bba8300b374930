"""What a Train node's inputs become: a configuration, prompts, or one sentence."""

import pytest

from comfy_tdpo.methods import ALGORITHMS
from comfy_tdpo.nodes.runs.reward_choice import RewardChoice
from comfy_tdpo.nodes.runs.settings import Wanted
from comfy_tdpo.nodes.runs.used import used_by
from comfy_tdpo.prompts import load_prompts
from comfy_tdpo.trainer.config import make_config

AESTHETIC = RewardChoice({"shapes-aesthetic": 1.0})
PAPER = {"critic": {"activation": "identity", "lr": 1e-4, "clip_range": 0.2}}
PAPER |= {"neurons": {"reset": "active", "every": 10, "threshold": 0.0, "data": "epoch"}}


def wanted(**changes) -> Wanted:
    return Wanted(**({"model": "comfyui:Test:1", "preset": "shapes", "reward": AESTHETIC} | changes))


def test_nothing_asked_for_is_the_preset():
    shapes = make_config("shapes", None, {"eval_rewards": [], "model": "comfyui:Test:1"})
    assert wanted().config() == shapes
    other = {"eval_rewards": [], "model": "x", "rewards": AESTHETIC.weights, "overoptimisation": {"reward": None}}
    assert wanted(model="x", preset="sd15").config() == make_config("sd15", None, other)
    for preset in ("sdxl", "sd3", "flux-dev", "flux-schnell", "z-image", "z-image-turbo"):
        assert wanted(model="x", preset=preset).config() == make_config(preset, None, other)


def test_what_is_watched_in_another_model_than_shapes_is_wired():
    held_out = RewardChoice({"imagereward": 1.0, "pickscore": 1.0})
    config = wanted(model="x", preset="sd15", held_out=held_out).config()
    assert (config.overoptimisation.reward, config.guards) == ("imagereward", ["clipscore"])
    assert wanted(held_out=RewardChoice({"shapes-gold": 1.0})).config().overoptimisation.reward == "shapes-match"


def test_what_is_asked_for_lies_over_the_preset():
    numbers = {"epochs": 3, "samples_per_epoch": 10, "steps": 0, "guidance": 2.5, "rank": 8, "learning_rate": 1e-3}
    held_out = RewardChoice({"shapes-judge": 3.0, "shapes-gold": 1.0})
    settings = "micro_batch = 5\npolicy.alpha = 2.0\n[output]\ngrid_images = 4"
    config = wanted(numbers=numbers, seed=9, held_out=held_out, settings=settings, prompt_set="shapes-unseen").config()
    assert (config.epochs, config.samples_per_epoch, config.samples_per_update, config.steps) == (3, 10, 5, 10)
    assert (config.guidance, config.policy.rank, config.policy.lr, config.policy.alpha) == (2.5, 8, 1e-3, 2.0)
    assert (config.seed, config.micro_batch, config.output.grid_images) == (9, 5, 4)
    assert config.eval_rewards == ["shapes-judge", "shapes-gold"] and config.prompts == "shapes-unseen"


def test_images_that_are_not_square_are_asked_for_in_the_settings():
    want = wanted(numbers={"resolution": 0}, settings='resolution = "64x96"')
    assert want.config().resolution == "64x96"


def test_rewards_in_a_chain_add_up():
    chain = RewardChoice({}).with_reward("shapes-judge", 0.5).with_reward("shapes-aesthetic", 1.0)
    assert wanted(reward=chain.with_reward("shapes-judge", 0.25)).config().rewards == {
        "shapes-judge": 0.75,
        "shapes-aesthetic": 1.0,
    }


def test_files_of_rewards_come_along():
    chain = RewardChoice({}).with_reward("hpsv2", 1.0, "/a/HPS.pt").with_reward("shapes-judge", 1.0)
    held_out = RewardChoice({}).with_reward("imagereward", 1.0, "/a/IR.pt")
    weights = wanted(reward=chain, held_out=held_out).config().reward_weights
    assert weights == {"hpsv2": "/a/HPS.pt", "imagereward": "/a/IR.pt"}


def test_a_reward_has_one_file():
    hps = RewardChoice({}).with_reward("hpsv2", 1.0, "/a/HPS.pt")
    assert hps.with_reward("hpsv2", 1.0, "/a/HPS.pt").weights == {"hpsv2": 2.0}
    other = RewardChoice({}).with_reward("hpsv2", 1.0, "/b/HPS.pt")
    with pytest.raises(ValueError, match="got /a/HPS.pt and /b/HPS.pt as the weights of reward 'hpsv2'; choose one"):
        hps.with_reward("hpsv2", 1.0, "/b/HPS.pt")
    with pytest.raises(ValueError, match="choose one"):
        wanted(reward=hps.with_reward("shapes-judge", 1.0), held_out=other).config()


@pytest.mark.parametrize(("samples", "update"), [(4, 2), (5, 5), (96, 48)])
def test_an_epoch_is_two_updates_where_it_can_be(samples, update):
    assert wanted(numbers={"samples_per_epoch": samples}).config().samples_per_update == update


def test_the_critic_is_the_one_wired_in():
    critic = {"critic": PAPER["critic"] | {"lr": 5e-3}, "neurons": PAPER["neurons"] | {"every": 2}}
    config = wanted(critic=critic, algorithm="tdpo-r").config()
    assert (config.critic.lr, config.neurons.every, config.critic.image_size) == (5e-3, 2, 32)
    assert wanted(critic=critic, algorithm="tdpo").config().neurons.reset == "none"


@pytest.mark.parametrize("preset", ["shapes", "sd15"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_critic_and_its_resets_count_where_the_node_says_so(algorithm, preset):
    def config(section: str, **changes):
        critic = PAPER | {section: PAPER[section] | changes}
        return wanted(critic=critic, algorithm=algorithm, preset=preset, model="x").config()

    if algorithm not in used_by()["critic"]:
        with pytest.raises(ValueError, match=f"got a critic for {algorithm}, which has none; disconnect the critic"):
            config("critic")
        return
    plain = config("critic")
    assert config("critic", lr=5e-3) != plain
    for changes in ({"reset": "dormant"}, {"every": 3}, {"threshold": 0.5}, {"data": "batch"}):
        assert (config("neurons", **changes) != plain) == (algorithm in used_by()["resets"]), changes


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_setting_that_the_node_says_is_for_other_algorithms_is_refused(algorithm):
    """Whatever its value, which may itself be refused where the algorithm has the setting."""
    for name, users in used_by()["settings"].items():
        section, said = name.partition(".")[0], ""
        try:
            wanted(algorithm=algorithm, settings=f"{name} = 1").config()
        except ValueError as error:
            said = str(error)
        refused = any(f"{part} is for other algorithms; remove it" in said for part in (name, section))
        assert refused == (algorithm not in users), name


def test_a_setting_of_a_critic_has_an_effect_where_the_node_does_not_say_that_it_has_none():
    """Those without an effect are not refused, since a setting may turn the critic on: then it may be wired, too."""
    of_critic = {name for name in used_by()["settings"] if name.startswith("critic.")}
    assert used_by()["effects"].keys() == of_critic - {"critic.enabled"}
    for algorithm in used_by()["settings"]["critic.lr"]:
        plain = wanted(algorithm=algorithm, settings="critic.lr = 0.5").config()
        assert plain.critic.enabled == (algorithm in used_by()["effects"]["critic.lr"])
        settings = "critic.enabled = true\nadvantage_clip = 'none'"
        assert wanted(algorithm=algorithm, settings=settings, critic=PAPER).config().critic.clip_range == 0.2


def test_resets_that_a_setting_turns_on_are_those_of_the_critic_on_the_wire():
    critic = PAPER | {"neurons": PAPER["neurons"] | {"reset": "dormant", "every": 3}}
    config = wanted(algorithm="tdpo", settings='neurons.reset = "active"', critic=critic).config()
    assert (config.neurons.reset, config.neurons.every) == ("active", 3)


def test_prompts_are_the_text_or_the_set():
    assert wanted(text=" a red circle \n\n a blue square\n").prompts().words == ["a red circle", "a blue square"]
    assert wanted(text="  \n ", prompt_set="shapes-unseen").prompts().words == load_prompts("shapes-unseen")
    assert wanted().prompts().words == load_prompts("shapes")
    assert wanted(preset="sd15").prompts().words == load_prompts("simple-animals")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "ddpo-2", "critic": PAPER}, "got a critic for ddpo-2, which has none; disconnect"),
        ({"numbers": {"samples_per_epoch": 1}}, "samples_per_epoch is 1; at least 2"),
        ({"reward": RewardChoice({})}, "rewards: got {}"),
        ({"reward": RewardChoice({"shapes-gold": 0.0})}, "the weights of all rewards are 0"),
        ({"reward": RewardChoice({"shapes-gold": float("nan")})}, "rewards.shapes-gold: got nan"),
        ({"settings": "epochs ="}, "got settings that are not TOML .*expected lines such as"),
        ({"settings": "model = 'x'"}, "got 'model' among the settings; the node has an input or a wire for it"),
        ({"settings": "epochs = 3"}, "got 'epochs' among the settings; the node has an input or a wire for it"),
        (
            {"settings": "resolution = '64x96'", "numbers": {"resolution": 32}},
            "got 'resolution' among the settings; the node has an input for it: use that, or set it to 0",
        ),
        ({"settings": "a = " + "[" * 5000}, "got settings that are not TOML .*expected lines such as"),
        ({"settings": "a = 1" + "0" * 6000}, "got settings that are not TOML"),
        ({"settings": "prediction_type = 'sample'"}, "got 'prediction_type' among the settings"),
        ({"settings": "policy.what = 1"}, "unknown setting 'policy.what'"),
        ({"settings": "policy = 1"}, "policy: got 1"),
        ({"settings": "guards = ['shapes-gold']"}, "guards lists 'shapes-gold', which may only evaluate"),
        ({"settings": "reward_weights = {}"}, "got 'reward_weights' among the settings"),
        ({"prompt_set": "/etc/hostname"}, "got prompt_set '/etc/hostname'; expected one of auto, complex"),
    ],
)
def test_what_cannot_be_is_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        want = wanted(**changes)
        want.config()
        want.prompts()
    assert "\n" not in str(error.value)


def test_an_unknown_reward_is_refused_where_it_is_chosen():
    with pytest.raises(ValueError, match="got reward 'nice'; expected one of"):
        RewardChoice({}).with_reward("nice", 1.0)
