"""What git says of the checkout that this code is run from. Nothing heavy is imported here."""

import subprocess
from pathlib import Path

DIGITS = 10  # of a commit's name


def git(repository: Path, *words: str) -> str | None:
    """What git answers in a repository; None where it fails, or there is no git."""
    command = ["git", "-C", str(repository), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit_of(root: Path) -> str | None:
    """The commit of the checkout whose root this is; None of any other folder, as an installed
    package may lie in a checkout of another code."""
    if not (root / ".git").exists():
        return None
    return git(root, "rev-parse", f"--short={DIGITS}", "HEAD")


def changed_files(root: Path) -> list[str]:
    """The files of a checkout that differ from its commit."""
    return (git(root, "diff", "--name-only", "HEAD") or "").splitlines()
