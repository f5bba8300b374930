"""Tastes in ComfyUI: the node's votes, those that a browser sends, and which run is meant after new votes."""

import json
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest
import standin
import torch
from fake_training import begin, runs_in, wanted
from PIL import Image
from torch import Tensor

from comfy_tdpo.nodes.comfy.scoring import pictures_of, score
from comfy_tdpo.nodes.runs import answers
from comfy_tdpo.nodes.runs.registry import Runs
from comfy_tdpo.nodes.runs.reward_choice import RewardChoice
from comfy_tdpo.nodes.runs.select import choose
from comfy_tdpo.nodes.runs.tastes import NoSuchTaste, Tastes, tastes_beside, with_taste
from comfy_tdpo.rewards import load_reward
from comfy_tdpo.rewards.taste import Taste
from comfy_tdpo.tastes.folder import TasteFolder, file_of
from comfy_tdpo.tastes.votes import Pair, Thumb
from comfy_tdpo.trainer.plots.image_grid import image_in_grid, save_image_grid
from comfy_tdpo.trainer.run.tastes import keep_tastes

CPU = torch.device("cpu")


def images(count: int, seed: int = 0, size: int = 64) -> Tensor:
    """As a graph passes them, with levels of 8 bits."""
    return torch.randint(256, (count, size, size, 3), generator=torch.Generator().manual_seed(seed)) / 255


@pytest.fixture
def runs(tmp_path) -> Runs:
    return runs_in(tmp_path)


@pytest.fixture
def tastes(runs) -> Tastes:
    return tastes_beside(runs)


def voted(tastes: Tastes, name: str = "mine", seed: int = 0):
    return tastes.vote(name, pictures_of(images(3, seed)), pictures_of(images(3, seed + 1) * 0.3))


# --- the node


@pytest.fixture
def node(monkeypatch, runs, tastes):
    standin.install(monkeypatch)
    cls = import_module("comfy_tdpo.nodes.taste").Taste
    folders = import_module("comfy_tdpo.nodes.comfy.folders")
    monkeypatch.setattr(folders, "all_tastes", lambda: tastes)
    monkeypatch.setattr(folders, "shown_pictures", lambda: shown_in(runs))
    return cls


def test_pictures_become_votes_and_a_reward_that_scores(node, tastes):
    with torch.inference_mode():  # as ComfyUI runs its nodes
        chain = RewardChoice({"shapes-judge": 1.0})
        (choice,) = node.execute("mine", 2.0, liked=images(3), disliked=images(3, 1), also=chain).values
        scores = score(images(3), [""] * 3, choice, CPU)
    folder = tastes.root / "mine"
    assert choice.weights == {"shapes-judge": 1.0, "taste:mine": 2.0} and choice.files == {"taste:mine": str(folder)}
    pixels = images(3).movedim(-1, 1)
    taste = load_reward("taste:mine", CPU, weights=choice.files)
    expected = 2 * taste.score(pixels, [""] * 3) + load_reward("shapes-judge", CPU).score(pixels, [""] * 3)
    torch.testing.assert_close(torch.tensor(scores), expected, rtol=0, atol=1e-4)  # float32
    assert tastes.status("mine") == {
        **{"name": "mine", "encoder": "shapes-aesthetic", "votes": 6, "liked": 3, "disliked": 3, "pairs": 0}
    }


def test_queueing_again_votes_no_second_time_and_new_votes_change_the_fingerprint(node, tastes):
    assert node.fingerprint_inputs(name="mine") == ""
    node.execute("mine", 1.0, liked=images(2), disliked=images(2, 1))
    first = node.fingerprint_inputs(name="mine")
    node.execute("mine", 1.0, liked=images(2), disliked=images(2, 1))
    node.execute("mine", 1.0)
    assert node.fingerprint_inputs(name="mine") == first and tastes.status("mine")["votes"] == 4
    node.execute("mine", 1.0, disliked=images(2))
    assert node.fingerprint_inputs(name="mine") != first
    assert tastes.status("mine") | {"name": ""} == {
        **{"name": "", "encoder": "shapes-aesthetic", "votes": 4, "liked": 0, "disliked": 4, "pairs": 0}
    }
    unknown = node.fingerprint_inputs(name=None)
    assert unknown != unknown, "NaN: nothing is known, so it runs"


