"""The command `taste`: votes from folders and tables, and what it says of wrong ones."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from comfy_tdpo.tastes.folder import TasteFolder
from comfy_tdpo.tastes.votes import Thumb
from comfy_tdpo.trainer.__main__ import main
from comfy_tdpo.trainer.terminal.vote_files import Opinion, opinions_in, opinions_of


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """Folders `liked`, of dark pictures, and `disliked`, of bright ones, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, level in (("liked", 20), ("disliked", 200)):
        (tmp_path / name).mkdir()
        for i in range(4):
            noise = torch.randint(40, (64, 64, 3), generator=torch.Generator().manual_seed(level + i))
            Image.fromarray((level + noise).byte().numpy()).save(tmp_path / name / f"{i}.png")
    return tmp_path


def votes(name: str = "mine") -> list:
    return TasteFolder(Path("tastes") / name).votes()


def table(text: str, name: str = "ratings.csv") -> Path:
    Path(name).write_text(text, encoding="utf-8")
    return Path(name)


FOLDERS = ["--liked", "liked", "--disliked", "disliked"]


# --- the command


def test_folders_become_a_taste(capsys):
    Path("liked/notes.txt").write_text("passed over")
    Path("liked/.hidden.png").write_text("passed over")
    Path("liked/inner").mkdir()
    assert main(["taste", "mine", *FOLDERS]) == 0
    out = capsys.readouterr().out
    assert "votes     8: 4 liked, 4 disliked, 0 rated between, 0 pairs; 8 new" in out
    assert "sure      it predicts 8 of 8 votes from the others, and expects to order " in out
    assert out.endswith("use it    --reward taste:tastes/mine\n")
    assert sorted(vote.liked for vote in votes()) == [0.0] * 4 + [1.0] * 4
    assert TasteFolder(Path("tastes/mine")).encoder == "shapes-aesthetic"
    assert main(["taste", "tastes/mine", "--liked", "liked"]) == 0
    assert "; 0 new" in capsys.readouterr().out and len(votes()) == 8
    assert main(["taste", "mine"]) == 0
    assert "votes     8: " in capsys.readouterr().out


def test_a_table_becomes_a_taste(capsys):
    table("rating;image;prompt\n1;liked/0.png;a  red\tfox\n3;liked/1.png;\n\n5;disliked/0.png;a dog")
    assert main(["taste", "./mine", "--ratings", "ratings.csv", "--encoder", "shapes-judge"]) == 0
    assert "3: 1 liked, 1 disliked, 1 rated between, 0 pairs; 3 new" in capsys.readouterr().out
    found = TasteFolder(Path("mine")).votes()
    assert [(vote.liked, vote.prompt) for vote in found] == [(0.0, "a red fox"), (0.5, ""), (1.0, "a dog")]


def test_a_taste_without_contrast_keeps_its_votes_and_says_what_it_lacks(capsys):
    assert main(["taste", "mine", "--liked", "liked"]) == 0
    assert (
        "not yet   got the taste 'tastes/mine' with 4 votes, all of liked pictures; expected" in capsys.readouterr().out
    )
    assert len(votes()) == 4


