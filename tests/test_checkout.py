"""The commit of the code, as git tells it."""

import subprocess
from pathlib import Path

from taming_dist.checkout import changed_files, commit_of, git


def committed(folder: Path) -> None:
    (folder / "file").write_text("one")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "a commit"]):
        command = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *words]
        subprocess.run(command, check=True)


def test_a_checkout_has_a_commit_and_the_files_that_differ_from_it(tmp_path: Path) -> None:
    committed(tmp_path)
    commit = commit_of(tmp_path)
    assert commit is not None
    assert len(commit) >= 10
    assert (git(tmp_path, "rev-parse", "HEAD") or "").startswith(commit)
    assert changed_files(tmp_path) == []
    (tmp_path / "file").write_text("two")
    assert changed_files(tmp_path) == ["file"]


def test_a_folder_inside_another_checkout_has_no_commit_of_its_own(tmp_path: Path) -> None:
    committed(tmp_path)
    inside = tmp_path / "installed"
    inside.mkdir()
    assert commit_of(inside) is None


def test_git_that_fails_says_nothing(tmp_path: Path) -> None:
    assert git(tmp_path, "rev-parse", "HEAD") is None
