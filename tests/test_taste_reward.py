"""A taste as a reward: it scores, trains, watches and guards; a run keeps the taste it started with."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_rewards import save_small_weights, use_small_architectures
from toy import timeless

from comfy_tdpo.rewards import RewardModel, function, load_reward, load_rewards, score_images
from comfy_tdpo.tastes.folder import TasteFolder
from comfy_tdpo.tastes.names import usual_encoder
from comfy_tdpo.tastes.votes import Pair, Thumb
from comfy_tdpo.trainer.__main__ import main
from comfy_tdpo.trainer.alarm import unguarded
from comfy_tdpo.trainer.config import make_config
from comfy_tdpo.trainer.config.changes import differences
from comfy_tdpo.trainer.run import RunFolder

CPU = torch.device("cpu")
IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red circle"] * 3
QUICK = ["--samples-per-epoch", "4", "--samples-per-update", "2", "--steps", "2", "--output.grid-images", "1"]
QUICK += ["--output.samples-every", "1", "--seed", "3"]


def grey(level: float, seed: int) -> torch.Tensor:
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed))
    return ((level + 0.2 * noise) * 255).round().clamp(0, 255) / 255


@pytest.fixture
def taste(tmp_path, monkeypatch) -> TasteFolder:
    """Of somebody who likes dark pictures, in tastes/dark of the current folder."""
    monkeypatch.chdir(tmp_path)
    return vote(TasteFolder.create(tmp_path / "tastes" / "dark", "shapes-aesthetic"), range(12))


def vote(taste: TasteFolder, seeds: range) -> TasteFolder:
    taste.append([Thumb(taste.keep(grey(0.7 * (seed % 2), seed)), float(seed % 2 == 0)) for seed in seeds])
    return taste


def load(taste: TasteFolder, name: str = "taste:dark") -> RewardModel:
    return load_reward(name, CPU, weights={name: str(taste.path)})


# --- the reward


def test_it_ranks_as_its_artist_and_is_a_reward_like_others(taste):
    reward = load(taste)
    assert isinstance(reward, RewardModel) and reward.name == "taste:dark"
    assert reward.embed_dim == 64 and reward.differentiable
    scores = score_images(reward, torch.stack([grey(level, 99) for level in (0.05, 0.35, 0.65)]), PROMPTS)
    assert scores.dtype == torch.float32 and scores[0] > 0 > scores[2] and scores.tolist() == sorted(scores)[::-1]
    encoder = load_reward("shapes-aesthetic", CPU)
    assert reward.encoder is encoder and torch.equal(reward.embed(IMAGES), encoder.embed(IMAGES))
    assert (reward.doubt(IMAGES) > 0).all()


def test_it_learns_at_once_from_a_vote(taste):
    before, bright = load(taste), grey(0.7, 5)[None]
    taste.append([Pair(taste.keep(grey(0.7, 5)), taste.keep(grey(0.0, 4)))])
    assert load(taste).score(bright, [""]) > before.score(bright, [""])


def test_its_gradient_is_the_slope_of_its_score(taste):
    reward, images = load(taste), IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(images, PROMPTS).sum(), images)
    way, step = gradient / gradient.norm(), 0.05
    with torch.no_grad():
        ahead, behind = (reward.score((IMAGES + sign * step * way), PROMPTS).double().sum() for sign in (1, -1))
    # float32 scores of about 1, rounded to 1e-6, over a step of 0.1; the step's own error is of second order
    assert (ahead - behind).item() / (2 * step) == pytest.approx(gradient.norm().item(), rel=0.02)


def test_it_adds_to_sums_and_lends_its_encoder(taste):
    total = load_rewards({"taste:dark": 0.5, "shapes-judge": 1.0}, CPU, weights={"taste:dark": str(taste.path)})
    expected = 0.5 * load(taste).score(IMAGES, PROMPTS) + load_reward("shapes-judge", CPU).score(IMAGES, PROMPTS)
    torch.testing.assert_close(total.score(IMAGES, PROMPTS), expected)
    assert torch.equal(total.embed(IMAGES), load_reward("shapes-aesthetic", CPU).embed(IMAGES))


@pytest.mark.parametrize(
    ("about", "told"),
    [
        ('{"format": 1, "encoder": "python:evil:run"}', "got encoder 'python:evil:run'; expected a reward with"),
        ('{"format": 1, "encoder": "taste:dark"}', "got encoder 'taste:dark'; expected a reward with"),
    ],
)
def test_a_taste_of_somebody_else_runs_no_code(taste, about, told, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(function, "_allowed", True)
    (taste.path / "taste.json").write_text(about)
    with pytest.raises(ValueError, match=told):
        load(taste)


def test_a_head_of_another_encoder_is_refused(taste, tmp_path):
    fitted = load(taste).fitted
    narrow = type(fitted)(
        type(fitted.head)(*(torch.zeros(shape).double() for shape in ((5,), (), (6,), (6, 6), ()))),
        *("shapes-aesthetic", 1, ""),
    )
    narrow.save(tmp_path / "n.safetensors")
    with pytest.raises(ValueError, match="as a taste of 5 numbers, but the encoder of shapes-aesthetic gives 64"):
        load_reward("taste:n", CPU, weights={"taste:n": str(tmp_path / "n.safetensors")})


def test_without_its_folder_it_says_where_to_give_it():
    with pytest.raises(ValueError, match=r"got reward 'taste:dark' without its folder; expected .* taste:dark=FOLDER"):
        load_reward("taste:dark", CPU)
    with pytest.raises(ValueError, match=r"got reward 'taste:dark' without its folder"):
        make_config(overrides={"rewards": {"taste:dark": 1.0}})


# --- the command line


def printed_config(capsys, *flags: str) -> str:
    assert main([*flags, "--print-config"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("given", ["dark", "tastes/dark", "./tastes/dark/votes.jsonl", "{}/tastes/dark"])
def test_its_path_is_kept_apart_from_its_name(taste, capsys, tmp_path, given):
    text = printed_config(capsys, "--reward", f"taste:{given.format(tmp_path)}=0.5")
    assert '"taste:dark" = 0.5' in text and f'"taste:dark" = "{taste.path}"' in text


def test_it_may_have_any_role(taste, capsys, tmp_path):
    shutil.copytree(taste.path, tmp_path / "other")
    flags = ["--eval-reward", "taste:dark", "--guard", "taste:other", "--critic.encoder", "taste:tastes/dark"]
    text = printed_config(capsys, *flags, "--overoptimisation.reward", "taste:./tastes/dark")
    for line in ('eval_rewards = [\n    "taste:dark"', 'guards = [\n    "taste:other"', 'encoder = "taste:dark"'):
        assert line in text
    scaled = printed_config(capsys, "--reward", "taste:dark", "--reward-scales", "taste:dark=2")
    assert '[reward_scales]\n"taste:dark" = 2.0' in scaled


def test_wrong_paths_are_one_sentence(taste, capsys, tmp_path):
    shutil.copytree(taste.path, tmp_path / "elsewhere" / "dark")
    for flags, told in (
        (["--reward", "taste:nope"], "'tastes/nope' does not exist; .* make one with: taste tastes/nope --liked"),
        (["--reward", "taste:dark", "--eval-reward", "taste:elsewhere/dark"], "got two tastes called 'taste:dark'"),
        (["--reward", "taste:"], "got '' as a path"),
    ):
        assert main(flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(told, line), line


def test_it_scores_image_files(taste, capsys, tmp_path):
    levels = (grey(0.0, 50).permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert main(["score", "--reward", "taste:dark", "a.png"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head == "image\ttaste:dark"
    expected = load(taste).score(grey(0.0, 50)[None], [""]).item()
    assert float(row.split("\t")[1]) == pytest.approx(expected, rel=1e-4)  # printed with six digits


# --- guards


def test_a_taste_on_shapes_is_guarded_and_watched_by_default(taste):
    where = {"reward_weights": {"taste:dark": str(taste.path)}}
    config = make_config(overrides={"rewards": {"taste:dark": 1.0}, **where})
    assert config.algorithm == "ddpo-g" and config.guards == ["shapes-alignment"] and config.guard_penalty > 0
    assert config.overoptimisation.reward == "shapes-match" and unguarded(config) == ""
    bare = make_config(overrides={"rewards": {"taste:dark": 1.0}, "guards": [], **where})
    assert re.fullmatch("taste:dark is learned from few votes .*it has no guard: .*", unguarded(bare))
    alone = {"algorithm": "tdpo-r", "overoptimisation": {"reward": "none"}}
    both = make_config(overrides={"rewards": {"taste:dark": 1.0}, **alone, **where})
    assert "it has no guard" in unguarded(both) and "no held-out reward is watched" in unguarded(both)
    assert unguarded(make_config(overrides={"guards": []})) == "", "only tastes are so small"
    photos = make_config("sd15", overrides={"rewards": {"taste:dark": 1.0}, **where})
    assert photos.guards == ["clipscore"] and photos.overoptimisation.reward == "imagereward"


# --- runs


def train(run: str, epochs: int) -> int:
    """The learning rate is constant, since a schedule depends on the number of epochs."""
    flags = ["--eval-reward", "none", "--policy.lr-schedule", "constant", "--epochs", str(epochs), "--run-dir", run]
    return main([*QUICK, "--reward", "taste:dark", *flags])


def metrics(run: str) -> list:
    return timeless(RunFolder.open(Path(run)).metrics())


def test_a_run_resumes_with_the_taste_it_started_with(taste, capsys):
    assert train("whole", 2) == 0
    assert train("parts", 1) == 0
    kept = Path("parts/tastes/dark.safetensors").read_bytes()
    vote(taste, range(12, 19))
    capsys.readouterr()
    assert main(["--resume", "parts", "--epochs", "2"]) == 0
    assert "taste:dark had 12 votes when the run started and has 19 now; the run goes on" in capsys.readouterr().err
    assert metrics("parts") == metrics("whole")
    assert Path("parts/tastes/dark.safetensors").read_bytes() == kept
    assert [key for key in metrics("parts")[0] if key.startswith("reward/")] == [
        "reward/taste:dark/mean",
        "reward/taste:dark/std",
    ]


def test_a_run_needs_its_taste_no_more_once_it_has_a_copy(taste):
    assert train("run", 1) == 0
    shutil.rmtree(taste.path)
    assert main(["--resume", "run", "--epochs", "2"]) == 0
    assert len(metrics("run")) == 2


def test_another_taste_in_place_of_the_copy_is_refused(taste, capsys):
    assert train("run", 1) == 0
    Path("run/tastes/dark.safetensors").unlink()
    assert main(["--resume", "run", "--epochs", "2"]) == 0, "the votes are the same, so the taste is"
    Path("run/tastes/dark.safetensors").unlink()
    vote(taste, range(12, 19))
    capsys.readouterr()
    assert main(["--resume", "run", "--epochs", "3"]) == 2
    assert "got another taste 'taste:dark' from when the run started" in capsys.readouterr().err
    assert len(metrics("run")) == 2


def test_no_path_leaves_the_machine_with_a_lora(taste, tmp_path):
    assert train("run", 1) == 0
    assert str(tmp_path).encode() not in Path("run/lora/latest.safetensors").read_bytes()
    assert b"taste:dark" in Path("run/lora/latest.safetensors").read_bytes()


def test_where_a_taste_is_may_change_and_what_it_is_may_not(taste):
    config = {"rewards": {"taste:dark": 1.0}, "reward_weights": {"taste:dark": "/a"}, "algorithm": "tdpo-g"}
    moved = config | {"reward_weights": {"taste:dark": "/b"}}
    assert list(differences(moved, config)) == ["reward_weights"]


def test_a_taste_of_other_pictures_reads_by_clip_from_the_files_given(tmp_path, monkeypatch):
    use_small_architectures(monkeypatch)
    files = {"aesthetic": save_small_weights(tmp_path / "weights")["aesthetic"]}
    photos = TasteFolder.create(tmp_path / "photos", usual_encoder(96, 80))
    pictures = torch.rand(6, 3, 96, 80, generator=torch.Generator().manual_seed(1))
    photos.append([Thumb(photos.keep(picture), float(i % 2)) for i, picture in enumerate(pictures)])
    files["taste:photos"] = str(photos.path)
    reward, clip = load_reward("taste:photos", CPU, weights=files), load_reward("aesthetic", CPU, weights=files)
    assert reward.encoder is clip and reward.embed_dim == clip.embed_dim
    scores = reward.score(pictures, [""] * 6)
    assert scores[1::2].min() > scores[::2].max(), "it has learned what it was told"
    config = make_config("sd15", overrides={"rewards": {"taste:photos": 1.0}, "reward_weights": files})
    assert config.reward_weights == files
