"""The folder of a taste: votes that are never lost, pictures as they were, and files of others as nothing but data."""

import itertools
import json
import threading
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

from comfy_tdpo.rewards import load_reward
from comfy_tdpo.rewards.taste import check_encoder, fit_folder
from comfy_tdpo.tastes.fitted import read_fitted
from comfy_tdpo.tastes.folder import TasteFolder
from comfy_tdpo.tastes.names import check_taste, name_of, usual_encoder
from comfy_tdpo.tastes.votes import Pair, Thumb, counted, from_line, to_line

CPU = torch.device("cpu")
ENCODER = "shapes-aesthetic"


def picture(seed: int) -> Tensor:
    """Levels of 8 bits in [0, 1]."""
    return torch.randint(256, (3, 64, 64), generator=torch.Generator().manual_seed(seed)) / 255


@pytest.fixture
def taste(tmp_path) -> TasteFolder:
    return TasteFolder.create(tmp_path / "mine", ENCODER)


def lines(taste: TasteFolder) -> list[str]:
    return (taste.path / "votes.jsonl").read_text(encoding="utf-8").splitlines()


VOTES = [Thumb("a.png", 1.0, "a red fox, 狐"), Thumb("b.png", 0.0), Thumb("c.png", 0.25), Pair("a.png", "b.png", "x")]


# --- votes


@pytest.mark.parametrize("vote", VOTES, ids=str)
def test_a_vote_is_read_as_it_was_written(vote):
    assert from_line(to_line(vote)) == vote and "\n" not in to_line(vote)


def test_votes_come_back_in_order_and_are_only_appended(taste):
    assert taste.append(VOTES[:2]) == 2
    before = (taste.path / "votes.jsonl").read_bytes()
    assert taste.append(VOTES[2:]) == 2
    assert taste.votes() == VOTES
    assert (taste.path / "votes.jsonl").read_bytes().startswith(before)
    assert json.loads(lines(taste)[0]) == {"image": "a.png", "liked": True, "prompt": "a red fox, 狐"}


@pytest.mark.parametrize("length", range(1, 40, 3))
def test_a_crash_in_mid_write_loses_only_that_vote(taste, length):
    taste.append(VOTES[:2])
    path = taste.path / "votes.jsonl"
    torn = to_line(Thumb("d.png", 1.0, "狐狐"))[:length].encode()[: length + 2]
    path.write_bytes(path.read_bytes() + torn)
    assert taste.votes() == VOTES[:2] and taste.cut_off() == 1
    taste.append(VOTES[2:])
    assert taste.votes() == VOTES, "the next vote begins a line of its own"


def test_a_last_line_that_lacks_only_its_end_counts(taste):
    taste.append(VOTES[:2])
    path = taste.path / "votes.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    taste.append(VOTES[2:3])
    assert taste.votes() == VOTES[:3] and taste.cut_off() == 0


def test_the_last_vote_on_a_picture_counts_and_repeats_add_nothing(taste):
    taste.append([Thumb("a.png", 1.0), Pair("a.png", "b.png")])
    assert taste.append([Thumb("a.png", 1.0), Pair("a.png", "b.png")]) == 0
    assert taste.append([Thumb("a.png", 0.0), Pair("b.png", "a.png")]) == 2
    assert len(lines(taste)) == 4, "nothing is taken away"
    assert taste.counted() == [Thumb("a.png", 0.0), Pair("b.png", "a.png")]


def test_a_vote_waits_for_the_one_before(taste):
    voter = threading.Thread(target=taste.append, args=(VOTES,))
    with FileLock(taste.path / ".lock"):
        voter.start()
        voter.join(0.3)
        assert voter.is_alive() and taste.votes() == []
    voter.join(30)
    assert taste.votes() == VOTES


