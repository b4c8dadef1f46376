"""An architecture through `attlas run`: saved, loaded as the command does, and a short corpus measured.

`python -m tests.census.through_run [model_type … | text | multimodal]` prints a line of each.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from attlas.extract.capture.tensors import first_tensor
from attlas.extract.errors import CaptureError, Refusal
from attlas.extract.measurement import measure
from attlas.extract.options import RunOptions
from tests.census.pool import each, in_a_process
from tests.census.shrink import FIRST_ID, TOKENS, VOCABULARY
from tests.census.tiny import Built, NotBuilt, architectures, build, reason_of
from tests.extract.runs import complete_run

YES, NO_IDS = "yes", ""
AS_IN_A_BATCH = "yes; the model itself gives other numbers in a batch than alone"
DRAWS = "yes, but for numbers that the model draws at random each time"
TOLERANCE = 1e-4
# of three lengths, so that a batch is padded; no word twice in a row
LENGTHS = (11, 17, 5)
SPECIAL = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}


def through_run(model_type: str) -> str:
    """YES with what must be said beside it, NO_IDS of a model that reads no ids of a tokenizer, or why it can't be measured."""
    built = build(model_type)
    if isinstance(built, NotBuilt) or not reads_ids(built):
        return NO_IDS
    with TemporaryDirectory() as folder:
        try:
            return _measured(built, Path(folder)) or YES
        except (CaptureError, Refusal) as error:
            return _without(folder, str(error))
        except Exception as error:
            return _without(folder, f"fails: {reason_of(error)}")


def reads_ids(built: Built) -> bool:
    ids = built.inputs.get("input_ids")
    return ids is not None and ids.dim() == 2


def _measured(built: Built, folder: Path) -> str | None:
    """Run it; what is wrong with the dataset, or None."""
    model: Any = built.model
    model.save_pretrained(folder / "model")
    tokenizer = tokenizer_of(model)
    tokenizer.save_pretrained(folder / "model")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(documents()), "utf-8")
    options = RunOptions(
        model=str(folder / "model"), corpus=str(corpus), out=folder / "out", unit="line", device="cpu", dtype="float32"
    )
    complete_run(options)
    return _difference(_rows(options.out), built.model, tokenizer)


def documents() -> Iterator[str]:
    """Words that the tokenizer knows, a document to a line."""
    generator = np.random.default_rng(0)
    for length in LENGTHS:
        yield " ".join(_word(n) for n in generator.permutation(VOCABULARY - FIRST_ID)[:length] + FIRST_ID)


def tokenizer_of(model: nn.Module) -> PreTrainedTokenizerFast:
    """An id to a word, the special ones where the configuration has them."""
    config: Any = model.config
    ids = {name: getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk")}
    ids = {name: value if isinstance(value, int) and value >= 0 else TOKENS[name] for name, value in ids.items()}
    words = {_word(n): n for n in range(VOCABULARY) if n not in ids.values()}
    vocabulary = words | {f"<{name}>": value for name, value in ids.items()}
    made: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", ids["eos"])])
    return PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)


def _word(number: int) -> str:
    return f"w{number}"


def _rows(dataset: Path) -> list[dict[str, Any]]:
    return [row for part in sorted((dataset / "heads").iterdir()) for row in pq.read_table(part).to_pylist()]


def _difference(rows: list[dict[str, Any]], model: nn.Module, tokenizer: Any) -> str | None:
    """Where the dataset is not what the model, as it was before it was saved, gives for each document alone.

    Where the model itself gives other numbers in a batch, for what it gives in that.
    """
    measured = {_key(row, row["sequence_id"]): row["entropy_nats"] for row in rows}
    texts = [tokenizer(text)["input_ids"] for text in documents()]
    alone = {}
    for sequence, ids in enumerate(texts):
        of_text = measure(model, **_batch([ids], tokenizer))["heads"].to_pylist()
        alone |= {_key(row, sequence): row["entropy_nats"] for row in of_text}
    wrong = _first_unlike(measured, alone)
    if wrong is None:
        return None
    if _draws(model, _batch(texts[:1], tokenizer)):
        return DRAWS
    if not _gives_others_in_a_batch(model, texts, tokenizer):
        return wrong
    together = measure(model, **_batch(texts, tokenizer))["heads"].to_pylist()
    expected = {_key(row, row["sequence_id"]): row["entropy_nats"] for row in together}
    return _first_unlike(measured, expected) or AS_IN_A_BATCH


def _first_unlike(measured: Mapping[tuple[Any, ...], float], expected: Mapping[tuple[Any, ...], float]) -> str | None:
    if set(measured) != set(expected):
        return f"WRONG: {len(measured)} rows, not the {len(expected)} that are expected"
    for key, value in expected.items():
        if abs(measured[key] - value) > TOLERANCE * max(1.0, abs(value)):
            return f"WRONG: entropy_nats of {key} is {measured[key]}, not {value}"
    return None


def _batch(texts: list[list[int]], tokenizer: Any) -> dict[str, torch.Tensor]:
    return dict(tokenizer.pad({"input_ids": texts}, padding_side="right", return_tensors="pt"))


def _draws(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether the model gives other numbers each time."""
    with torch.inference_mode():
        once, again = (first_tensor(model(**inputs)) for _ in range(2))
    return once is not None and again is not None and not torch.equal(once, again)


def _gives_others_in_a_batch(model: nn.Module, texts: list[list[int]], tokenizer: Any) -> bool:
    with torch.inference_mode():
        together = first_tensor(model(**_batch(texts, tokenizer)))
        for place, ids in enumerate(texts):
            alone = first_tensor(model(**_batch([ids], tokenizer)))
            if alone is None or together is None or together.shape[2:] != alone.shape[2:]:
                return False
            states, own = together[place, : len(ids)], alone[0]
            if (states - own).norm() > TOLERANCE * own.norm():
                return True
    return False


def _key(row: Mapping[str, Any], sequence: int) -> tuple[int, str, int, int]:
    return sequence, row["stack"], row["layer"], row["head"]


def _without(folder: str, said: str) -> str:
    """A reason that names no folder of the machine."""
    return " ".join(said.replace(f"{folder}/", "").split())


def main(wanted: list[str]) -> None:
    from attlas.extract.engines import choose

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    in_a_process(choose("auto", device="cpu").make_ready)
    known = architectures()
    chosen = [t for t in known if not wanted or t in wanted or known[t] in wanted]
    counts: Counter[str] = Counter()
    for model_type, found in each(through_run, chosen):
        said = "died, or took too long" if found is None else found
        print(model_type, said, sep="\t", flush=True)
        counts[said] += 1
    print(counts.most_common(3))


if __name__ == "__main__":
    main(sys.argv[1:])
