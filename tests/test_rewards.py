"""The registry, sums, JPEG and users' functions, one encoder for reward and critic, and rewards that fail."""

import gc
import importlib.util
import io
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from small_rewards import CPU, WITH_ENCODER, save_small_weights, use_small_architectures
from toy import Brightness, lora_of, new_run, same, timeless, toy_config, toy_training

from comfy_tdpo.methods.encoder import encoder_of
from comfy_tdpo.rewards import (
    REWARDS,
    RewardError,
    WeightedSum,
    check_reward,
    encoder_name,
    function,
    has_encoder,
    load_reward,
    load_rewards,
    reward_class,
    reward_names,
    score_images,
    score_with_parts,
)
from comfy_tdpo.rewards.agreement import Agreement
from comfy_tdpo.rewards.function import allow_functions
from comfy_tdpo.rewards.shared import shared_while_used
from comfy_tdpo.trainer.__main__ import main
from comfy_tdpo.trainer.assemble import assemble
from comfy_tdpo.trainer.config import make_config
from comfy_tdpo.trainer.run import RunFolder
from comfy_tdpo.trainer.training import Training

IMAGES = torch.rand(3, 3, 48, 64, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red circle", "two squares", "a star"]


class Recorded(Agreement):
    """Three numbers of an image, and of a prompt's letters; keeps which prompts it was asked to encode."""

    def __init__(self):
        self.asked: list[list[str]] = []

    def encode_images(self, images):
        return images.mean(dim=(2, 3))

    def encode_prompts(self, prompts, device):
        self.asked.append(prompts)
        return torch.tensor([[len(prompt), prompt.count("a"), 1.0] for prompt in prompts], device=device)


def test_equal_prompts_are_encoded_once_for_their_images():
    reward, prompts = Recorded(), [PROMPTS[i] for i in (1, 0, 1)]
    scores = reward.score(IMAGES, prompts)
    assert reward.asked == [[PROMPTS[1], PROMPTS[0]]]
    for i, prompt in enumerate(prompts):
        assert scores[i].item() == pytest.approx(reward.score(IMAGES[i : i + 1], [prompt]).item(), rel=1e-6)  # float32


# --- the registry


def test_every_name_leads_to_a_class_that_says_what_it_reads():
    assert reward_names() == list(REWARDS)
    for name in reward_names():
        make = reward_class(name)
        assert all(source.licence and source.repo and source.file for source in make.sources)
        assert {"score", "embed", "check_prompts"} <= set(dir(make))


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"got reward 'beauty'; expected one of aesthetic, .*, or python:module"):
        check_reward("beauty")


def test_asking_again_gives_the_same_instance_however_it_is_asked():
    first = load_reward("shapes-aesthetic", CPU)
    assert load_reward("shapes-aesthetic", CPU, "fp32", {}) is first
    assert load_reward("shapes-aesthetic", CPU, "bf16") is not first
    assert load_reward("shapes-alignment", CPU).encoder is first.encoder


# --- sums


def test_a_sum_weighs_and_scales():
    terms = {"shapes-aesthetic": 1.0, "shapes-alignment": -2.0}
    total = load_rewards(terms, CPU, scales={"shapes-alignment": 0.25})
    a, b = (load_reward(name, CPU).score(IMAGES, PROMPTS) for name in terms)
    torch.testing.assert_close(total.score(IMAGES, PROMPTS), a - 8 * b)
    assert total.name == "shapes-aesthetic + -2 shapes-alignment / 0.25"
    assert total.embed_dim == 64 and torch.equal(
        total.embed(IMAGES), load_reward("shapes-aesthetic", CPU).embed(IMAGES)
    )