def test_alpha_is_flattened_and_the_first_picture_chooses_the_encoder(node, tastes):
    node.execute("photos", 1.0, liked=images(1, size=96))
    assert tastes.status("photos")["encoder"] == "aesthetic"
    node.execute("odd", 1.0, liked=images(1, size=96), encoder="shapes-judge")
    assert tastes.status("odd")["encoder"] == "shapes-judge"
    alpha = torch.cat([images(1), torch.zeros(1, 64, 64, 1)], dim=-1)
    node.execute("white", 1.0, liked=alpha, disliked=images(1))
    (vote,) = [vote for vote in tastes.find("white").votes() if vote.liked]
    assert tastes.find("white").picture(vote.image).min() == 1


@pytest.mark.parametrize("name", ["../x", "/etc", "", "a/b", "CON", "x\0y", 3])
def test_names_never_leave_the_folder(node, tastes, name):
    with pytest.raises(ValueError, match="got taste .*; expected a name of 1 to 80 letters"):
        node.execute(name, 1.0, liked=images(1), disliked=images(1, 1))
    assert "expected a name" in node.validate_inputs(name)
    assert not tastes.root.exists()


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({}, "got taste 'mine', which has no votes; expected one of those in output/tdpo_tastes: connect pictures"),
        ({"liked": images(1), "encoder": "python:os:x"}, "got encoder 'python:os:x'; expected one of auto, aesthetic"),
        ({"liked": images(1)[..., :1]}, "got images of 1 channels; expected 3"),
    ],
)
def test_what_cannot_be_voted_on_is_one_sentence_and_keeps_nothing(node, tastes, inputs, told):
    with pytest.raises(ValueError, match=told):
        node.execute("mine", 1.0, **inputs)
    assert not tastes.root.exists()


def test_pictures_are_shown_and_what_follows_waits_for_votes(node, runs, tastes):
    """First nothing but pictures, then votes by clicks, then a reward; the encoder is that of the widget."""
    pictures, shown = images(4), [file_of(picture) for picture in pictures_of(images(4))]

    def run(**more):
        (reward,) = (out := node.execute("mine", 1.0, pictures=pictures, encoder="shapes-judge", **more)).values
        (ballot,) = out.ui["tdpo_ballot"]
        return hasattr(reward, "weights"), ballot

    assert answers.ballot(runs, "mine", shown_in(runs)) == (200, {"pictures": []})
    is_reward, ballot = run(votes_needed=3)
    assert not is_reward and (ballot["votes"], ballot["needed"], ballot["encoder"]) == (0, 3, "shapes-judge")
    assert ballot["pictures"] == [{"file": file, "liked": None} for file in shown]
    before = node.fingerprint_inputs(name="mine")
    for file in shown[:3]:
        assert send(runs, {"picture": {"shown": file}, "liked": True})[0] == 200
    assert node.fingerprint_inputs(name="mine") != before
    assert not run(votes_needed=3)[0], "they are all liked"
    send(runs, {"picture": {"shown": shown[1]}, "liked": False})
    is_reward, ballot = run(votes_needed=3)
    assert is_reward and [picture["liked"] for picture in ballot["pictures"]] == [1, 0, 1, None]
    assert answers.ballot(runs, "mine", shown_in(runs)) == (200, ballot), "as a page asks that was reloaded"
    assert answers.ballot(runs, "../mine", shown_in(runs))[0] == 400
    assert not run(votes_needed=4)[0]
    kept = tastes.find("mine").picture(shown[0])
    assert torch.equal(kept, pictures_of(pictures)[0])


def test_a_node_without_pictures_leaves_those_of_another_with_its_taste(node, runs):
    shown = node.execute("mine", 1.0, pictures=images(4)).ui["tdpo_ballot"][0]
    liked = node.execute("mine", 1.0, liked=images(2), disliked=images(2, 1)).ui["tdpo_ballot"][0]
    assert (liked["pictures"], liked["votes"]) == ([], 4)
    status, told = answers.ballot(runs, "mine", shown_in(runs))
    assert status == 200 and [each["file"] for each in told["pictures"]] == [each["file"] for each in shown["pictures"]]


def test_without_pictures_too_few_votes_are_one_sentence(node):
    node.execute("mine", 1.0, liked=images(2), disliked=images(2, 1))
    told = "got 4 votes in taste 'mine'; expected at least 60: connect pictures to TDPO Taste and click"
    with pytest.raises(ValueError, match=told):
        node.execute("mine", 1.0, votes_needed=60)


