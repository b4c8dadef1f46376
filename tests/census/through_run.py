"""An architecture through `attlas run`: saved, loaded as by the command, and measured on a short corpus.

`python -m tests.census.through_run [model_type … | text | multimodal]` prints a line per architecture.
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
from tests.census.pool import map_in_processes, run_in_process
from tests.census.shrink import FIRST_ID, TOKENS, VOCABULARY
from tests.census.tiny import NotBuilt, TinyModel, architectures, build, reason_of
from tests.extract.runs import complete_run

YES, NO_IDS = "yes", ""
AS_IN_A_BATCH = "yes; the model itself gives other numbers in a batch than alone"
DRAWS = "yes, but for numbers that the model draws at random each time"
TOLERANCE = 1e-4
# three lengths, so that a batch is padded
LENGTHS = (11, 17, 5)
SPECIAL = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}


def through_run(model_type: str) -> str:
    """YES, possibly with a remark; NO_IDS for a model without token ids; or why the model can't be measured."""
    built = build(model_type)
    if isinstance(built, NotBuilt) or not reads_ids(built):
        return NO_IDS
    with TemporaryDirectory() as folder:
        try:
            return _run_and_compare(built, Path(folder)) or YES
        except (CaptureError, Refusal) as error:
            return _without_folder(folder, str(error))
        except Exception as error:
            return _without_folder(folder, f"fails: {reason_of(error)}")


def reads_ids(built: TinyModel) -> bool:
    ids = built.inputs.get("input_ids")
    return ids is not None and ids.dim() == 2


def _run_and_compare(built: TinyModel, folder: Path) -> str | None:
    """Run the model; returns what is wrong with the dataset, or None."""
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
    """Documents of words from the tokenizer's vocabulary."""
    generator = np.random.default_rng(0)
    for length in LENGTHS:
        yield " ".join(_word(n) for n in generator.permutation(VOCABULARY - FIRST_ID)[:length] + FIRST_ID)


def tokenizer_of(model: nn.Module) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the special ids of the configuration."""
    config: Any = model.config
    ids = {name: getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk")}
    ids = {name: value if isinstance(value, int) and value >= 0 else TOKENS[name] for name, value in ids.items()}
    words = {_word(n): n for n in range(VOCABULARY) if n not in ids.values()}
    vocabulary = words | {f"<{name}>": value for name, value in ids.items()}
    tokenizer: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", ids["eos"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def _word(number: int) -> str:
    return f"w{number}"


def _rows(dataset: Path) -> list[dict[str, Any]]:
    return [row for part in sorted((dataset / "heads").iterdir()) for row in pq.read_table(part).to_pylist()]


def _difference(rows: list[dict[str, Any]], model: nn.Module, tokenizer: Any) -> str | None:
    """Where the dataset differs from the results of the original model for each document alone.

    If the model itself gives different results in a batch, the dataset is compared with those.
    """
    measured = {_key(row, row["sequence_id"]): row["entropy_nats"] for row in rows}
    texts = [tokenizer(text)["input_ids"] for text in documents()]
    alone = {}
    for sequence, ids in enumerate(texts):
        of_text = measure(model, **_batch([ids], tokenizer))["heads"].to_pylist()
        alone |= {_key(row, sequence): row["entropy_nats"] for row in of_text}
    wrong = _first_difference(measured, alone)
    if wrong is None:
        return None
    if _is_random(model, _batch(texts[:1], tokenizer)):
        return DRAWS
    if not _depends_on_batch(model, texts, tokenizer):
        return wrong
    together = measure(model, **_batch(texts, tokenizer))["heads"].to_pylist()
    expected = {_key(row, row["sequence_id"]): row["entropy_nats"] for row in together}
    return _first_difference(measured, expected) or AS_IN_A_BATCH


def _first_difference(
    measured: Mapping[tuple[Any, ...], float], expected: Mapping[tuple[Any, ...], float]
) -> str | None:
    if set(measured) != set(expected):
        return f"WRONG: {len(measured)} rows, not the {len(expected)} that are expected"
    for key, value in expected.items():
        if abs(measured[key] - value) > TOLERANCE * max(1.0, abs(value)):
            return f"WRONG: entropy_nats of {key} is {measured[key]}, not {value}"
    return None


def _batch(texts: list[list[int]], tokenizer: Any) -> dict[str, torch.Tensor]:
    return dict(tokenizer.pad({"input_ids": texts}, padding_side="right", return_tensors="pt"))


def _is_random(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether the model gives different results each time."""
    with torch.inference_mode():
        once, again = (first_tensor(model(**inputs)) for _ in range(2))
    return once is not None and again is not None and not torch.equal(once, again)


def _depends_on_batch(model: nn.Module, texts: list[list[int]], tokenizer: Any) -> bool:
    with torch.inference_mode():
        together = first_tensor(model(**_batch(texts, tokenizer)))
        for place, ids in enumerate(texts):
            alone = first_tensor(model(**_batch([ids], tokenizer)))
            if alone is None or together is None or together.shape[2:] != alone.shape[2:]:
                return False
            states, expected = together[place, : len(ids)], alone[0]
            if (states - expected).norm() > TOLERANCE * expected.norm():
                return True
    return False


def _key(row: Mapping[str, Any], sequence: int) -> tuple[int, str, int, int]:
    return sequence, row["stack"], row["layer"], row["head"]


def _without_folder(folder: str, message: str) -> str:
    """A reason without the path of the temporary folder."""
    return " ".join(message.replace(f"{folder}/", "").split())


def main(wanted: list[str]) -> None:
    from attlas.extract.engines import choose

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    run_in_process(choose("auto", device="cpu").make_ready)
    modalities = architectures()
    chosen = [t for t in modalities if not wanted or t in wanted or modalities[t] in wanted]
    counts: Counter[str] = Counter()
    for model_type, found in map_in_processes(through_run, chosen):
        message = "died, or took too long" if found is None else found
        print(model_type, message, sep="\t", flush=True)
        counts[message] += 1
    print(counts.most_common(3))


if __name__ == "__main__":
    main(sys.argv[1:])
