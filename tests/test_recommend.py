"""Which LoRA of a run is recommended, at which strength, and what is kept of the search."""

import json
import statistics
from collections import Counter

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from scipy import stats
from toy import Brightness, new_run, toy_config

from comfy_tdpo.prompts import load_prompts
from comfy_tdpo.rollout import Decoder, draw_images
from comfy_tdpo.trainer.recommend import work
from comfy_tdpo.trainer.recommend.choice import Outcome, choose, judge
from comfy_tdpo.trainer.recommend.drawing import FRESH, draws_of, shown_of
from comfy_tdpo.trainer.recommend.files import BASE, Cell, Draw, Table, cells_of, is_current
from comfy_tdpo.trainer.recommend.options import Options, held_out_reward, unseen_prompts
from comfy_tdpo.trainer.recommend.work import recommend

CPU = torch.device("cpu")
QUICK = Options(strengths=(0.5, 1.0), images=8)


class Held:
    """A held-out reward of one's own making."""

    name, embed_dim, differentiable = "held", None, True

    def __init__(self, score):
        self.score = lambda images, prompts: score(images)

    def check_prompts(self, prompts):
        pass


def constant(images):
    return torch.ones(len(images))


@pytest.fixture
def policy(make_policy):
    return make_policy(steps=3, seed=1)


@pytest.fixture
def trained(make_policy):
    """A policy whose LoRA is a random one, drawn for an epoch."""

    def trained(epoch: int):
        policy = make_policy(steps=3, seed=1)
        generator = torch.Generator().manual_seed(epoch)
        for name, parameter in policy.trainable.parameters.items():
            if "lora_B" in name:
                parameter.data.normal_(0, 2, generator=generator)
        return policy

    return trained


@pytest.fixture
def run(tmp_path, trained):
    """A run with LoRAs of epochs 2 and 3, of which the last is the newest."""
    run = new_run(tmp_path / "run")
    run.latest_lora.parent.mkdir()
    for epoch, files in ((2, [run.lora(2)]), (3, [run.lora(3), run.latest_lora])):
        for file in files:
            trained(epoch).trainable.export(file, {"epoch": str(epoch)})
    return run


@pytest.fixture
def rewards(monkeypatch):
    """Replace the run's rewards by brightness and a held-out one."""

    def replace(held=constant):
        rewards = (Brightness(), Held(held))
        monkeypatch.setattr(work, "_load_rewards", lambda *_: rewards)
        return rewards

    replace()
    return replace


def table_of(run) -> list[dict]:
    return [json.loads(line) for line in (run.recommendation / "table.jsonl").read_text().splitlines()]


def choosing(run) -> list[dict]:
    """The lines of images that may choose."""
    return [line for line in table_of(run) if line["noise"] < FRESH]


# --- the rule of choice


def outcome(gain: float, least: float) -> Outcome:
    return Outcome(Cell(1, gain), training=1 + gain, held_out=5.0, gain=gain, least=least)


def test_the_rule_takes_the_highest_training_reward_of_those_that_surely_keep_the_held_out_one():
    kept, fell, better_but_fell = outcome(1.0, -0.1), outcome(0.5, 0.3), outcome(2.0, -0.11)
    assert choose([kept, fell, better_but_fell], allowed=0.1) is kept
    assert choose([kept, fell, better_but_fell], allowed=0.05) is fell
    assert choose([outcome(0.0, 0.5), better_but_fell], allowed=0.1) is None, "no better than the base model"


def scored(training: float, *held_out: list[float]) -> dict[Draw, tuple[float, float]]:
    """Scores of as many prompts as there are lists, which are of their images."""
    return {Draw(f"prompt {p}", i): (training, x) for p, own in enumerate(held_out) for i, x in enumerate(own)}