def test_good_names_pass(node):
    assert node.validate_inputs("my taste") is True and node.validate_inputs(None) is True


# --- votes that a browser sends


@pytest.fixture
def grid(runs) -> Tensor:
    """The images, (5, 3, H, W), of a sample grid of the run `one` after epoch 1, drawn as runs draw them."""
    begin(runs, settings="output.grid_images = 5", text="a red circle\na blue star").wait(30)
    drawn = images(5, 3).movedim(-1, 1)
    save_image_grid(drawn, runs.folder("one").sample_grid(1))
    return drawn


def cell(row: int, col: int, **more) -> dict:
    return {"run": "one", "epoch": 1, "row": row, "col": col} | more


def shown_in(runs: Runs) -> TasteFolder:
    """Where the node keeps what it shows."""
    return TasteFolder(runs.root.parent / "temp" / "tdpo_shown")


def send(runs: Runs, body, name: str = "mine"):
    return answers.vote(runs, name, body if isinstance(body, str) else json.dumps(body), shown_in(runs))


def test_a_vote_on_a_cell_of_a_grid(runs, tastes, grid):
    status, told = send(runs, {"picture": cell(1, 0), "liked": True})
    assert (status, told["votes"], told["liked"]) == (200, 1, 1)
    (vote,) = tastes.find("mine").votes()
    assert torch.equal(tastes.find("mine").picture(vote.image), grid[3])
    assert vote.prompt == runs.find("one").grid_prompts(runs.find("one").config)[3] == "a blue star"
    assert send(runs, {"winner": cell(0, 1), "loser": cell(0, 2)})[1]["pairs"] == 1
    *_, pair = tastes.find("mine").votes()
    assert isinstance(pair, Pair) and torch.equal(tastes.find("mine").picture(pair.loser), grid[2])
    assert answers.taste(runs, "mine") == (200, tastes.status("mine"))


def test_a_vote_on_a_file_of_the_output_folder(runs, tastes):
    folder = runs.root.parent / "foxes"
    folder.mkdir(parents=True)
    Image.new("RGB", (96, 80), "red").save(folder / "a.png")
    status, told = send(runs, {"picture": {"file": "foxes/a.png"}, "liked": False, "prompt": "a fox"})
    assert (status, told["disliked"], told["encoder"]) == (200, 1, "aesthetic")
    (vote,) = tastes.find("mine").votes()
    assert vote == Thumb(vote.image, 0.0, "a fox")


def test_wrong_votes_are_one_sentence_and_add_nothing(runs, tastes, grid, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (runs.root.parent / "text.png").write_text("no picture")
    (runs.root.parent / "link.png").symlink_to(tmp_path / "secret.png")
    wrong = {
        "{": "that is not JSON",
        "[1]": "expected an object",
        "{}": "got the picture None; expected run, epoch",
        '{"picture": 3, "liked": true}': "got the picture 3; expected",
    }
    for body, told in wrong.items():
        assert_refused(send(runs, body), told)
    for place, told in (
        (cell(1, 2), "got row 1, column 2 of a grid of 5 images; expected rows 0 to 1"),
        (cell(-1, 0), "got row -1"),
        (cell(0, 0, epoch=9), "epoch 9 of run 'one', which has no sample grid"),
        (cell(0, 0, epoch="1"), "got the picture"),
        (cell(True, 0), "got the picture"),
        (cell(0, 0, run="../x"), "got run name"),
        ({"shown": "../secret.png"}, "which is not shown any more; expected one that TDPO Taste shows: press Run"),
        ({"shown": "gone.png"}, "got picture 'gone.png', which is not shown any more"),
        ({"file": "../secret.png"}, "expected an image in ComfyUI's output folder"),
        ({"file": str(tmp_path / "secret.png")}, "expected an image in ComfyUI's output folder"),
        ({"file": "link.png"}, "expected an image in ComfyUI's output folder"),
        ({"file": "a\0b"}, "expected an image in ComfyUI's output folder"),
        ({"file": "text.png"}, "cannot be read as an image"),
    ):
        assert_refused(send(runs, {"picture": place, "liked": True}), told)
    assert_refused(send(runs, {"picture": cell(0, 0), "liked": 1}), "got liked 1; expected true or false")
    assert_refused(send(runs, {"picture": cell(0, 0), "liked": True, "prompt": 1}), "got the prompt 1")
    assert_refused(send(runs, {"winner": cell(0, 0), "loser": cell(0, 0)}), "got the same picture as winner and loser")
    assert_refused(send(runs, {"picture": cell(0, 0), "liked": True}, "../x"), "got taste '../x'")
    assert send(runs, {"picture": cell(0, 0, run="two"), "liked": True})[0] == 404
    assert answers.taste(runs, "mine")[0] == 404
    assert not tastes.root.exists()


def assert_refused(answer, told: str) -> None:
    status, said = answer
    assert status == 400 and told in said["error"] and "\n" not in said["error"], said
    assert "/tmp" not in said["error"], "browsers may be on other machines"


@pytest.mark.parametrize("count", [1, 2, 5, 16])
@pytest.mark.parametrize("size", [(8, 8), (64, 64), (200, 130)], ids=str)
def test_what_a_grid_gives_back_is_what_went_in(tmp_path, count, size):
    drawn = torch.randint(256, (count, 3, *size), generator=torch.Generator().manual_seed(0)) / 255
    save_image_grid(drawn, tmp_path / "grid.png")
    found = {}
    for row in range(4):
        for column in range(4):
            try:
                index, image = image_in_grid(tmp_path / "grid.png", count, row, column)
            except ValueError:
                continue
            found[index] = torch.equal(image, drawn[index])
    assert found == dict.fromkeys(range(count), True)


def test_a_picture_is_liked_or_disliked_but_not_both(tastes):
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="got 1 of the pictures both as liked and as disliked; expected each as one"):
        tastes.vote("mine", [picture], [picture])
    assert not tastes.folder("mine").exists


