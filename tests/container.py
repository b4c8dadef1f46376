"""`python -m tests.container ROOT`: run what the Containerfile runs in a new Debian root, for machines that can't pull its base image.

Needs root and debootstrap. ROOT is made, and holds the installed attlas afterwards. Python of Debian 12 stands for that of the base image.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1]
# how this machine reaches the registries
_SETTINGS = (
    "etc/pip.conf",
    "etc/xdg/pip",
    "etc/resolv.conf",
    "etc/hosts",
    "etc/ssl/certs/ca-certificates.crt",
    "opt/wheels",
)


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """The instructions of a Containerfile, and their arguments, with continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", text)
    for line in joined.splitlines():
        if line.strip() and not line.startswith("#"):
            name, _, arguments = line.partition(" ")
            yield name, arguments


def build(root: Path) -> tuple[dict[str, str], str]:
    """Follow the instructions in a new root; returns the environment and the user of its processes."""
    found = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)"], capture_output=True, text=True, check=True
    )
    what = [
        "--variant=minbase",
        "--include=python3-venv,ca-certificates",
        "bookworm",
        str(root),
        found.stdout.split()[0],
    ]
    subprocess.run(["debootstrap", *what], check=True)
    (root / "usr/bin/python").symlink_to("python3")
    for name in _SETTINGS:
        if Path("/", name).is_dir():
            shutil.copytree(Path("/", name), root / name, dirs_exist_ok=True)
        elif Path("/", name).is_file():
            shutil.copy(Path("/", name), root / name)
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    environment, user = {"PATH": "/usr/local/bin:/usr/bin:/bin", **pip}, "0"
    for folder in ("proc", "dev"):
        subprocess.run(["mount", "--rbind", f"/{folder}", str(root / folder)], check=True)
    for name, arguments in instructions((SOURCE / "Containerfile").read_text()):
        if name == "ARG":
            key, _, value = arguments.partition("=")
            environment[key] = value
        elif name == "ENV":
            for pair in arguments.split():
                key, _, value = pair.partition("=")
                environment[key] = value.replace(f"${key}", environment.get(key, ""))
        elif name == "COPY":
            target = arguments.split()[1]
            files = subprocess.run(
                ["git", "ls-files", "-z"], cwd=SOURCE, capture_output=True, text=True, check=True
            ).stdout
            for file in filter(None, files.split("\0")):
                (root / target[1:] / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(SOURCE / file, root / target[1:] / file, follow_symlinks=False)
        elif name == "RUN":
            print(f"== {arguments}", flush=True)
            run(root, environment, arguments, user=user)
        elif name == "USER":
            user = arguments
    return environment, user


def run(root: Path, environment: dict[str, str], command: str, *, user: str) -> None:
    chroot = [shutil.which("chroot") or "chroot", f"--userspec={user}:{user}", str(root), "/bin/sh", "-ec", command]
    subprocess.run(chroot, env=environment, check=True)


def main() -> None:
    root = Path(sys.argv[1])
    try:
        environment, user = build(root)
        measure = "attlas run --model demo --corpus demo --limit 3 --max-length 64 --out /data/demo && attlas verify /data/demo"
        run(root, environment, f"cd /data && {measure}", user=user)
    finally:
        for folder in ("proc", "dev"):
            subprocess.run(["umount", "-l", str(root / folder)], check=False)


if __name__ == "__main__":
    main()
