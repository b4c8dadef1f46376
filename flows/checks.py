"""What can be refused from names and paths alone, before a model is loaded or a server started."""

import glob
import re
from pathlib import Path

from extract.errors import Refusal
from flows.config import BUILT_IN, Run

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def refuse_bad_paths(run: Run) -> None:
    """Raise the first refusal that the run's paths give reason for."""
    refuse_missing_corpus(run.corpus)
    refuse_missing_model(run.model)
    refuse_taken_folder(run.out)
    if run.digest_key is not None:
        refuse_exposed_key(run.digest_key, run.out)


def refuse_missing_corpus(corpus: str) -> None:
    if corpus in BUILT_IN or corpus.startswith("hub:") or Path(corpus).exists():
        return
    if glob.has_magic(corpus):
        # Path.glob takes no absolute pattern
        if next(glob.iglob(corpus, recursive=True), None) is None:  # noqa: PTH207
            raise Refusal(f"a glob must match files; {corpus} matches none; check the pattern and the current folder")
        return
    raise Refusal(
        f"a corpus is a file, a folder, a glob, hub:NAME or demo; there is nothing at {corpus}; check the path"
    )


def refuse_missing_model(model: str) -> None:
    if model == "demo" or Path(model).is_dir():
        return
    if Path(model).exists():
        raise Refusal(f"a model is a folder with config.json and safetensors; {model} is a file; give its folder")
    if not _HUB_NAME.fullmatch(model) or model.startswith("."):
        raise Refusal(f"a model is a folder, a hub name or demo; there is no folder {model}; check the path")


def refuse_taken_folder(out: Path) -> None:
    if "://" in str(out) or re.match(r"\w{2,}:/", str(out)):
        raise Refusal(f"the output is a local folder; {out} is an address; give a path and copy the dataset afterwards")
    if out.is_file():
        raise Refusal(f"the output must be a folder; {out} is a file; give --out another name")
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if held and not held & {"manifest.json", "_work"}:
        raise Refusal(
            f"the output folder must be new, empty or hold the same run; {out} holds something else "
            f"({', '.join(sorted(held)[:3])}); give --out another folder"
        )


def refuse_exposed_key(key: Path, out: Path) -> None:
    if not key.is_file():
        raise Refusal(f"a digest key is a file; there is none at {key}; make one: head -c 32 /dev/urandom > {key}")
    if key.resolve().is_relative_to(out.resolve()):
        raise Refusal(f"the digest key must stay out of the dataset; {key} lies inside {out}; move it elsewhere")
