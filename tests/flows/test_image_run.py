"""`attlas run` on a folder of images."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
import transformers
from PIL import Image

from tests.flows.conftest import Ended

pytestmark = pytest.mark.usefixtures("test_server")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
    )
    transformers.ViTModel(config).eval().save_pretrained(tmp_path / "vit")
    facts = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(facts))
    return tmp_path / "vit"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        Image.effect_noise((40 + number, 40), 50 * (number + 1)).save(folder / f"{number}.png")
    (folder / "3.png").rename(folder / os.fsdecode(b"caf\xe9.png"))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing more")
    return folder


def test_a_folder_of_images_gives_a_valid_dataset_and_a_report(
    attlas: Callable[..., Ended], model: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, output, err = attlas("run", "--model", model, "--corpus", images, "--out", out, "--shard-sequences", 2)
    assert code == 0, err
    assert f"dataset  {out}" in output
    heads = pl.read_parquet(out / "heads" / "*.parquet")
    assert heads.height == 4 * 2 * 4
    assert heads["distance_patches"].is_between(0, 18**0.5).all()
    assert r"caf\xe9.png" in pl.read_parquet(out / "documents" / "*.parquet")["source"]
    assert attlas("verify", out)[0] == 0
    assert attlas("report", out)[0] == 0
    code, output, _ = attlas("info", out)
    assert code == 0
    assert "dropped: unreadable" in output
    assert "mean attention distance" in attlas("stats", "distance_patches")[1]


def test_a_mix_of_texts_and_images_is_refused(
    attlas: Callable[..., Ended], model: Path, images: Path, tmp_path: Path
) -> None:
    (images / "notes.txt").write_text("these are noise")
    code, _, err = attlas("run", "--model", model, "--corpus", images, "--out", tmp_path / "out")
    assert code == 2
    assert "images (5): 0.png, 1.png, 2.png, …; text (1): notes.txt" in err
    assert not (tmp_path / "out").exists()