def test_changes_are_paired_and_their_errors_are_those_of_a_mean_over_prompts():
    base = scored(1.0, [1.0, 2.0], [4.0, 5.0], [0.0, 2.0])
    cell = Cell(1, 0.5, digest="x")
    scores = {BASE: base, cell: scored(2.0, [0.9, 1.9], [3.6, 4.6], [0.0, 1.8])}  # prompts change by -0.1, -0.4, -0.1
    found = judge(("a", "b"), scores, tolerance=0.2, prompts="")
    assert found.spread == pytest.approx(statistics.stdev([1.0, 2.0, 4.0, 5.0, 0.0, 2.0]))
    assert found.allowed == pytest.approx(0.2 * found.spread)
    (outcome,) = found.outcomes
    assert outcome.gain == 1.0 and outcome.change == pytest.approx(-0.2)
    assert outcome.error == pytest.approx(statistics.stdev([-0.1, -0.4, -0.1]) / 3**0.5)
    assert outcome.least == pytest.approx(-0.2 - stats.t.ppf(0.9, 2) * outcome.error)
    assert found.chosen is None, "a fall of 0.2 is less than 0.2 * 1.9, but not surely so"
    assert judge(("a", "b"), scores, tolerance=0.3, prompts="").chosen == outcome


def test_a_single_prompt_has_the_error_of_a_mean_over_images():
    base, cell = scored(1.0, [1.0, 2.0, 3.0]), Cell(1, 0.5, digest="x")
    (outcome,) = judge(("a", "b"), {BASE: base, cell: scored(2.0, [1.0, 2.5, 3.1])}, 0.1, "").outcomes
    assert outcome.error == pytest.approx(statistics.stdev([0.0, 0.5, 0.1]) / 3**0.5)


# --- strengths


def test_every_cell_is_scored_as_the_lora_at_that_strength_to_the_bit(run, rewards, trained):
    """The base model, a snapshot at half its strength, and one as it was trained, each made by hand."""
    reward, _ = rewards()
    recommend(run, QUICK, CPU, trained(9))  # as after a training
    scored = {(line["epoch"], line["strength"], line["prompt"]): line["scores"] for line in choosing(run)}
    seen = []
    for epoch, strength in ((0, 0.0), (2, 0.5), (3, 1.0)):
        by_hand = trained(max(epoch, 2))
        for name, parameter in by_hand.trainable.parameters.items():
            if "lora_B" in name:
                parameter.data *= strength
        drawn = [key[2] for key in scored if key[:2] == (epoch, strength)]
        assert set(drawn) == set(load_prompts("shapes-unseen"))
        seeds = [(run.config.seed, "recommend", prompt, 0) for prompt in drawn]
        with torch.no_grad():
            images = draw_images(Decoder(by_hand, 2), drawn, seeds, 2)
        expected = dict(zip(drawn, reward.score(images, drawn).tolist(), strict=True))
        assert expected == {prompt: scored[epoch, strength, prompt]["brightness"] for prompt in drawn}
        seen.append(statistics.fmean(expected.values()))
    assert len(set(seen)) == 3, "the LoRAs make a difference"


def test_the_noise_is_the_same_for_all(run, policy, rewards, make_policy):
    """LoRAs without effect draw the base model's images."""
    still = make_policy(steps=3, seed=1).trainable
    for epoch in (2, 3):
        still.export(run.lora(epoch), {"epoch": str(epoch)})
    still.export(run.latest_lora, {"epoch": "3"})
    found = recommend(run, QUICK, CPU, policy)
    assert [outcome.training for outcome in found.outcomes] == [found.base.training] * 4
    assert found.chosen is None and not run.recommended_lora.exists()


def test_the_base_model_is_drawn_without_a_lora_wherever_the_kl_is_measured_from(run, rewards, trained, make_policy):
    """After a training whose reference was reset, the policy's `reference` is a tuned one."""
    reward, _ = rewards()
    policy = trained(9)
    policy.kl_reference.reset()
    found = recommend(run, QUICK, CPU, policy)
    untrained = make_policy(steps=3, seed=1)
    prompts = [draw.prompt for draw in draws_of(load_prompts("shapes-unseen"), 8)]
    seeds = [(run.config.seed, "recommend", prompt, 0) for prompt in prompts]
    with torch.no_grad():
        images = draw_images(Decoder(untrained, 2), prompts, seeds, 2)
    assert found.base.training == statistics.fmean(reward.score(images, prompts).tolist())