def test_one_reward_of_weight_1_is_itself_and_one_of_weight_0_is_not_loaded():
    alone = load_rewards({"shapes-aesthetic": 1.0, "pickscore": 0.0}, CPU)
    assert alone is load_reward("shapes-aesthetic", CPU)
    assert isinstance(load_rewards({"shapes-aesthetic": 2.0}, CPU), WeightedSum)
    assert isinstance(load_rewards({"shapes-aesthetic": 1.0}, CPU, scales={"shapes-aesthetic": 2.0}), WeightedSum)


def test_a_sum_tells_the_scores_of_its_parts_without_another_look():
    terms, asked = {"shapes-aesthetic": 1.0, "shapes-alignment": -2.0}, []
    total = load_rewards(terms, CPU, scales={"shapes-alignment": 0.25})
    assert isinstance(total, WeightedSum)
    for model, _, _ in total.parts:
        spied = model.score
        model.score = lambda *images, spied=spied, name=model.name: asked.append(name) or spied(*images)
    scores, parts = score_with_parts(total, IMAGES, PROMPTS)
    for model, _, _ in total.parts:
        del model.score
    assert asked == list(terms) == list(parts)
    assert torch.equal(scores, score_images(total, IMAGES, PROMPTS))
    for name, part in parts.items():
        assert torch.equal(part, score_images(load_reward(name, CPU), IMAGES, PROMPTS))


@pytest.mark.parametrize("terms", [{"shapes-aesthetic": 1.0}, {"shapes-aesthetic": 0.5}])
def test_a_single_reward_has_no_parts(terms):
    total = load_rewards(terms, CPU)
    scores, parts = score_with_parts(total, IMAGES, PROMPTS)
    assert torch.equal(scores, score_images(total, IMAGES, PROMPTS)) and parts == {}


def test_a_sum_lends_the_first_encoder_there_is():
    total = load_rewards({"jpeg-compressibility": 1.0, "shapes-judge": 1.0}, CPU)
    assert encoder_name(total) == "shapes-judge"
    assert total.embed(IMAGES).shape == (3, 64)
    none = load_rewards({"jpeg-compressibility": 1.0, "shapes-gold": 1.0}, CPU)
    assert none.embed_dim is None


def test_a_sum_asks_each_part_about_the_prompts():
    total = load_rewards({"shapes-aesthetic": 1.0, "shapes-gold": 1.0}, CPU)
    total.check_prompts(["a red circle"])
    with pytest.raises(ValueError, match="shapes-gold can only judge prompts of Shapes"):
        total.check_prompts(["a photo of a cat"])