def test_lines_cut_off_in_mid_write_are_counted(capsys):
    assert main(["taste", "mine", *FOLDERS]) == 0
    with Path("tastes/mine/votes.jsonl").open("a") as file:
        file.write('{"image": "0')
    assert main(["taste", "mine"]) == 0
    out = capsys.readouterr().out
    assert "votes     8: " in out and "damaged   1 line cut off in mid-write" in out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "got the taste 'tastes/mine', which does not exist; expected one, or pictures"),
        (["--liked", "nowhere"], "got 'nowhere', which cannot be read: No such file"),
        (["--liked", "empty"], "got 'empty', which holds no pictures"),
        (["--liked", "liked", "--disliked", "damaged"], "damaged/x.png cannot be read as an image"),
        (["--liked", "liked", "--disliked", "liked"], "the same picture, with different votes; expected one"),
        (
            ["--liked", "liked", "--encoder", "shapes-gold"],
            "got encoder 'shapes-gold'; expected a reward with an image",
        ),
        (["--ratings", "nowhere.csv"], "'nowhere.csv' cannot be read"),
        (
            ["--liked", "liked", "--encoder", "shapes-aesthetic", "--reward-weights", "hpsv2=x"],
            "got --reward-weights for hpsv2; expected a reward that is used here (shapes-aesthetic)",
        ),
        (["--likes", "liked"], "unrecognized arguments: --likes liked; `taste --help` lists all options"),
    ],
)
def test_wrong_input_is_one_sentence_and_changes_nothing(capsys, flags, told):
    Path("empty").mkdir()
    Path("damaged").mkdir()
    Path("damaged/x.png").write_text("no picture")
    try:
        status = main(["taste", "mine", *flags])
    except SystemExit as error:
        status = error.code
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and told in line
    assert not Path("tastes").exists()


def test_wrong_input_leaves_the_votes_there_are(capsys):
    assert main(["taste", "mine", *FOLDERS]) == 0
    before = Path("tastes/mine/votes.jsonl").read_bytes()
    Path("disliked/9.png").write_bytes(Path("disliked/0.png").read_bytes()[:200])
    assert main(["taste", "mine", *FOLDERS]) == 2
    assert main(["taste", "mine", "--liked", "liked", "--encoder", "shapes-judge"]) == 2
    assert "reads its pictures by 'shapes-aesthetic'" in capsys.readouterr().err
    assert Path("tastes/mine/votes.jsonl").read_bytes() == before


# --- tables


def test_ratings_are_shares_of_the_range_in_the_table():
    found = opinions_of(table("Image,Rating\na.png,-2\nb.png,0\nc.png,8\n"))
    assert found == [Opinion(Path(name), liked) for name, liked in (("a.png", 0.0), ("b.png", 0.2), ("c.png", 1.0))]


def test_paths_are_relative_to_the_table(place):
    Path("sub").mkdir()
    text = f"image\trating\tprompt\nx.png\t1\t\n{place / 'y.png'}\t2\ta, b\n"
    assert [opinion.path for opinion in opinions_of(table(text, "sub/t.csv"))] == [Path("sub/x.png"), place / "y.png"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "begins with ''; expected a header with the columns image and rating"),
        ("picture,rating\na,1", "begins with 'picture,rating'; expected a header"),
        ("image,rating\n", "has 0 ratings and no two that differ"),
        ("image,rating\na.png,3\nb.png,3", "has 2 ratings and no two that differ; expected at least two"),
        ("image,rating\na.png,good\nb.png,1", "has the rating 'good' in line 2; expected a number"),
        ("image,rating\na.png,nan\nb.png,1", "has the rating 'nan' in line 2; expected a number"),
        ("image,rating\na.png,1,x", "has 3 fields in line 2; expected 2"),
        ('image,rating\n"a.png,1', "cannot be parsed at line 2"),
        ("%PDF-1.4", "is a PDF document"),
    ],
)
def test_a_wrong_table_is_one_sentence(text, told):
    with pytest.raises(ValueError, match="'ratings.csv'") as error:
        opinions_of(table(text))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_only_pictures_in_a_folder_count():
    Path("liked/x.webp").write_bytes(b"")
    assert [opinion.path.name for opinion in opinions_in(Path("liked"), 1.0)] == [
        *(f"{i}.png" for i in range(4)),
        "x.webp",
    ]


def test_thumbs_are_votes_with_the_picture_as_people_see_it():
    grey = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    Path("odd").mkdir()
    grey.save("odd/a.png")
    assert main(["taste", "mine", "--liked", "odd", "--encoder", "shapes-aesthetic"]) == 0
    (vote,) = votes()
    assert isinstance(vote, Thumb) and TasteFolder(Path("tastes/mine")).picture(vote.image).min() == 1