def test_what_is_written_is_the_chosen_lora_with_its_strength_baked_in(run, policy, rewards):
    before = {name: weight.clone() for name, weight in policy.trainable.state().items()}
    found = recommend(run, QUICK, CPU, policy)
    best = max([found.base, *found.outcomes], key=lambda outcome: outcome.training)
    assert found.chosen is best, "the held-out reward is constant, so that all are allowed"
    cell = best.cell
    plain, baked = load_file(cell.file), load_file(run.recommended_lora)
    assert plain.keys() == baked.keys()
    for name, weight in plain.items():
        assert torch.equal(baked[name], weight * cell.strength if ".lora_up." in name else weight), name
    with safe_open(run.recommended_lora, "pt") as file:
        metadata = file.metadata()
    assert (metadata["epoch"], metadata["strength"]) == (str(cell.epoch), f"{cell.strength:g}")
    assert (metadata["held_out"], float(metadata["held_out_reward"])) == ("held", 1.0)
    assert float(metadata["training_reward"]) == pytest.approx(found.fresh.training, rel=1e-5)
    after = policy.trainable.state()
    assert all(torch.equal(after[name], weight) for name, weight in before.items()), "the policy is as it was"


def test_of_a_run_that_trained_all_weights_what_is_written_lies_between_the_base_and_a_snapshot(
    tmp_path, make_policy, rewards
):
    run, policy = new_run(tmp_path / "run", policy={"train": "full"}), make_policy(steps=3, seed=1, train="full")
    base = {name: weight.clone() for name, weight in policy.trainable.state().items()}
    for epoch in (2, 3):
        generator = torch.Generator().manual_seed(epoch)
        for parameter in policy.parameters:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        policy.trainable.export(run.lora(epoch), {"epoch": str(epoch)})
    policy.trainable.export(run.latest_lora, {"epoch": "3"})
    rewards()
    found = recommend(run, QUICK, CPU, policy)
    assert len({found.base.training, *(outcome.training for outcome in found.outcomes)}) == 5, "each is drawn"
    best = max([found.base, *found.outcomes], key=lambda outcome: outcome.training)
    if best is found.base:
        assert not run.recommended_lora.exists()
        return
    snapshot, written = load_file(best.cell.file), load_file(run.recommended_lora)
    assert run.recommended_lora == run.path / "model" / "recommended.safetensors"
    for name, weight in written.items():
        expected = torch.lerp(base[name], snapshot[name], best.cell.strength)
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)  # float32


def test_an_earlier_recommendation_does_not_outlive_a_search_that_finds_none(run, policy, rewards):
    assert recommend(run, QUICK, CPU, policy).chosen is not None and run.recommended_lora.is_file()
    rewards(lambda images: -images.mean(dim=(1, 2, 3)))  # it falls whenever brightness rises
    strict = Options(strengths=(0.5, 1.0), images=8, tolerance=0.0)
    (run.recommendation / "table.jsonl").unlink()
    assert recommend(run, strict, CPU, policy).chosen is None
    assert not run.recommended_lora.exists()
    assert json.loads((run.recommendation / "choice.json").read_text())["recommended"] is None


def test_what_is_reported_of_the_choice_comes_from_noise_that_has_not_chosen(run, policy, rewards):
    found = recommend(run, QUICK, CPU, policy)
    fresh = [line for line in table_of(run) if line["noise"] >= FRESH]
    of_base, of_chosen = ([line for line in fresh if (line["epoch"] == 0) is base] for base in (True, False))
    assert len(of_base) == len(of_chosen) == 8
    assert {(line["epoch"], line["strength"]) for line in of_chosen} == {
        (found.chosen.cell.epoch, found.chosen.cell.strength)
    }
    means = [statistics.fmean(line["scores"]["brightness"] for line in lines) for lines in (of_base, of_chosen)]
    choice = json.loads((run.recommendation / "choice.json").read_text())
    assert choice["recommended"]["training"] == pytest.approx(means[1]) != found.chosen.training
    assert choice["recommended_beside"]["training"] == pytest.approx(means[0])
    assert choice["recommended"]["training_gain"] == pytest.approx(means[1] - means[0])


def test_if_none_qualifies_the_nearest_are_drawn_more_often(run, policy, rewards):
    rewards(lambda images: -images.mean(dim=(1, 2, 3)))  # it falls whenever brightness rises
    found = recommend(run, Options(strengths=(0.5, 1.0), images=8, tolerance=0.0), CPU, policy)
    assert found.chosen is None and found.fresh is None
    drawn = Counter((line["epoch"], line["strength"]) for line in table_of(run))
    gained = [(outcome.cell.epoch, outcome.cell.strength) for outcome in found.nearest]
    assert 0 < len(gained) <= 3 and drawn.pop((0, 0.0)) == 3 * 8
    assert drawn == {key: 3 * 8 if key in gained else 8 for key in drawn} and len(drawn) == 4


