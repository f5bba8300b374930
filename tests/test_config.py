"""The configuration's layers, the values of Table 1, and the messages about wrong settings."""

import json
from dataclasses import replace

import pytest
import tomli_w
import torch
from safetensors.torch import save_file

from comfy_tdpo.methods import ALGORITHMS
from comfy_tdpo.methods.critic import ACTIVATIONS
from comfy_tdpo.methods.neurons import NEURON_ACTIVATIONS, reset_masks
from comfy_tdpo.models.kind import SD, SD3, SHAPES, XL
from comfy_tdpo.models.lora import TARGETS
from comfy_tdpo.process import PROCESSES
from comfy_tdpo.prompts import load_prompts
from comfy_tdpo.trainer.config import leaf_fields, make_config, plain_values, presets, validate
from comfy_tdpo.trainer.config.changes import differences
from comfy_tdpo.trainer.config.layers import merge
from comfy_tdpo.trainer.config.schema import algorithms_using, algorithms_with
from comfy_tdpo.trainer.run import RunFolder
from comfy_tdpo.trainer.terminal.arguments import choices

OF_FLOWS = ("sd3", "flux-dev", "flux-schnell", "z-image", "z-image-turbo")  # presets of flow matching


def test_the_defaults_are_the_papers_tdpo_r():
    config = validate({})
    assert (config.samples_per_epoch, config.samples_per_update, config.steps, config.guidance) == (256, 128, 50, 5.0)
    assert (config.policy.lr, config.policy.clip_range, config.policy.rank) == (1e-4, 1e-4, 4)
    assert (config.critic.lr, config.critic.clip_range, config.critic.activation) == (1e-4, 0.2, "identity")
    assert (config.neurons.reset, config.neurons.every, config.neurons.threshold) == ("active", 10, 0.0)
    assert (config.moments.buffer_size, config.moments.min_count, config.seed, config.gamma) == (32, 16, 42, 1.0)


# Table 1: (policy lr, gradient updates grouped by, critic, reset)
TABLE_1 = {
    "tdpo-r": (1e-4, "timestep", True, "active"),
    "tdpo": (1e-4, "timestep", True, "none"),
    "ddpo-100": (1e-4, "timestep", False, "none"),
    "ddpo-2": (3e-4, "trajectory", False, "none"),
}


def test_an_algorithm_that_turns_a_section_off_does_not_use_it_whatever_else_it_sets(monkeypatch):
    other = replace(ALGORITHMS["ddpo-2"], values={"critic": {"enabled": False, "lr": 1.0}, "updates": "trajectory"})
    monkeypatch.setitem(ALGORITHMS, "other", other)
    assert "other" in algorithms_with("critic.lr") and "other" not in algorithms_using("critic.lr")
    assert "other" in algorithms_using("updates") and "other" in algorithms_using("policy.lr")


@pytest.mark.parametrize("algorithm", TABLE_1)
def test_an_algorithm_sets_its_row_of_table_1(algorithm):
    config = make_config("sd14-aesthetic", overrides={"algorithm": algorithm})
    found = (config.policy.lr, config.updates, config.critic.enabled, config.neurons.reset)
    assert found == TABLE_1[algorithm]
    assert config.advantage_clip == (None if config.critic.enabled else 5.0)


# Direct gradients, as their authors trained Stable Diffusion: (policy lr, rank, weight decay, gradient norm,
# guidance, steps, samples per update, updates in all)
DIRECT = {
    "alignprop": (1e-3, 4, 1e-4, 1.0, 5.0, 50, 128, 20),
    "draft": (4e-4, 8, 0.1, 1.0, 7.5, 50, 4, 2000),
    "refl": (1e-5, 4, 1e-2, 1.0, 1.0, 40, 64, 100),
}