def test_scales_equal_what_weights_of_their_inverse_do():
    scaled = make_config(overrides={"rewards": {"shapes-aesthetic": 1}, "reward_scales": "shapes-aesthetic=0.5"})
    assert scaled.reward_scales == {"shapes-aesthetic": 0.5}
    ours = load_rewards(scaled.rewards, CPU, scales=scaled.reward_scales)
    theirs = load_rewards({"shapes-aesthetic": 2.0}, CPU)
    assert torch.equal(ours.score(IMAGES, PROMPTS), theirs.score(IMAGES, PROMPTS))


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"reward_scales": {"shapes-judge": 2}}, "reward_scales names shapes-judge, which is not trained on"),
        ({"reward_scales": "shapes-aesthetic=0"}, "reward_scales.shapes-aesthetic: got '0'"),
        ({"reward_scales": "shapes-aesthetic"}, "reward_scales: got 'shapes-aesthetic'; expected NAME=VALUE"),
        ({"reward_weights": {"pickscore": "/x"}}, "reward_weights names pickscore, which is not used"),
        ({"reward_weights": "shapes-gold"}, "reward_weights: got 'shapes-gold'; expected NAME=VALUE"),
        ({"reward_precision": "fp8"}, "reward_precision: got 'fp8'"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(overrides, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_config(overrides=overrides)


def test_paths_are_kept_as_they_are_called_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = {"rewards": {"hpsv2": 1}, "eval_rewards": [], "reward_weights": "hpsv2=weights/hps.pt"}
    assert make_config(overrides=overrides).reward_weights == {"hpsv2": str(tmp_path / "weights" / "hps.pt")}


# --- JPEG


@pytest.mark.parametrize(("name", "sign"), [("jpeg-compressibility", -1), ("jpeg-incompressibility", 1)])
def test_jpeg_is_the_size_of_the_file(name, sign):
    flat, noisy = torch.full((3, 48, 64), 0.5), IMAGES[0]
    scores = load_reward(name, CPU).score(torch.stack([flat, noisy]), ["", ""])
    sizes = []
    for image in (flat, noisy):
        file = io.BytesIO()
        levels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(levels).save(file, "JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, sign * torch.tensor(sizes))
    assert abs(scores[0]) < abs(scores[1])


# --- colourfulness


def test_colourfulness_is_that_of_the_closed_form():
    """Red has rg = 255 and yb = 127.5; its complement, cyan, has the same with the other sign."""
    size = (255**2 + 127.5**2) ** 0.5
    red, grey = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 4, 6), torch.full((3, 4, 6), 0.4)
    both = torch.cat([red[..., :3], 1 - red[..., :3]], -1)
    scores = load_reward("colourfulness", CPU).score(torch.stack([grey, red, both]), ["", "", ""])
    torch.testing.assert_close(scores, torch.tensor([0, 0.3 * size, size]), rtol=1e-6, atol=1e-4)  # float32


def test_colourfulness_has_a_gradient_also_where_an_image_is_grey():
    images = torch.full((1, 3, 8, 8), 0.5).requires_grad_()
    load_reward("colourfulness", CPU).score(images, [""]).sum().backward()
    assert images.grad is not None and images.grad.isfinite().all()


# --- a user's own function


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's, with functions allowed as on the command line."""
    (tmp_path / "my_rewards.py").write_text(
        "calls = []\n"
        "def red(images, prompts):\n    calls.append(len(prompts))\n    return images[:, 0].mean((1, 2))\n"
        "def lengths(images, prompts):\n    return [float(len(prompt)) for prompt in prompts]\n"
        "def broken(images, prompts):\n    raise KeyError('no such thing')\n"
        "number = 3\n"
        "def wasteful(images, prompts):\n    prompts.clear()\n    return images.mul_(0).sum((1, 2, 3))\n"
    )
    (tmp_path / "half_written.py").write_text("def red(")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(function, "_allowed", True)


def test_a_function_scores(mine):
    red = load_reward("python:my_rewards:red", CPU)
    torch.testing.assert_close(red.score(IMAGES, PROMPTS), IMAGES[:, 0].mean((1, 2)))
    scores = score_images(load_reward("python:my_rewards:lengths", CPU), IMAGES, PROMPTS)
    assert scores.tolist() == [12, 11, 6] and scores.dtype == torch.float32
    assert red.embed_dim is None


def test_a_function_may_change_what_it_is_given(mine):
    """Others score the same images after it."""
    images, prompts = IMAGES.clone(), list(PROMPTS)
    score_images(load_reward("python:my_rewards:wasteful", CPU), images, prompts)
    assert torch.equal(images, IMAGES) and prompts == list(PROMPTS)


@pytest.mark.parametrize(
    "name",
    [
        "python:my_rewards",
        "python:my_rewards:",
        "python:my_rewards.py:red",
        "python::red",
        "python:my/rewards:red",
        "python:.my:red",
    ],
)
def test_a_malformed_function_is_refused(mine, name):
    with pytest.raises(ValueError, match="expected python:module:function"):
        check_reward(name)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("python:no_such_module:red", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("python:half_written:red", "cannot be imported: SyntaxError"),
        ("python:sys:red", "but sys has no function 'red'"),
        ("python:my_rewards:blue", "has no function 'blue'"),
        ("python:my_rewards:number", "has no function 'number'"),
    ],
)
def test_a_function_that_is_not_there_is_refused(mine, name, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_reward(name, CPU)


def test_functions_are_refused_from_the_start():
    spec = importlib.util.spec_from_file_location("comfy_tdpo.rewards.anew", function.__file__)
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    with pytest.raises(ValueError, match="runs code"):
        anew.check_function("python:mine:red")


def test_a_function_runs_only_where_it_was_allowed(tmp_path, monkeypatch):
    """Not from a configuration or a graph that somebody else made; the command line allows it."""
    monkeypatch.setattr(function, "_allowed", False)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="runs code"):
        make_config(overrides={"rewards": {"python:evil:f": 1}})
    with pytest.raises(ValueError, match="runs code"):
        load_reward("python:evil:f", CPU)
    allow_functions()
    check_reward("python:evil:f")  # which imports nothing yet
    assert not any(name.startswith("python:") for name in reward_names())


def test_the_command_line_trains_on_a_function(mine, tmp_path):
    quick = ["--epochs", "1", "--samples-per-epoch", "2", "--samples-per-update", "2", "--steps", "2"]
    quick += ["--output.grid-images", "1", "--eval-reward", "none", "--algorithm", "ddpo-2"]
    assert main(["--run-dir", str(tmp_path / "run"), "--reward", "python:my_rewards:red", *quick]) == 0
    assert RunFolder.open(tmp_path / "run").metrics()[0]["reward/python:my_rewards:red/mean"] > 0


# --- one encoder for reward and critic


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        use_small_architectures(patch)
        yield save_small_weights(tmp_path_factory.mktemp("weights"))


def assembled(tmp_path, **overrides) -> Training:
    config = toy_config(**overrides)
    return assemble(config, RunFolder(tmp_path / "run").create(config))


@pytest.mark.parametrize("algorithm", ["tdpo-r", "tdpo", "ddpo-100", "ddpo-2"])
@pytest.mark.parametrize("preset", ["sd14-aesthetic", "sd14-pickscore", "sd14-hpsv2"])
def test_the_papers_presets_train_with_small_encoders(small, tmp_path, make_policy, preset, algorithm):
    """The rewards of the presets and their held-out reward, on a tiny policy; the critic reads the reward's encoder."""
    overrides = {"algorithm": algorithm, "prompts": "shapes", "precision": "fp32", "resolution": 16, "steps": 2}
    overrides |= {"epochs": 1, "samples_per_epoch": 4, "samples_per_update": 2, "output": {"grid_images": 1}}
    config = make_config(preset, overrides=overrides | {"reward_weights": paths(small, preset)})
    run = RunFolder(tmp_path / "run").create(config)
    how = (CPU, config.reward_precision, config.reward_weights)
    reward, held_out = (
        load_rewards(config.rewards, *how),
        {name: load_reward(name, *how) for name in config.eval_rewards},
    )
    policy = make_policy(steps=config.steps, guidance=config.guidance, seed=config.seed)
    training = Training(config, policy, reward, held_out, run, Accelerator(cpu=True))
    (metrics,) = training.epochs()
    assert {f"reward/{reward.name}/mean", "eval/imagereward/mean"} <= metrics.keys()
    assert (training.method.critic is not None) == config.critic.enabled
    assert training.method.critic is None or training.method.critic.encoder is reward
    assert ("critic/loss" in metrics) == config.critic.enabled


def paths(small: dict[str, str], preset: str) -> dict[str, str]:
    return {name: small[name] for name in (preset.removeprefix("sd14-"), "imagereward")}


@pytest.mark.parametrize("name", WITH_ENCODER)
def test_there_is_one_copy_of_an_encoder(small, tmp_path, name):
    """In a sum, watching, and named for the critic: one instance, and one set of weights in memory."""
    gc.collect()
    before = modules()
    terms = {name: 1.0, "jpeg-compressibility": 0.1}
    training = assembled(
        tmp_path, rewards=terms, eval_rewards=[name], critic={"encoder": name}, reward_weights={name: small[name]}
    )
    assert training.method.critic.encoder is training.context.eval_rewards[name]
    assert training.method.critic.encoder is training.context.reward.parts[0][0]
    kind = type(training.method.critic.encoder.encoder)
    assert sum(type(module) is kind for module in modules() - before) == 1


def modules() -> set[torch.nn.Module]:
    return {thing for thing in gc.get_objects() if issubclass(type(thing), torch.nn.Module)}


def test_an_encoder_is_let_go_with_its_last_user(small):
    reward = load_reward("aesthetic", CPU, weights=small)
    encoder = weakref.ref(reward.encoder)
    del reward
    gc.collect()
    assert encoder() is None


def test_the_log_names_the_encoder_the_critic_reads(tmp_path, caplog):
    with caplog.at_level("INFO"):
        assembled(tmp_path, rewards={"jpeg-compressibility": 1.0}, critic={"encoder": "shapes-alignment"})
    assert "the critic uses the image encoder of shapes-alignment" in caplog.text
    assert 'encoder = "shapes-alignment"' in (tmp_path / "run" / "config.toml").read_text()


@pytest.mark.parametrize(
    ("changes", "encoder"),
    [
        ({"rewards": {"jpeg-compressibility": 1.0}}, "shapes-aesthetic"),
        ({"rewards": {"shapes-gold": 1.0}}, "shapes-aesthetic"),
        ({"rewards": {"shapes-gold": 1.0}, "algorithm": "tdpo-g", "guards": ["shapes-match"]}, "shapes-match"),
        ({"rewards": {"shapes-gold": 1.0, "shapes-judge": 0.1}}, "shapes-judge"),
    ],
)
def test_a_critic_without_the_rewards_encoder_takes_another_and_says_so(tmp_path, caplog, changes, encoder):
    training = assembled(tmp_path, **changes)
    assert training.method.critic.encoder.name.endswith(encoder)
    found = [record.message for record in caplog.records if "has no image encoder" in record.message]
    chosen = encoder not in changes["rewards"]
    assert (f"so the critic uses that of '{encoder}'" in "".join(found)) == chosen == bool(found)


def test_without_anything_of_shapes_it_is_the_smallest_one():
    config = make_config("sd15", overrides={"rewards": {"imagereward": 1.0}, "guards": ["hpsv2"]})
    assert encoder_of(config) == "hpsv2"
    config = make_config("sd14-aesthetic", overrides={"rewards": {"jpeg-compressibility": 1.0}})
    assert encoder_of(config) == "clipscore"
    asked = {"rewards": {"jpeg-compressibility": 1.0}, "reward_weights": {"clipscore": "/a/b"}}
    assert make_config("sd14-aesthetic", overrides=asked).reward_weights == {"clipscore": "/a/b"}
    assert encoder_of(make_config("shapes", overrides={"rewards": {"shapes-gold": 1.0}})) == "shapes-alignment"


@pytest.mark.parametrize("name", REWARDS)
def test_the_names_of_rewards_without_an_encoder_are_those_of_the_classes(name):
    """A class that has one knows its width when it is made, or says it itself."""
    assert has_encoder(name) == (getattr(reward_class(name), "embed_dim", "unknown yet") is not None)
    assert not has_encoder("python:module:function")


def test_a_reward_without_an_encoder_cannot_lend_it():
    with pytest.raises(ValueError, match="critic.encoder is 'shapes-gold', which has no image encoder; set it to"):
        make_config("shapes", overrides={"critic": {"encoder": "shapes-gold"}})


# --- rewards that fail


class Failing(Brightness):
    """Well behaved for `good` calls, then not."""

    def __init__(self, how, good: int):
        self.how, self.left = how, good

    def score(self, images, prompts):
        self.left -= 1
        return super().score(images, prompts) if self.left >= 0 else self.how(super().score(images, prompts))


def leaving(scores):
    raise SystemExit(9)


def raising(scores):
    raise ZeroDivisionError("division by zero")


FAILURES = {
    "raises": (raising, "reward 'brightness' failed: ZeroDivisionError: division by zero"),
    "NaN": (lambda scores: scores * torch.nan, "reward 'brightness' returned a score that is not finite"),
    "leaves": (leaving, "reward 'brightness' failed: SystemExit: 9"),
    "overflows": (lambda scores: scores.double() + 1e300, "reward 'brightness' returned a score that is not finite"),
    "complex": (lambda scores: scores * 1j, "reward 'brightness' returned torch.complex64"),
    "sparse": (lambda scores: scores.to_sparse(), "reward 'brightness' returned torch.float32 .torch.sparse_coo"),
    "shape": (lambda scores: scores[:, None], r"reward 'brightness' returned shape \(2, 1\)"),
    "device": (lambda scores: scores.to("meta"), "reward 'brightness' returned scores on meta; expected cpu"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_reward_that_fails_is_named(failure):
    how, complaint = FAILURES[failure]
    with pytest.raises(RewardError, match=complaint):
        score_images(Failing(how, good=0), IMAGES[:2], PROMPTS[:2])
    total = WeightedSum([(Brightness(), 1.0, 1.0), (Failing(how, good=0), 1.0, 1.0)])
    with pytest.raises(RewardError, match=f"^{complaint}"):  # the part, and not the sum
        score_images(total, IMAGES[:2], PROMPTS[:2])


def test_images_that_are_no_numbers_are_nobodys_to_judge():
    with pytest.raises(
        RewardError, match="got images that are not finite for reward 'brightness'; the model that generated"
    ):
        score_images(Brightness(), IMAGES * torch.nan, PROMPTS)


def test_two_threads_share_an_instance():
    made = []

    @shared_while_used
    def make(name):
        time.sleep(0.1)  # as long as another thread needs to ask too
        return Brightness()

    threads = [threading.Thread(target=lambda: made.append(make("one"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, made))) == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("CUDA error: out of memory")])
def test_too_little_memory_is_not_the_rewards_fault(error):
    def exhausted(scores):
        raise error

    with pytest.raises(type(error), match="memory"):
        score_images(Failing(exhausted, good=0), IMAGES, PROMPTS)


def test_a_failing_reward_ends_the_run_with_everything_before_it_saved(tmp_path, make_policy):
    """It fails in the second of two epochs; mended, the run ends as if it had never failed."""
    whole = toy_training(new_run(tmp_path / "whole", epochs=2), make_policy)
    list(whole.epochs())
    training = toy_training(new_run(tmp_path / "run", epochs=2), make_policy)
    training.context.reward = Failing(raising, good=4 + 1)  # four micro-batches an epoch
    with pytest.raises(RewardError, match="'brightness' failed"):
        list(training.epochs())
    run = RunFolder.open(tmp_path / "run")
    assert [line["epoch"] for line in run.metrics()] == [1]
    assert run.latest_lora.exists() and (run.checkpoints / "epoch-0001").is_dir()
    again = toy_training(run, make_policy)
    list(again.epochs())
    assert timeless(run.metrics()) == timeless(whole.run.metrics())
    assert same(lora_of(again), lora_of(whole))


def test_the_command_line_says_it_in_one_line(mine, tmp_path, capsys):
    quick = ["--epochs", "1", "--samples-per-epoch", "2", "--samples-per-update", "2", "--steps", "2"]
    quick += ["--output.grid-images", "1", "--eval-reward", "none", "--algorithm", "ddpo-2"]
    assert main(["--run-dir", str(tmp_path / "run"), "--reward", "python:my_rewards:broken", *quick]) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("comfy_tdpo:")]
    assert "reward 'python:my_rewards:broken' failed: KeyError: 'no such thing'; everything saved" in line