# --- going on


class Interrupt(Exception):
    pass


def test_what_was_scored_before_an_interruption_is_not_drawn_again(run, policy, rewards, monkeypatch):
    seen = []

    def watch(phase, done, total):
        seen.append((phase, done, total))
        if done == 10:
            raise Interrupt

    with pytest.raises(Interrupt):
        recommend(run, QUICK, CPU, policy, watch=watch)
    kept = table_of(run)
    assert len(kept) == 10 and seen[-1] == ("recommending", 10, 40), "batches of 2, the run's micro_batch"
    with (run.recommendation / "table.jsonl").open("a") as file:
        file.write('{"epoch": 3, "stre')  # cut off by a power failure
    seen.clear()
    found = recommend(run, QUICK, CPU, policy, watch=lambda *progress: seen.append(progress))
    assert seen[0] == ("recommending", 0, 30) and table_of(run)[:10] == kept and len(choosing(run)) == 40
    again = recommend(run, QUICK, CPU, policy, watch=lambda *progress: seen.append(progress))
    assert seen[-1] == ("checking the choice", 0, 0) and len(table_of(run)) == 40 + 2 * 8
    (run.recommendation / "table.jsonl").unlink()
    whole = recommend(run, QUICK, CPU, policy)
    assert found == again == whole


def test_only_what_is_new_is_drawn(run, policy, rewards):
    recommend(run, QUICK, CPU, policy)
    assert is_current(run), "no epoch has finished that was not considered"
    lines = len(choosing(run))
    recommend(run, Options(strengths=(0.5, 0.75, 1.0), images=8), CPU, policy)
    assert len(choosing(run)) == lines + 2 * 8
    recommend(run, Options(strengths=(0.5, 0.75, 1.0), images=16), CPU, policy)
    assert len(choosing(run)) == lines + 2 * 8 + 7 * 8
    policy.trainable.export(run.lora(2), {"epoch": "2"})  # the run went back and trained epoch 2 again
    recommend(run, Options(strengths=(0.5, 0.75, 1.0), images=16), CPU, policy)
    assert len(choosing(run)) == lines + 2 * 8 + 7 * 8 + 3 * 16
    run.append_metrics({"epoch": 1})
    for epoch in (2, 3, 4):
        run.append_metrics({"epoch": epoch})
    assert not is_current(run), "epoch 4 has not been considered"


def test_a_run_stopped_in_mid_epoch_has_one_snapshot_more(run, make_policy):
    assert [cell.label for cell in cells_of(run, [1.0])] == ["base", "epoch 2", "epoch 3"]
    make_policy(trained=True, seed=1).trainable.export(run.latest_lora, {"epoch": "3"})
    assert [cell.label for cell in cells_of(run, [1.0])] == ["base", "epoch 2", "epoch 3", "latest"]


def test_scores_of_the_base_model_are_not_taken_from_before_they_were_sure(tmp_path):
    line = {"epoch": 0, "strength": 0.0, "lora": "", "prompt": "a", "noise": 0, "scores": {"held": 1.0}}
    (tmp_path / "table.jsonl").write_text(json.dumps(line) + "\n")
    assert Table(tmp_path).scores(BASE, Draw("a", 0)) == {}


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "table.jsonl").write_text('{"lora": 3}\n')
    with pytest.raises(ValueError, match=r"table.jsonl is damaged .*; delete it"):
        Table(tmp_path)


# --- what is drawn


def test_images_are_spread_over_the_prompts_each_with_noise_of_its_own():
    draws = draws_of(["a", "b", "c"], 6)
    assert draws == [Draw("a", 0), Draw("a", 1), Draw("b", 0), Draw("b", 1), Draw("c", 0), Draw("c", 1)]
    assert [draw.prompt for draw in draws_of(["a", "b", "c", "d"], 2)] == ["a", "c"]
    assert draws_of(["a"], 2, FRESH) == [Draw("a", FRESH), Draw("a", FRESH + 1)]
    for images in (2, 5, 11):
        assert set(draws_of(["a", "b", "c"], images)) <= set(draws_of(["a", "b", "c"], 3 * images))
    assert shown_of(draws_of(list("abcdefgh"), 16)) == [Draw(prompt, 0) for prompt in "aceg"]
    assert shown_of(draws_of(["a"], 6)) == [Draw("a", i) for i in range(4)]


