"""Upload a finished dataset to the Hugging Face hub."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from attlas.extract.errors import Refusal, first_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from attlas.analysis.dataset import Dataset
    from attlas.extract.store import Location

_OF_TEXT = ("token_ids", "text")  # columns from which the corpus can be read
_BESIDE = {".gitattributes", "README.md"}  # what a new repository may hold


def push(
    location: "Location",
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    with_text: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> str:
    """Verify a dataset, upload what its manifest names, its card and, last, the manifest; returns the address.

    A repository that does not exist is created. Raises Refusal, before anything is sent, for a hub that can't be reached or does not
    know the token, a damaged dataset, text or token ids unless `with_text`, and a repository that holds something else.
    """
    refuse_bad_name(name)
    api = connect()
    from attlas.analysis.dataset import Dataset

    dataset = Dataset.open(location)
    refuse_earlier_generation(dataset)
    progress("verify")
    refuse_damaged(dataset)
    if not with_text:
        refuse_text(dataset)
    with hub_refusals(name):
        api.create_repo(name, repo_type="dataset", private=private or None, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(name, branch=revision, repo_type="dataset", exist_ok=True)
        refuse_foreign(name, api.list_repo_files(name, repo_type="dataset", revision=revision))
    progress("upload")
    with local_files(dataset) as folder:
        upload(api, dataset, folder, name, revision=revision)
    address = f"{api.endpoint}/datasets/{name}"
    return address if revision is None else f"{address}/tree/{revision}"


def upload(api: "HfApi", dataset: "Dataset", folder: Path, name: str, *, revision: str | None) -> None:
    """Upload the parts, then card and manifest. Without its manifest, what an interrupted upload left is no dataset."""
    from attlas.extract.store import CARD, MANIFEST
    from attlas.extract.tables import TABLES

    parts = [part.path for table in dataset.tables for part in dataset.parts(table)]
    earlier = [f"{table}/*.parquet" for table in TABLES] + [MANIFEST]
    where = {"repo_id": name, "repo_type": "dataset", "folder_path": str(folder), "revision": revision}
    api.upload_folder(
        **where, allow_patterns=parts, delete_patterns=earlier, commit_message="Parts of a dataset by attlas"
    )
    api.upload_folder(**where, allow_patterns=[CARD, MANIFEST], commit_message="Card and manifest")


def refuse_earlier_generation(dataset: "Dataset") -> None:
    """Raise Refusal for a generation that is not the newest one, of which card and manifest are."""
    from attlas.extract.store import generation_of, generations

    number, newest = generation_of(dataset.manifest), generations(dataset.storage)[-1]
    if number != newest:
        raise Refusal(
            f"the newest generation of a dataset is pushed, {newest}; got {number}; give the folder without @{number}"
        )


@contextmanager
def local_files(dataset: "Dataset") -> Iterator[Path]:
    """The folder of a dataset, or a temporary one with copies of what is uploaded, for a dataset in an object store."""
    from attlas.extract.store import CARD, MANIFEST, LocalFolder

    if isinstance(dataset.storage, LocalFolder):
        yield dataset.storage.root
        return
    with TemporaryDirectory(prefix="attlas-push-") as temporary:
        parts = [part.path for table in dataset.tables for part in dataset.parts(table)]
        for key in (*parts, CARD, MANIFEST):
            path = Path(temporary, key)
            path.parent.mkdir(exist_ok=True)
            with dataset.storage.open(key) as source, path.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 22)
        yield Path(temporary)


def connect() -> "HfApi":
    """The hub, with a token that it knows. Raises Refusal if it is switched off, can't be reached, or there is no such token."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise Refusal("a push needs the hub; HF_HUB_OFFLINE keeps attlas from it; unset it")
    if huggingface_hub.get_token() is None:
        raise Refusal(
            "a push needs a token of the hub that may write; there is none; set HF_TOKEN, or run hf auth login"
        )
    api = huggingface_hub.HfApi(library_name="attlas")
    with hub_refusals():
        api.whoami()
    return api


@contextmanager
def hub_refusals(name: str = "") -> Iterator[None]:
    """Turn errors of the hub into Refusals that say what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    of = f" of {name}" if name else ""
    try:
        yield
    except HFValidationError as error:
        raise Refusal(f"a dataset on the hub is OWNER/NAME; {first_line(error)}; choose another name") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = {
            401: "give a token that it knows: HF_TOKEN, or hf auth login",
            403: "give a token that may write there",
            404: "check the name and the revision",
        }.get(status, "try again later")
        raise Refusal(f"a push needs a hub that takes it; it answers with status {status}{of}; {advice}") from error
    # its bases are the errors of the HTTP library, which differs between versions of huggingface_hub
    except HfHubHTTPError.__bases__ as error:  # pyright: ignore[reportGeneralTypeIssues]
        raise Refusal(f"a push needs the hub; it can't be reached ({first_line(error)}); check the network") from error


def refuse_bad_name(name: str) -> None:
    """Raise Refusal for anything but OWNER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    with hub_refusals():
        if name.count("/") != 1:
            raise HFValidationError(f"got {name!r}")
        validate_repo_id(name)


def refuse_text(dataset: "Dataset") -> None:
    """Raise Refusal for a dataset from which its corpus can be read."""
    columns = [
        f"{table}.{column}"
        for table in dataset.tables
        for column in dataset.part_schema(table).names
        if column in _OF_TEXT
    ]
    if columns:
        raise Refusal(
            f"a push reveals no text; this dataset has {' and '.join(columns)}; measure with --tokens classes, or push --with-text"
        )


def refuse_damaged(dataset: "Dataset") -> None:
    """Raise Refusal for a dataset that is not as its manifest says, or has no card."""
    from attlas.analysis.verify import findings_in
    from attlas.extract.store import CARD

    findings = findings_in(dataset)
    if findings:
        raise dataset.refusal(f"{findings[0]}" + (f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""))
    if dataset.storage.size(CARD) is None:
        raise Refusal(
            f"a dataset on the hub has a card; {dataset.storage.place(CARD)} is missing; run attlas run again"
        )


def refuse_foreign(name: str, files: list[str]) -> None:
    """Raise Refusal for a repository with files of something else."""
    from attlas.extract.store import MANIFEST
    from attlas.extract.tables import TABLES

    others = [file for file in files if file not in _BESIDE and file.partition("/")[0] not in TABLES]
    if MANIFEST not in files and others:
        raise Refusal(
            f"a repository holds one dataset; {name} holds something else ({others[0]}); push to another name"
        )
