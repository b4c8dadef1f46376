"""Checks of `attlas view` before a model is loaded."""

from pathlib import Path

from attlas.extract.errors import Refusal
from attlas.flows.checks import refuse_missing_model

# the first bytes of a page have it
_MARK = b'<meta name="generator" content="attlas view">'


def refuse_bad_view(model: str, *, text: str | None, file: Path | None, image: Path | None, stacks: str) -> None:
    """Raise Refusal for the first problem that shows without the model."""
    given = [name for name, value in (("TEXT", text), ("--file", file), ("--image", image)) if value is not None]
    if len(given) != 1:
        raise Refusal(
            f"a view is of one TEXT, --file or --image; got {' and '.join(given) or 'none'}; give one of them"
        )
    if stacks not in ("encoder", "all"):
        raise Refusal(f"--stacks must be one of encoder, all; got {stacks!r}; choose one of them")
    if image is not None and stacks == "all":
        raise Refusal("an image has no tokens for a decoder; --stacks all can't be asked of it; leave it out")
    refuse_missing_model(model)


def refuse_foreign_page(page: Path) -> None:
    """Raise Refusal if a file that the user did not name exists and is not a page of `attlas view`."""
    if not page.is_file():
        return
    with page.open("rb") as file:
        is_ours = _MARK in file.read(400)
    if not is_ours:
        raise Refusal(
            f"a page is written to {page.name} unless --out names it; that file is something else; use --out FILE"
        )
