"""What can be refused from names and paths alone, before a model is loaded or a server started."""

import re
from pathlib import Path

from extract.errors import Refusal
from extract.store import Store
from flows.config import Run

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def refuse_bad_paths(run: Run) -> None:
    """Raise the first refusal that the run's paths give reason for."""
    refuse_bad_corpus(run)
    refuse_missing_model(run.model, trust_remote_code=run.trust_remote_code)
    # first, since a key in the output folder also makes it a folder that holds something else
    if run.digest_key is not None:
        refuse_exposed_key(run.digest_key, run.out)
    refuse_taken_folder(run.out)


def refuse_bad_corpus(run: Run) -> None:
    """Open local files as the run will, and close them; a hub is asked only by the run itself."""
    from extract.corpus import open_corpus

    if not run.corpus.startswith("hub:"):
        open_corpus(run.corpus, text_column=run.text_column, unit=run.unit, limit=run.limit, strict=run.strict)


def refuse_missing_model(model: str, *, trust_remote_code: bool = False) -> None:
    """Refuse a model that is nowhere, and a folder or file that can be seen to be no model."""
    from extract.model_code import is_model_code
    from extract.model_folder import check_model_name

    if model == "demo":
        return
    if Path(model).is_dir() or is_model_code(model):
        check_model_name(model, trust_remote_code=trust_remote_code)
        return
    if Path(model).exists():
        raise Refusal(f"a model is a folder with config.json and safetensors; {model} is a file; give its folder")
    if not _HUB_NAME.fullmatch(model) or model.startswith("."):
        raise Refusal(f"a model is a folder, a hub name or demo; there is no folder {model}; check the path")


def refuse_taken_folder(out: Path) -> None:
    if "://" in str(out) or re.match(r"\w{2,}:/", str(out)):
        raise Refusal(f"the output is a local folder; {out} is an address; give a path and copy the dataset afterwards")
    Store(out).refuse_foreign()


def refuse_exposed_key(key: Path, out: Path) -> None:
    if not key.is_file():
        raise Refusal(f"a digest key is a file; there is none at {key}; make one: head -c 32 /dev/urandom > {key}")
    if key.resolve().is_relative_to(out.resolve()):
        raise Refusal(f"the digest key must stay out of the dataset; {key} lies inside {out}; move it elsewhere")
