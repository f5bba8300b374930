"""Which folders a new run may use, despite links, hidden files of file managers, and missing mounts."""

import os
from pathlib import Path

import pytest
from toy import new_run

from comfy_tdpo.trainer.__main__ import main
from comfy_tdpo.trainer.run import RunFolder
from comfy_tdpo.trainer.run.new_folder import make_folder, new_folder

links = pytest.mark.skipif(os.name == "nt", reason="on Windows links need a right of their own")


def tree(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_a_folder_that_others_have_only_looked_into_counts_as_empty(tmp_path):
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", ".directory", "._x", "prompts.txt", ".config.toml.partial"):
        (tmp_path / name).touch()
    assert make_folder(tmp_path) == (tmp_path, [])
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"which holds 'notes.txt'; expected a new or empty folder: choose another"):
        make_folder(tmp_path)


def test_what_was_made_for_a_run_that_never_began_goes_again(tmp_path):
    (tmp_path / "old").mkdir()
    before = tree(tmp_path)
    with new_folder(tmp_path / "old" / "new" / "run") as folder:
        assert folder.is_dir()
    assert tree(tmp_path) == before
    with new_folder(tmp_path / "old" / "new" / "run") as folder:
        (folder / "config.toml").touch()
    assert (folder / "config.toml").exists()


@pytest.mark.parametrize("name", ["", "run", "run/inner"])
@links
def test_a_link_to_nowhere_is_named_and_not_tried_for_ever(name, tmp_path):
    (tmp_path / "link").symlink_to("/no/such/mount")
    with pytest.raises(
        ValueError, match="link' is a link to '/no/such/mount', which does not exist; mount or create that"
    ):
        make_folder(tmp_path / "link" / name)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(ValueError, match="circle' is a link to '.*circle', which does not exist"):
        make_folder(tmp_path / "circle" / name)


@links
def test_the_default_place_is_looked_at_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to("/no/such/mount")
    with pytest.raises(ValueError, match="'runs' is a link to '/no/such/mount'"):
        make_folder(None)
    Path("runs").unlink()
    Path("runs").touch()
    with pytest.raises(ValueError, match="'runs' is a file; choose another"):
        make_folder(None)


@links
def test_a_link_to_a_folder_is_that_folder(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    folder, new = make_folder(tmp_path / "link" / "run")
    assert (tmp_path / "disk" / "run").is_dir() and new == [folder]


def test_a_run_does_not_go_into_another(tmp_path, monkeypatch):
    outer = new_run(tmp_path / "outer")
    with pytest.raises(ValueError, match=r"inside the run '.*outer'; choose one outside"):
        make_folder(outer.path / "samples" / "inner")
    monkeypatch.chdir(outer.path)
    with pytest.raises(ValueError, match=r"inside the run '.*outer'; choose one outside"):
        make_folder(None)
    (tmp_path / "config.toml").touch()  # of another program
    make_folder(tmp_path / "beside")


def test_a_place_where_nobody_may_write_is_refused_before_anything_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    for folder in (tmp_path, tmp_path / "run"):
        with pytest.raises(ValueError, match="cannot be created: you have no permission to write to"):
            make_folder(folder)
    with pytest.raises(ValueError, match="cannot be created: File name too long"):
        make_folder(Path("a" * 300))


def test_a_run_is_found_where_its_name_is_nearly_right(tmp_path):
    run = new_run(tmp_path / "runs" / "one")
    run.checkpoints.mkdir()
    for wrong in (run.path / "config.toml", run.checkpoints, tmp_path / "runs"):
        with pytest.raises(ValueError, match=r"did you mean '.*runs.one'\?") as error:
            RunFolder.open(wrong)
        assert str(wrong) in str(error.value)
    with pytest.raises(ValueError, match="expected the folder of a run, which has a config.toml$"):
        RunFolder.open(tmp_path / "none")
    with pytest.raises(ValueError, match="cannot be read: File name too long; check the path"):
        RunFolder.open(Path("a" * 300))


def test_a_tilde_is_the_home_folder_in_every_option(tmp_path, monkeypatch, capsys):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    new_run(home / "run")
    (home / "mine.toml").write_text('model = "~/model"\nprompts = "~/prompts.txt"\n')
    assert main(["--resume=~/run", "--print-config"]) == 0
    flags = ["--config=~/mine.toml", "--grid-prompts", "~/grid.txt", "--reward=hpsv2", "--reward-weights=hpsv2=~/w.pt"]
    assert main([*flags, "--print-config"]) == 0
    printed = capsys.readouterr().out
    for name in ("model", "prompts.txt", "grid.txt", "w.pt"):
        assert f'= "{home / name}"' in printed
    assert main(["--run-dir=~/run"]) == 2
    assert f"run directory '{home / 'run'}' holds a run" in capsys.readouterr().err
    assert tree(here) == []