def test_the_prompts_are_such_as_the_run_has_not_trained_on():
    config, photos = toy_config(), toy_config(model="somewhere", rewards={"aesthetic": 1.0})
    assert unseen_prompts(config, load_prompts("shapes"), [])[0] == load_prompts("shapes-unseen")
    animals = load_prompts("simple-animals")
    assert unseen_prompts(photos, animals, animals)[0] == load_prompts("unseen-animals")
    prompts, where = unseen_prompts(photos, ["a", "b"], ["b", "c", "c"])
    assert prompts == ["c"] and "sample grids" in where
    prompts, where = unseen_prompts(photos, ["a", "b"], ["b"])
    assert prompts == ["a", "b"] and "the training prompts" in where
    prompts, where = unseen_prompts(photos, ["a cat"], [], "complex")
    assert prompts == load_prompts("complex") and "none of them trained on" in where


# --- the held-out reward


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eval_rewards": ["shapes-gold", "jpeg-compressibility", "shapes-alignment"]}, "jpeg-compressibility"),
        ({"eval_rewards": ["shapes-judge", "shapes-gold"]}, "shapes-match"),
        ({"overoptimisation": {"reward": "shapes-alignment"}, "eval_rewards": ["hpsv2"]}, "shapes-alignment"),
        ({"guards": ["shapes-match"]}, "shapes-alignment"),
        (
            {
                "rewards": {"shapes-alignment": 1.0, "shapes-aesthetic": 1.0},
                "eval_rewards": ["shapes-alignment", "hpsv2"],
            },
            "hpsv2",
        ),
    ],
)
def test_the_held_out_reward_is_one_that_only_watches(settings, expected):
    assert held_out_reward(toy_config(**settings)) == expected


@pytest.mark.parametrize("name", ["shapes-gold", "shapes-judge", "shapes-aesthetic", "nothing"])
def test_what_evaluates_trains_or_does_not_exist_may_not_choose(name):
    with pytest.raises(ValueError, match=f"got .*'{name}'"):
        held_out_reward(toy_config(), name)


def test_a_run_that_watches_nothing_needs_a_name():
    config = toy_config(model="somewhere", rewards={"aesthetic": 1.0})
    with pytest.raises(ValueError, match="no held-out reward which may choose its LoRA.*--held-out NAME"):
        held_out_reward(config)
    assert held_out_reward(config, "hpsv2") == "hpsv2"


# --- what cannot be recommended


@pytest.mark.parametrize(
    "options", [{"strengths": ()}, {"strengths": (0.5, 0.5)}, {"strengths": (0.0,)}, {"images": 1}, {"tolerance": -1.0}]
)
def test_nonsense_is_refused(options):
    with pytest.raises(ValueError, match="^got .*; expected"):
        Options(**options)


def test_a_run_without_a_lora_and_one_that_trains(run, policy, rewards):
    other = type(run)(run.path)
    with other.lock(), pytest.raises(ValueError, match="in use by another process"):
        recommend(run, QUICK, CPU, policy)
    for file in run.latest_lora.parent.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="'run', which has no LoRA yet"):
        recommend(run, QUICK, CPU, policy)


def test_a_run_of_a_graph_is_recommended_there(run, rewards):
    run.write_config(toy_config(model="comfyui:SD15:abc", eval_rewards=["shapes-alignment"]))
    with pytest.raises(ValueError, match="exists only in its ComfyUI graph; .* output.recommend = true"):
        recommend(run, QUICK, CPU)


# --- pictures


def test_the_pictures_have_a_cell_for_each_strength_and_epoch(run, policy, rewards):
    recommend(run, QUICK, CPU, policy)
    assert len(list((run.recommendation / "images").iterdir())) == 5 * 4
    narrow, frontier = (Image.open(run.recommendation / name) for name in ("images.png", "frontier.png"))
    recommend(run, Options(strengths=(0.25, 0.5, 1.0), images=8), CPU, policy)
    wide = Image.open(run.recommendation / "images.png")
    assert wide.width == narrow.width and wide.height > narrow.height
    assert frontier.width == 1600