@pytest.mark.parametrize("algorithm", DIRECT)
def test_a_direct_gradient_has_its_authors_values(algorithm):
    config = make_config("sd14-aesthetic", overrides={"algorithm": algorithm})
    policy, updates = config.policy, config.epochs * config.samples_per_epoch // config.samples_per_update
    found = (policy.lr, policy.rank, policy.weight_decay, policy.max_grad_norm)
    assert (*found, config.guidance, config.steps, config.samples_per_update, updates) == DIRECT[algorithm]
    assert (config.loss_weight, config.recompute.steps) == {
        "alignprop": (0.01, True),
        "draft": (1.0, True),
        "refl": (1e-3, False),
    }[algorithm]
    assert not (config.recompute.decoder or config.recompute.reward)
    if algorithm == "alignprop":
        assert (config.reward_target, config.truncation.first) == (10.0, "normal")
        assert (50 * config.truncation.mean, 50 * config.truncation.std) == (42, 5)
    assert config.guards == [] and make_config("shapes", overrides={"algorithm": algorithm}).guards == []


def test_later_layers_win(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("epochs = 7\nsteps = 9\n[policy]\nlr = 5e-4\n")
    config = make_config("shapes", file, {"steps": 11})
    preset = make_config("shapes")
    assert (config.epochs, config.steps, config.policy.lr) == (7, 11, 5e-4)
    assert config.policy.rank == preset.policy.rank  # a table of the file does not wipe the preset's


def test_the_recipe_is_that_of_the_presets_that_are_no_papers():
    """And of no other algorithm: the paper's, on the same presets, know no guard."""
    guards = {"shapes": "shapes-alignment"} | dict.fromkeys(
        ("sd15", "sdxl", "sd-turbo", "sdxl-turbo", *OF_FLOWS), "clipscore"
    )
    for preset, guard in guards.items():
        config = make_config(preset)
        assert (config.algorithm, config.guards, config.guard_credit) == ("ddpo-g", [guard], True)
        assert not config.critic.enabled
        seeing = make_config(preset, overrides={"algorithm": "tdpo-g"})
        assert (seeing.guards, seeing.guard_credit, seeing.guard_penalty) == ([guard], True, config.guard_penalty)
        assert (seeing.critic.reads, seeing.critic.prompt, seeing.critic.step) == ("clean", True, True)
        paper = make_config(preset, overrides={"algorithm": "tdpo-r"})
        assert (paper.guards, paper.critic.architecture) == ([], "authors")
        assert paper.critic.reads == ("clean" if preset in OF_FLOWS else "noisy")
    assert make_config("sd14-aesthetic").algorithm == "tdpo-r"


@pytest.mark.parametrize("role", ["rewards", "eval_rewards", "guards"])
def test_a_role_that_is_given_takes_a_reward_from_the_presets(role):
    def config(name: str):
        return make_config("shapes", overrides={role: {name: 1.0} if role == "rewards" else [name]})

    guarded, watched = config("shapes-alignment"), config("shapes-match")
    assert guarded.guards == (["shapes-alignment"] if role == "guards" else [])
    assert guarded.overoptimisation.reward == "shapes-match"
    assert watched.guards == (["shapes-match"] if role == "guards" else ["shapes-alignment"])
    assert watched.overoptimisation.reward == ("shapes-match" if role == "eval_rewards" else None)


def test_another_model_than_shapes_begins_from_its_own_preset(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('model = "mine"\n')
    for config in (make_config(overrides={"model": "mine"}), make_config(file=file)):
        assert config.model == "mine"
        assert (config.policy.lr, config.policy.rank, config.steps, config.resolution) == (1e-4, 16, 20, 512)
    assert make_config("shapes", overrides={"model": "mine"}).resolution == 64
    assert make_config(file=file, overrides={"model": "shapes"}) == make_config()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_presets_of_distilled_models_draw_in_few_steps_without_guidance(algorithm):
    for preset in ("sd-turbo", "sdxl-turbo"):
        config = make_config(preset, overrides={"algorithm": algorithm})
        assert (config.process, config.steps, config.guidance, config.eval_guidance) == ("few-steps", 4, 1.0, None)


@pytest.mark.parametrize(
    ("preset", "norm"),
    [("sd15", 2.5e-3), ("sdxl", 1.25e-3), ("sdxl-turbo", 2.5e-3), *((preset, 1.25e-3) for preset in OF_FLOWS)],
)
def test_gradients_are_clipped_by_the_size_of_the_latent(preset, norm):
    """0.02 for Shapes' 256 elements, and less with the square root of their number."""
    config = make_config(preset)
    channels = 16 if preset in OF_FLOWS else 4
    assert config.policy.max_grad_norm == norm == 0.02 * (256 / (channels * (config.resolution // 8) ** 2)) ** 0.5


def test_a_model_of_xl_begins_from_its_own_preset(tmp_path):
    names = {"file.safetensors": "conditioner.embedders.1.model.ln_final.bias", "sd.safetensors": "cond_stage_model.x"}
    for name, weight in names.items():
        save_file({weight: torch.zeros(1)}, tmp_path / name)
    for name, parts in {"folder": {"unet": [], "text_encoder_2": []}, "flux": {"text_encoder_2": []}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(json.dumps(parts))
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "empty").mkdir()
    for name in ("file.safetensors", "folder"):
        assert make_config(overrides={"model": str(tmp_path / name)}).resolution == 1024
    for name in ("sd.safetensors", "flux", "broken.safetensors", "empty", "nothing"):
        assert make_config(overrides={"model": str(tmp_path / name)}) == make_config(
            "sd15", overrides={"model": str(tmp_path / name)}
        )


def test_every_kind_of_model_has_a_preset_of_its_name():
    assert {SHAPES, SD, XL, SD3} <= set(presets())


def test_a_hub_id_begins_from_the_preset_that_names_it():
    assert make_config(overrides={"model": "stabilityai/sdxl-turbo"}) == make_config("sdxl-turbo")
    assert make_config(overrides={"model": "stabilityai/sd-turbo"}) == make_config("sd-turbo")
    assert make_config(overrides={"model": "black-forest-labs/FLUX.1-schnell"}) == make_config("flux-schnell")
    assert make_config(overrides={"model": make_config("sd14-hpsv2").model}).guards == ["clipscore"]


def test_an_algorithm_over_a_file_of_another_is_refused(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('algorithm = "tdpo"\n')
    assert make_config(file=file, overrides={"algorithm": "tdpo"}).neurons.reset == "none"
    with pytest.raises(ValueError, match="got algorithm 'ddpo-2' with a file made for 'tdpo'"):
        make_config(file=file, overrides={"algorithm": "ddpo-2"})


def test_none_unsets(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('eval_rewards = ["none"]\n[critic]\nimage_size = "none"\n')
    for config in (make_config(file=file), make_config(overrides={"eval_rewards": "none"})):
        assert config.eval_rewards == []
    assert make_config(file=file).critic.image_size is None
    assert make_config(overrides={"neurons": {"reset": "none"}}).neurons.reset == "none"


@pytest.mark.parametrize(
    ("given", "resolution"),
    [(96, 96), ("96", 96), (96.0, 96), ("96x96", 96), ("832x1216", "832x1216"), (" 64 X 128", "64x128")],
)
def test_a_resolution_is_a_side_or_two(given, resolution):
    config = make_config(overrides={"resolution": given})
    assert config.resolution == resolution and type(config.resolution) is type(resolution)


def test_rewards_are_replaced_and_not_mixed_with_the_presets():
    config = make_config(overrides={"rewards": {"shapes-alignment": 2.0}})
    assert config.rewards == {"shapes-alignment": 2.0}


@pytest.mark.parametrize("preset", presets())
def test_every_preset_survives_a_round_trip_through_plain_values(preset):
    config = make_config(preset)
    assert validate(plain_values(config)) == config


def test_a_setting_offers_what_the_library_has():
    offered = {name: choices(name, info) for name, info in leaf_fields()}
    assert set(offered["policy.targets"]) == TARGETS.keys()
    assert set(offered["critic.activation"]) == ACTIVATIONS.keys()
    assert set(offered["neurons.activation"]) == NEURON_ACTIVATIONS.keys()
    for kind in (*offered["neurons.reset"], *offered["neurons.policy_reset"]):
        assert reset_masks({}, kind) == {}
    assert set(offered["algorithm"]) == ALGORITHMS.keys()
    assert set(offered["process"]) == PROCESSES.keys()


def test_every_setting_says_what_it_means():
    assert [name for name, info in leaf_fields() if not info.description] == []


WRONG = [
    ({"eval_rewards": 5}, "eval_rewards: got 5; expected a list of names"),
    ({"algorithm": ["tdpo"]}, "got algorithm ['tdpo']; expected one of ddpo-g, tdpo-g, tdpo-r"),
    ({"kl": {"target": 5.0}}, "kl.target adapts kl.coefficient, which is 0"),
    ({"kl": {"coefficient": 0.1, "target": 5.0, "horizon": 10}}, "kl.horizon 10 is less than"),
    ({"algorithm": "tdpo-g", "advantage_clip": 5.0}, "advantage_clip is for algorithms without a critic"),
    ({"rewards": {"shapes-judge": float("nan")}}, "rewards.shapes-judge: got nan"),
    ({"policy": {"learning_rate": 1}}, "unknown setting 'policy.learning_rate'"),
    ({"polcy": {}}, "unknown setting 'polcy'"),
    ({"epochs": True}, "epochs: got True; true and false are for switches"),
    ({"policy": {"lr": True}}, "policy.lr: got True; true and false are for switches"),
    ({"algorithm": "ppo"}, "got algorithm 'ppo'; expected one of ddpo-g, tdpo-g, tdpo-r"),
    ({"algorithm": "draft", "last_steps": 51}, "last_steps is 51, but steps is 10"),
    ({"algorithm": "draft", "last_steps": 2, "renoised": 2}, "renoised 2 repeats the last step alone"),
    ({"algorithm": "alignprop", "truncation": {"first": "fixed", "last_steps": 51}}, "truncation.last_steps is 51"),
    ({"algorithm": "alignprop", "steps": 1}, "truncation.first normal leaves the first step out"),
    ({"algorithm": "refl", "reward_cap": "high"}, "reward_cap: got 'high'; expected a number, auto or none"),
    (
        {"algorithm": "refl", "critic": {"lr": 1e-3}},
        "critic is for other algorithms; remove it, or choose tdpo-g",
    ),
    ({"algorithm": "draft", "policy": {"clip_range": 1e-3}}, "policy.clip_range is for other algorithms; remove it"),
    ({"last_steps": 2}, "last_steps is for other algorithms; remove it, or choose draft"),
    ({"algorithm": "refl", "guards": ["shapes-match"]}, "guards lists shapes-match, but this algorithm uses no guards"),
    ({"algorithm": "alignprop", "rewards": {"shapes-gold": 1.0}}, "got reward 'shapes-gold', which has no gradient"),
    (
        {"algorithm": "draft", "rewards": {"shapes-aesthetic": 1.0, "jpeg-compressibility": 0.5}},
        "got reward 'jpeg-compressibility', which has no gradient, for algorithm draft",
    ),
    ({"rewards": {"beauty": 1.0}}, "got reward 'beauty'; expected one of"),
    ({"rewards": {"shapes-judge": 0.0}}, "weights of all rewards are 0"),
    ({"epochs": 0}, "epochs: got 0"),
    ({"epochs": 10**12}, "epochs: got 1000000000000"),
    ({"epochs": 2.5}, "epochs: got 2.5"),
    ({"policy": {"lr": float("nan")}}, "policy.lr: got nan"),
    ({"policy": {"lr": -1}}, "policy.lr: got -1"),
    ({"guidance": 0.5}, "guidance: got 0.5"),
    ({"samples_per_epoch": 10, "samples_per_update": 4}, "not a multiple"),
    ({"moments": {"min_count": 40}}, "moments.min_count"),
    ({"algorithm": "ddpo-2", "neurons": {"reset": "active"}}, "needs a critic"),
    ({"resolution": 4}, "resolution: got 4; expected a whole number from 8 to 8192, or WIDTHxHEIGHT, such as 832x1216"),
    ({"resolution": 64.5}, "resolution: got 64.5; expected a whole number"),
    ({"resolution": "64x"}, "resolution: got '64x'; expected a whole number"),
    ({"resolution": "64x9000"}, "resolution: got '64x9000'; expected a whole number"),
    ({"steps": 1001}, "steps: got 1001; expected a whole number from 1 to 1000"),
    ({"policy": {"lr": "0,1"}}, "policy.lr: got '0,1'; expected a number above 0 and at most 1; write a decimal point"),
    ({"policy": {"alpha": "much"}}, "policy.alpha: got 'much'; expected a number above 0 and below 1e+06 or \"none\""),
    ({"critic": {"beta1": 1}}, "critic.beta1: got 1; expected a number of at least 0 and below 1"),
    ({"critic": {"enabled": "perhaps"}}, "critic.enabled: got 'perhaps'; expected true or false"),
    ({"updates": "step"}, "updates: got 'step'; expected one of timestep, trajectory"),
    ({"prediction_type": "v"}, 'expected one of epsilon, v_prediction, sample or "none"'),
    ({"epochs": 1e-4}, "epochs: got 0.0001; expected a whole number from 1 to 9999"),
    ({"model": ""}, "model: got ''; expected text that is not empty"),
    ({"rewards": {}}, "rewards: got {}; expected a table, { NAME = VALUE } with at least one entry"),
    ({"rewards": {"shapes-judge": "much"}}, "rewards.shapes-judge: got 'much'; expected a number from"),
    ({"rewards": ["shapes-judge", "shapes-judge"]}, "got reward 'shapes-judge' twice"),
    ({"policy": 5}, "policy: got 5; expected a section, [policy], with its own settings"),
    ({"policy": {"lr": {"x": 1}}}, "policy.lr: got {'x': 1}; expected a number above 0 and at most 1"),
    ({"lr": 1}, "unknown setting 'lr'; did you mean policy.lr or critic.lr?"),
    ({"learning_rate": 1}, "unknown setting 'learning_rate'; did you mean policy.lr or critic.lr?"),
    ({"epoch": 1}, "unknown setting 'epoch'; did you mean epochs?"),
    ({"policy": {"resolution": 64}}, "unknown setting 'policy.resolution'; did you mean resolution?"),
    ({"critic": {"activaton": "relu"}}, "unknown setting 'critic.activaton'; did you mean critic.activation?"),
    ({"kl": {"b": 1}}, "unknown setting 'kl.b'; [kl] has coefficient, form, weighting, target, horizon"),
    ({"polcy": {"lr": 1}}, "unknown setting 'polcy'; did you mean [policy]?"),
    ({"preset": "shapes"}, "unknown setting 'preset'; it is a command-line option, --preset"),
    ({"zz": 1, "yy": 1, "xx": 1, "ww": 1, "vv": 1}, "and 2 more like these"),
    ({"model": "D:\new\test"}, r"model: got 'D:\new\test', which contains a line break; expected text on one line"),
    ({"reward_weights": {"aesthetic": "D:\test"}}, "reward_weights.aesthetic: got"),
    ({"model": "caf\udce9"}, r"got the path 'caf\udce9', which is not UTF-8"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG)
def test_a_wrong_value_is_named_in_one_line(overrides, message):
    with pytest.raises(ValueError) as error:
        make_config(overrides=overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ('"hpsv2.1"', {"hpsv2.1": 1.0}),
        ('"shapes-gold=2, shapes-judge"', {"shapes-gold": 2.0, "shapes-judge": 1.0}),
        ('["shapes-gold", "shapes-judge=0.5"]', {"shapes-gold": 1.0, "shapes-judge": 0.5}),
    ],
)
def test_rewards_may_be_names(rewards, expected, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(f'rewards = {rewards}\neval_rewards = "shapes-alignment, aesthetic"\n')
    config = make_config(file=file)
    assert (config.rewards, config.eval_rewards) == (expected, ["shapes-alignment", "aesthetic"])
    file.write_text(f"rewards = {rewards}\n")  # what it trains on is not watched, here too
    assert make_config(file=file).eval_rewards == [n for n in ("shapes-judge", "shapes-gold") if n not in expected]


NO_TOML = [
    (
        r'model = "C:\Users\me\sd15.safetensors"',
        "a backslash in double quotes starts an escape: write a path in single",
    ),
    (r'model = "D:\models\x.safetensors"', "a backslash in double quotes starts an escape"),
    ("rewards = { hpsv2.1 = 1.0 }", 'a name with a dot needs quotes: "hpsv2.1" = ...'),
    ("[rewards]\nhpsv2.1 = 1.0", 'a name with a dot needs quotes: "hpsv2.1" = ...'),
    ("reward_weights = { hpsv2.1 = 'x' }", 'a name with a dot needs quotes: "hpsv2.1" = ...'),
    ("epochs = 5\n\nepochs = 6", "line 3, 'epochs = 6': this is defined twice: keep one of them"),
    ("[kl]\n[policy]\n[kl]", "line 3, '[kl]': this is defined twice"),
    ("model = shapes", "line 1, 'model = shapes': text needs quotes"),
    ("model = ~/x", "text needs quotes"),
    ('model = "shapes\n', "its quotes are not closed"),
    ("model = 'shapes", "its quotes are not closed"),
    ("model = \u201cshapes\u201d", "typographic quotes"),
    ("epochs\u00a0= 3", "an unusual space or an invisible character"),
    ("gamma = .5", "a number needs a digit on both sides of its decimal point"),
    ("gamma = 0,5", "write a decimal point, not a comma"),
    ("[critic]\nenabled = True", "line 2, 'enabled = True': write true or false"),
    ("steps =", "a value is missing"),
    ("steps = None # all", "a value is missing"),
    ("// mine", "comments begin with #"),
    ("epochs 5", "expected KEY = VALUE"),
    ("rewards = { aesthetic: 1 }", "write = between a name and its value"),
    ("rewards = { aesthetic = 1, }", "remove the comma"),
    ("rewards = {\n aesthetic = 1\n}", "braces must close on the same line"),
    ('{"epochs": 5}', "it is JSON; expected TOML"),
    ("epochs: 5\npolicy:\n  lr: 1e-4\n", "this looks like YAML"),
    ("policy = " + "[" * 5000, "nested too deeply"),
    ("\x89PNG\r\n", "is a PNG image"),
]


@pytest.mark.parametrize(("text", "message"), NO_TOML)
def test_a_file_that_is_no_configuration_says_what_to_do(text, message, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_bytes(text.encode("latin-1" if "PNG" in text else "utf-8"))
    with pytest.raises(ValueError) as error:
        make_config(file=file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unreadable_file_is_named(tmp_path):
    file = tmp_path / "broken.toml"
    file.write_text("epochs = = 3")
    with pytest.raises(ValueError, match="broken.toml"):
        make_config(file=file)
    with pytest.raises(ValueError, match="missing.toml"):
        make_config(file=tmp_path / "missing.toml")


def test_the_configuration_is_frozen():
    with pytest.raises(Exception, match="frozen"):
        validate({}).epochs = 3


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_file_of_another_system_is_read(encoding, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_bytes('epochs = 7\r\nprompts = "simple-animals"\r\n'.encode(encoding))
    assert (make_config(file=file).epochs, make_config(file=file).prompts) == (7, "simple-animals")
    file.write_bytes(b"epochs = 7\rsteps = 9\r")
    assert (make_config(file=file).epochs, make_config(file=file).steps) == (7, 9)


def test_a_run_whose_configuration_an_editor_has_marked_is_read(tmp_path):
    run = RunFolder(tmp_path / "run").create(make_config())
    for name in ("config.toml", "prompts.txt"):
        file = run.path / name
        file.write_bytes(file.read_text().encode("utf-8-sig"))
    assert run.config == make_config()
    assert run.prompts(run.config) == load_prompts("shapes")


def test_a_run_keeps_prompts_word_for_word(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('["#1 fox", "a fox, red\\nand small"]')
    config = make_config(overrides={"prompts": str(file)})
    assert RunFolder(tmp_path / "run").create(config).prompts(config) == ["#1 fox", "a fox, red and small"]
    host = RunFolder(tmp_path / "host")  # as ComfyUI's graph puts its own prompts in place
    host.path.mkdir()
    (host.path / "prompts.txt").write_text("#1 fox\na (red:1.2) fox")
    config = make_config(overrides={"prompts": str(host.path / "prompts.txt")})
    assert host.create(config).prompts(config) == ["#1 fox", "a (red:1.2) fox"]


# --- all weights instead of a LoRA


def test_settings_of_a_lora_are_refused_if_all_weights_are_trained(tmp_path):
    for name, value in (("rank", 3), ("alpha", 3), ("targets", "attention")):
        with pytest.raises(
            ValueError, match=rf"policy.{name} {value} with policy.train full, .*; remove policy.{name}"
        ):
            make_config(overrides={"policy": {"train": "full", name: value}})
    config = make_config(overrides={"policy": {"train": "full"}, "algorithm": "grpo"})
    (tmp_path / "printed.toml").write_text(tomli_w.dumps(plain_values(config)))
    assert make_config(file=tmp_path / "printed.toml") == config, "what --print-config writes is no one's wish"


def test_a_preset_has_a_learning_rate_of_its_own_for_all_weights():
    for preset in presets():
        lora = make_config(preset)
        full = make_config(preset, overrides={"policy": {"train": "full"}})
        assert 0 < full.policy.lr < lora.policy.lr, preset
        named = make_config(preset, overrides={"policy": {"train": "full", "lr": 3e-7}})
        assert named.policy.lr == 3e-7
        assert differences(plain_values(full), plain_values(lora)).keys() == {"policy.train", "policy.lr"}


def test_the_optimizer_in_8_bits_needs_all_weights_in_bf16():
    right = {"policy": {"train": "full", "optimizer": "adamw-8bit"}, "precision": "bf16"}
    assert make_config(overrides=right).policy.optimizer == "adamw-8bit"
    for wrong in ({"precision": "fp32"}, {"policy": {"train": "lora"}}):
        with pytest.raises(ValueError, match="adamw-8bit keeps the weights.*; set them to full and bf16, or"):
            make_config(overrides=merge(right, wrong))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"policy": {"train": "lora"}}, "policy.train is lora; set it to full"),
        ({"precision": "fp16"}, "precision is fp16; set it to fp32 or bf16"),
        ({"neurons": {"policy_measure": True}}, "neurons.policy_measure is true; set it to false"),
        ({"compile": True}, "compile is true; set it to false"),
        ({"algorithm": "draft"}, "draft back-propagates through several steps at once; choose an algorithm"),
    ],
)
def test_what_cannot_be_sharded_is_refused(wrong, named):
    right = {"policy": {"train": "full", "shard": True}}
    assert make_config(overrides=right).policy.shard
    with pytest.raises(ValueError, match=f"policy.shard is true, but {named}"):
        make_config(overrides=merge(right, wrong))