def test_many_may_vote_at_once(taste):
    def vote(voter: int) -> None:
        for i in range(10):
            TasteFolder(taste.path).append([Thumb(f"{voter}-{i}.png", 1.0)])

    voters = [threading.Thread(target=vote, args=(voter,)) for voter in range(4)]
    for voter in voters:
        voter.start()
    for voter in voters:
        voter.join()
    assert len(taste.votes()) == 40 and taste.cut_off() == 0


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("[1]", r"got '\[1\]'; expected \{\"image\""),
        ("{}", "got None as a picture"),
        ('{"image": "../../secret.png", "liked": true}', "got '../../secret.png' as a picture"),
        ('{"image": "/etc/passwd", "liked": true}', "got '/etc/passwd' as a picture"),
        ('{"image": "C:\\\\x.png", "liked": true}', "as a picture"),
        ('{"image": "..", "liked": true}', "as a picture"),
        ('{"image": 3, "liked": true}', "got 3 as a picture"),
        ('{"image": "a.png"}', "got liked None; expected true, false or a number from 0 to 1"),
        ('{"image": "a.png", "liked": 2}', "got liked 2"),
        ('{"image": "a.png", "liked": NaN}', "got liked nan"),
        ('{"image": "a.png", "liked": "yes"}', "got liked 'yes'"),
        ('{"image": "a.png", "liked": true, "prompt": 3}', "got the prompt 3; expected text"),
        ('{"winner": "a.png"}', "got None as a picture"),
        ('{"winner": "a.png", "loser": "a.png"}', "as both winner and loser"),
    ],
)
def test_a_line_that_is_no_vote_is_one_sentence_with_its_number(taste, line, complaint):
    taste.append(VOTES[:1])
    with (taste.path / "votes.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(
        ValueError, match=rf"votes '.*votes.jsonl', line 2: .*{complaint}.*; correct or remove"
    ) as error:
        taste.votes()
    assert "\n" not in str(error.value)


# --- the folder


def test_pictures_are_kept_once_and_exactly(taste):
    name = taste.keep(picture(0))
    assert taste.keep(picture(0)) == name != taste.keep(picture(1))
    assert torch.equal(taste.picture(name), picture(0))
    assert len(list((taste.path / "images").iterdir())) == 2, "and nothing half written"
    levels = torch.full((3, 4, 4), 100.4)
    levels[0] += 0.2
    seen = taste.picture(taste.keep(levels / 255)) * 255
    assert seen.round()[:, 0, 0].tolist() == [101, 100, 100], "rounded to the nearest level"


def test_an_encoder_is_fixed(taste):
    assert TasteFolder.create(taste.path, ENCODER).encoder == ENCODER
    with pytest.raises(ValueError, match="got encoder 'aesthetic' for the taste .* by 'shapes-aesthetic'"):
        TasteFolder.create(taste.path, "aesthetic")


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises(ValueError, match="which is no taste; expected a new or empty folder"):
        TasteFolder.create(tmp_path, ENCODER)
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("about", ["", "[]", '{"format": 1}', "[" * 9999])
def test_a_damaged_description_is_one_sentence(taste, about):
    (taste.path / "taste.json").write_text(about)
    with pytest.raises(ValueError, match="whose taste.json cannot be read .* restore that file"):
        _ = taste.encoder


def test_a_newer_format_says_what_to_do(taste):
    (taste.path / "taste.json").write_text('{"format": 2, "encoder": "x"}')
    with pytest.raises(ValueError, match="in format 2; expected 1: update comfy_tdpo"):
        _ = taste.encoder


@pytest.mark.parametrize("name", ["python:os:getcwd", "taste:mine", "jpeg-compressibility", "shapes-gold", "nice", ""])
def test_only_an_encoder_of_the_registry_reads_pictures(name):
    with pytest.raises(ValueError, match=r"got encoder .*; expected a reward with an image encoder"):
        check_encoder(name)


def test_names():
    assert name_of(Path("/x/my style")) == "taste:my style"
    assert name_of(Path("/x/a=b,(c).safetensors")) == "taste:a-b--c"
    assert name_of(Path("/x/...")) == "taste:unnamed"
    for path in ("/x/my style", "/x/a=b,(c).safetensors", "/x/..."):
        check_taste(name_of(Path(path)))
    for bad in ("taste:", "taste:../x", "taste:/etc", "taste:a\nb", "taste:-x"):
        with pytest.raises(ValueError, match="expected taste:NAME"):
            check_taste(bad)
    assert usual_encoder(64, 64) == "shapes-aesthetic" and usual_encoder(64, 512) == "aesthetic"