def test_two_first_votes_at_once_are_both_kept(tastes):
    pictures = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda picture: tastes.vote("mine", [picture], []), pictures))
        list(pool.map(lambda picture: tastes.vote("mine", [pictures[0]], []), pictures))
    assert len(tastes.find("mine").counted()) == 16


def test_a_picture_that_is_no_such_grid_is_refused(tmp_path):
    save_image_grid(torch.zeros(4, 3, 64, 64), tmp_path / "grid.png")
    with pytest.raises(ValueError, match="is no grid of 17 images; expected the run's own file"):
        image_in_grid(tmp_path / "grid.png", 17, 0, 0)
    (tmp_path / "grid.png").write_bytes((tmp_path / "grid.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="which cannot be read"):
        image_in_grid(tmp_path / "grid.png", 4, 0, 0)


# --- runs on a taste


def test_a_train_node_takes_a_taste(tastes):
    choice = with_taste(RewardChoice({}), "mine", voted(tastes), 1.0)
    config = wanted(reward=choice).config()
    assert config.rewards == {"taste:mine": 1.0} and config.guards == ["shapes-alignment"]
    assert config.reward_weights == {"taste:mine": str(tastes.root / "mine")}
    with pytest.raises(ValueError, match="got reward 'taste:../x'; expected taste:NAME"):
        wanted(settings='guards = ["taste:../x"]').config()


def test_new_votes_are_noticed(runs, tastes):
    choice = with_taste(RewardChoice({}), "mine", voted(tastes), 1.0)
    asked = {"reward": choice, "settings": 'guards = []\noveroptimisation.reward = "none"'}
    assert begin(runs, **asked).wait(30).state == "finished"
    run, want = runs.find("one"), wanted(**asked)
    taste = load_reward("taste:mine", CPU, weights=choice.files)
    assert isinstance(taste, Taste)
    keep_tastes(run, {"taste:mine": taste})

    def chosen(resume: str) -> str:
        return choose(runs, "one", resume, want.config(), want.prompts()).run.path.name

    assert [chosen(resume) for resume in ("continue", "new", "as it is")] == ["one"] * 3
    voted(tastes, seed=5)
    assert [chosen(resume) for resume in ("continue", "new", "as it is")] == ["one-2", "one-2", "one"]
    because = choose(runs, "one", "continue", want.config(), want.prompts()).because
    assert because == "Run 'one' has finished, and taste:mine had 6 votes when the run started and has 12 now."
    message = runs.status(run)["message"]
    assert "Taste:mine had 6 votes when the run started and has 12 now" in message
    assert "it has no guard" in message and "no held-out reward is watched" in message


def test_a_taste_that_is_not_there(tastes):
    with pytest.raises(NoSuchTaste):
        tastes.find("mine")