# --- fitting


def filled(path: Path, order: list[int]) -> TasteFolder:
    """Six pictures and a pair, voted on in this order."""
    taste = TasteFolder.create(path, ENCODER)
    names = [taste.keep(picture(i)) for i in range(6)]
    votes = [Thumb(name, float(i % 2)) for i, name in enumerate(names)] + [Pair(names[0], names[3])]
    taste.append([votes[i] for i in order])
    return taste


def test_the_order_of_votes_makes_no_difference(tmp_path):
    encoder = load_reward(ENCODER, CPU)
    prints = set()
    for number, order in enumerate(itertools.islice(itertools.permutations(range(7)), 0, 5040, 997)):
        taste = filled(tmp_path / str(number), list(order))
        fitted = fit_folder(taste, encoder, CPU, "fp32")
        prints.add((fitted.fingerprint, fitted.digest, fitted.votes))
    assert len(prints) == 1


def test_embeddings_are_a_cache_that_may_be_lost_or_damaged(tmp_path):
    encoder = load_reward(ENCODER, CPU)
    taste = filled(tmp_path / "a", list(range(7)))
    first = fit_folder(taste, encoder, CPU, "fp32").fingerprint
    (cache,) = (taste.path / "embeddings").iterdir()
    kept = load_file(cache)
    name, embed = next(iter(kept.items()))
    torch.testing.assert_close(embed, encoder.embed(taste.picture(name)[None])[0])
    cache.write_bytes(cache.read_bytes()[:50])
    assert fit_folder(taste, encoder, CPU, "fp32").fingerprint == first
    cache.unlink()
    assert fit_folder(taste, encoder, CPU, "fp32").fingerprint == first
    for image in (taste.path / "images").iterdir():
        image.write_bytes(b"x")
    assert fit_folder(taste, encoder, CPU, "fp32").fingerprint == first, "pictures are embedded once"
    cache.unlink()
    with pytest.raises(ValueError, match="got a vote on '.*png', which cannot be read .* expected a picture"):
        fit_folder(taste, encoder, CPU, "fp32")


@pytest.mark.parametrize(
    ("votes", "told"), [([], "with 0 votes;"), ([Thumb("a", 1.0)], "with 1 vote, all of liked pictures; expected")]
)
def test_votes_without_contrast_teach_nothing_and_say_so(taste, votes, told):
    name = taste.keep(picture(0))
    taste.append([Thumb(name, vote.liked) for vote in votes])
    with pytest.raises(ValueError, match=told):
        fit_folder(taste, load_reward(ENCODER, CPU), CPU, "fp32")


def test_a_fitted_file_is_the_taste_to_the_last_bit(tmp_path):
    taste = filled(tmp_path / "a", list(range(7)))
    fitted = fit_folder(taste, load_reward(ENCODER, CPU), CPU, "fp32")
    fitted.save(tmp_path / "a.safetensors")
    again = read_fitted(tmp_path / "a.safetensors")
    assert again.fingerprint == fitted.fingerprint
    assert (again.encoder, again.votes, again.digest) == (ENCODER, 7, fitted.digest)
    content = (tmp_path / "a.safetensors").read_bytes()
    for damaged in (content[:100], content[: len(content) // 2], b"", content.replace(b"covariance", b"covarianze")):
        (tmp_path / "b.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="as a taste, which cannot be read"):
            read_fitted(tmp_path / "b.safetensors")
    mean = fitted.head.mean.numpy().tobytes()
    (tmp_path / "b.safetensors").write_bytes(content.replace(mean, b"\xff" * len(mean)))
    with pytest.raises(ValueError, match="whose mean is .* not finite"):
        read_fitted(tmp_path / "b.safetensors")


def test_counted_is_sorted():
    assert counted(VOTES[::-1]) == counted(VOTES)
