"""Image corpora: decoded safely, preprocessed as for the model, measured in patches."""

import hashlib
import hmac
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import transformers
from PIL import Image

from attlas.extract import measure
from attlas.extract.capture.discovery.patch_layout import find_patch_layout
from attlas.extract.corpus import open_corpus
from attlas.extract.engines import choose
from attlas.extract.engines.patches import Grid, PatchSums
from attlas.extract.engines.rows import AttentionCall
from attlas.extract.engines.visibility import visibility_from_mask, whole_axis
from attlas.extract.errors import Refusal
from attlas.extract.measurement import layout_of
from attlas.extract.model.encoder import load_encoder
from attlas.extract.model.images import Unreadable, decode_image, preprocess_image
from attlas.extract.options import RunOptions
from attlas.extract.run import finish, measure_shard, plan_run
from tests.extract.runs import complete_run
from tests.oracles import distance_patches

OF_PATCHES = ("patch_distance", "patch_mass", "patch_rows")
SIZE = 32
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": SIZE,
    "patch_size": 8,
}
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 36},
    "do_center_crop": True,
    "crop_size": {"height": SIZE, "width": SIZE},
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
    "resample": 3,
}


def sharpened(model: torch.nn.Module) -> torch.nn.Module:
    """Scale the weights, so that attention patterns are not flat."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(8)
    return model.eval()


def vision_model(kind: str) -> Any:
    torch.manual_seed(0)
    made = {
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**VISION)),
        "deit": lambda: transformers.DeiTModel(transformers.DeiTConfig(**VISION)),
        "beit": lambda: transformers.BeitModel(transformers.BeitConfig(**VISION)),
        "dinov2-registers": lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**VISION, num_register_tokens=3)
        ),
        "clip-vision": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)),
        "clip": lambda: transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={
                    "vocab_size": 60,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                },
                vision_config=VISION,
                projection_dim=16,
            )
        ),
        "yolos": lambda: transformers.YolosModel(
            transformers.YolosConfig(**{**VISION, "image_size": [SIZE, SIZE]}, num_detection_tokens=5)
        ),
        "swin": lambda: transformers.SwinModel(
            transformers.SwinConfig(
                image_size=SIZE, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
            )
        ),
    }
    return sharpened(made[kind]())


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function that saves a model of this kind once, with its image processor, and returns the folder."""
    root, saved_kinds = tmp_path_factory.mktemp("models"), set()

    def folder(kind: str) -> Path:
        if kind not in saved_kinds:
            vision_model(kind).save_pretrained(root / kind)
            (root / kind / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
            saved_kinds.add(kind)
        return root / kind

    return folder


def picture(width: int, height: int, seed: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8), mode=None)


def saved(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Seven images of all kinds, and three files that can't be read."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "deep").mkdir()
    files = {
        "a.png": saved(picture(40, 40, 0), "PNG"),
        "b.jpg": saved(picture(60, 45, 1), "JPEG"),
        "c.webp": saved(picture(33, 90, 2), "WEBP"),
        "d.bmp": saved(picture(32, 32, 3), "BMP"),
        "deep/e.tif": saved(picture(50, 41, 4), "TIFF"),
        "deep/f.png": saved(picture(47, 47, 5, "RGBA"), "PNG"),
        "deep/g.jpeg": saved(picture(64, 64, 6, "L"), "JPEG"),
    }
    files |= {
        "h.png": b"no image at all",
        "i.jpg": files["b.jpg"][: len(files["b.jpg"]) // 2],
        "j.png": saved(Image.fromarray(np.full((40, 40), 60_000, np.uint16)), "PNG"),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def run(model: Path, images: Path, out: Path, **changes: Any) -> Path:
    asked: dict[str, Any] = {"shard_sequences": 3} | changes
    complete_run(RunOptions(model=str(model), corpus=str(images), out=out, **asked))
    return out


def table(dataset: Path, name: str) -> pl.DataFrame:
    return pl.read_parquet(dataset / name / "*.parquet")


def manifest_of(dataset: Path) -> dict:
    return json.loads((dataset / "manifest.json").read_text())


# --- the grid of patches


@pytest.mark.parametrize(
    "kind, prefix", [("vit", 1), ("deit", 2), ("beit", 1), ("dinov2-registers", 4), ("clip-vision", 1), ("yolos", 1)]
)
def test_the_grid_follows_class_and_register_tokens(kind, prefix):
    model, pixels = vision_model(kind), {"pixel_values": torch.randn(2, 3, SIZE, SIZE)}
    patch_layout = find_patch_layout(model, layout_of(model, pixels), pixels)
    assert patch_layout is not None
    behind = 5 if kind == "yolos" else 0
    assert patch_layout.grid == Grid(rows=4, columns=4, prefix=prefix, tokens=prefix + 16 + behind)


def test_a_grid_may_be_rectangular_and_differ_from_the_configuration():
    model, pixels = vision_model("vit"), torch.randn(1, 3, 24, 40)
    given = {"pixel_values": pixels, "interpolate_pos_encoding": True}
    patch_layout = find_patch_layout(model, layout_of(model, given), given)
    assert patch_layout is not None
    assert patch_layout.grid == Grid(rows=3, columns=5, prefix=1, tokens=16)


def test_windows_and_shuffled_tokens_have_no_grid():
    swin, pixels = vision_model("swin"), torch.randn(2, 3, SIZE, SIZE)
    assert measure(swin, pixel_values=pixels)["heads"]["distance_patches"].null_count == len(
        measure(swin, pixel_values=pixels)["heads"]
    )
    torch.manual_seed(0)
    masked = transformers.ViTMAEModel(transformers.ViTMAEConfig(**VISION, mask_ratio=0.0)).eval()
    inputs = {"pixel_values": pixels}
    patch_layout = find_patch_layout(masked, layout_of(masked, inputs), inputs)
    assert patch_layout is not None
    assert (patch_layout.tokens, patch_layout.grid) == (17, None)  # all tokens, in random order


# --- distances in patches


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("kind", ["vit", "deit", "beit", "dinov2-registers", "clip-vision", "yolos"])
def test_distances_match_the_models_eager_patterns(kind, engine):
    model, pixels = vision_model(kind), torch.randn(3, 3, SIZE, SIZE)
    heads = pl.DataFrame(measure(model, pixel_values=pixels, engine=engine)["heads"]).filter(stack="vision")
    inputs = {"pixel_values": pixels}
    patch_layout = find_patch_layout(model, layout_of(model, inputs), inputs)
    assert patch_layout is not None and patch_layout.grid is not None
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        patterns = model(pixels, output_attentions=True).attentions
    for row in heads.iter_rows(named=True):
        p = patterns[row["layer"]][row["sequence_id"], row["head"]].double().numpy()
        expected = distance_patches(p, rows=4, columns=4, prefix=patch_layout.grid.prefix)
        assert row["distance_patches"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert np.ptp(heads["distance_patches"].to_numpy()) > 0.1  # the patterns are not flat


def call_with(p: torch.Tensor, grid: Grid | None) -> AttentionCall:
    """An attention call with pattern p: with unit vectors as keys, the scores are ln p."""
    batch, heads, n, _ = p.shape
    keys = torch.eye(n, dtype=p.dtype).expand(batch, heads, n, n)
    axis = whole_axis(batch, n, p.device)
    seen = visibility_from_mask(None, causal=False, queries=axis)
    return AttentionCall(query=p.clamp_min(1e-30).log(), key=keys, value=keys, visibility=seen, scale=1.0, grid=grid)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_known_patterns_have_known_distances(engine):
    grid = Grid(rows=3, columns=4, prefix=2, tokens=15)
    n, place = grid.tokens, torch.arange(12)
    uniform = torch.full((n, n), 1 / n)
    to_self = torch.eye(n)
    to_class = torch.zeros(n, n)
    to_class[:, 0] = 1 - 1e-3
    to_class[:, grid.prefix] = 1e-3  # renormalized over the patches, the first patch has all the mass
    below = torch.zeros(n, n)
    below[:, 0] = 1
    below[2 + place, 2 + (place + 4) % 12] = 1
    below[2 + place, 0] = 0
    p = torch.stack([uniform, to_self, to_class, below])[None]
    call = call_with(p, grid)
    _, rows = choose(engine, device="cpu").attend(call, lambda: call.value, OF_PATCHES)
    got = rows["patch_distance"] / rows["patch_rows"]
    expected = [distance_patches(x.double().numpy(), rows=3, columns=4, prefix=2) for x in p[0]]
    np.testing.assert_allclose(got[0], np.array(expected, float), rtol=1e-5, atol=1e-6)
    row, column = place // 4, place % 4
    np.testing.assert_allclose(got[0, 1], 0, atol=1e-6)
    np.testing.assert_allclose(got[0, 2], (row.square() + column.square()).double().sqrt().mean(), rtol=1e-5)
    np.testing.assert_allclose(got[0, 3], (8 * 1 + 4 * 2) / 12, rtol=1e-5)
    assert rows["patch_rows"].tolist() == [[12.0] * 4]
    on_patches = [12 / 15, 1, 1e-3, 1]
    np.testing.assert_allclose(rows["patch_mass"][0] / rows["patch_rows"][0], on_patches, rtol=1e-5)


def test_rows_that_attend_to_no_patch_or_are_not_measured_are_left_out():
    grid = Grid(rows=2, columns=2, prefix=1, tokens=5)
    scores = torch.zeros(1, 1, 5, 5)
    scores[..., 0] = 500  # the class token has nearly all the mass
    seen = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    seen[..., 0] = True
    seen[..., 1, 4] = seen[..., 2, 2] = True
    measured = torch.tensor([[[True, True, False, True, True]]])
    sums = PatchSums.zero(scores)
    for rows in (slice(0, 2), slice(2, 5)):
        sums.add(scores[..., rows, :], seen[..., rows, :], measured[..., rows], grid, rows.start)
    assert sums.rows.item() == 1
    assert sums.distance.item() == pytest.approx(2**0.5)


def test_texts_have_no_distances_in_patches(demo):
    tables = measure(demo.model, input_ids=torch.tensor([[101, 2000, 102]]))
    assert tables["heads"]["distance_patches"].null_count == len(tables["heads"])


# --- decoding images


def test_images_are_rotated_upright_and_converted_to_rgb():
    image = picture(20, 10, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90°
    assert decode_image(saved(image, "PNG", exif=exif)).size == (10, 20)
    for mode in ("L", "RGBA", "LA"):
        assert decode_image(saved(picture(5, 4, 0, mode), "PNG")).mode == "RGB"


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "unreadable: no image of a known format"),
        (b"GIF89a", "unreadable: no image of a known format"),
        (saved(picture(64, 64, 0), "JPEG")[:-900], "unreadable: OSError"),
        (saved(picture(64, 64, 0), "PNG")[:-900], "unreadable: OSError"),
        (saved(Image.new("L", (12_000, 8_000)), "PNG"), "too large: more than 89,478,485 pixels"),
        (saved(Image.new("1", (20_000, 10_000)), "PNG"), "too large: more than 89,478,485 pixels"),
        (saved(Image.new("L", (500, 4)), "PNG"), "too narrow: one side is more than 100 times the other"),
        (saved(Image.fromarray(np.zeros((4, 4), np.uint16)), "PNG"), "more than 8 bits a channel (I;16)"),
        (saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "more than 8 bits a channel (F)"),
    ],
    ids=["empty", "gif", "half-jpeg", "half-png", "bomb", "larger-bomb", "strip", "16-bit", "float"],
)
def test_unusable_images_raise_their_dropped_reason(data, reason):
    with pytest.raises(Unreadable) as raised:
        decode_image(data)
    assert str(raised.value) == reason


def test_the_documents_of_an_image_corpus_are_its_files(images):
    corpus = open_corpus(str(images))
    assert corpus.has_images
    names = [d.source for d in corpus]
    assert names == [
        "a.png",
        "b.jpg",
        "c.webp",
        "d.bmp",
        "deep/e.tif",
        "deep/f.png",
        "deep/g.jpeg",
        "h.png",
        "i.jpg",
        "j.png",
    ]
    assert [d.source for d in open_corpus(f"{images}/**/*.tif")] == ["deep/e.tif"]
    assert [d.source for d in open_corpus(f"{images}/a.png")] == ["a.png"]


# --- runs


@pytest.fixture(scope="module")
def dataset(folder_of, images, tmp_path_factory) -> Path:
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_bytes(b"k" * 32)
    return run(folder_of("dinov2-registers"), images, tmp_path_factory.mktemp("out") / "a", digest_key=key)


def test_an_image_is_a_document_of_one_sequence(dataset, images):
    documents, sequences = table(dataset, "documents"), table(dataset, "sequences")
    assert documents["source"].to_list() == [d.source for d in open_corpus(str(images))]
    assert documents["characters"].null_count() == documents.height
    assert documents["content_tokens"].to_list() == [16] * 7 + [0] * 3
    assert documents["sequences"].to_list() == [1] * 7 + [0] * 3
    assert sequences["document_id"].to_list() == list(range(7))
    assert sequences["tokens"].to_list() == [20] * 7
    assert sequences["special_tokens"].to_list() == [4] * 7
    data = (images / "c.webp").read_bytes()
    assert documents["digest"][2] == hmac.new(b"k" * 32, data, hashlib.sha256).hexdigest()
    assert documents["digest"].null_count() == 3


def test_unreadable_images_are_dropped_with_the_reason(dataset):
    documents = table(dataset, "documents")
    reasons = dict(documents.filter(pl.col("dropped_reason").is_not_null()).select("source", "dropped_reason").rows())
    assert reasons == {
        "h.png": "unreadable: no image of a known format",
        "i.jpg": "unreadable: OSError",
        "j.png": "more than 8 bits a channel (I;16)",
    }
    assert manifest_of(dataset)["corpus"]["dropped"] == {"more than 8 bits a channel": 1, "unreadable": 2}


def test_the_manifest_describes_the_preprocessing_of_images(dataset):
    manifest = manifest_of(dataset)
    facts = manifest["images"]
    assert facts["pixels"] == [3, SIZE, SIZE]
    assert facts["tokens"] == 20
    assert facts["grids"] == {"vision": {"rows": 4, "columns": 4, "first_patch": 4}}
    assert facts["digest"] == manifest["run"]["processor_digest"]
    assert "tokenizer" not in manifest and "pillow" in manifest["software"]
    assert "4 × 4 patches" in (dataset / "README.md").read_text()


def test_the_numbers_match_the_model_on_the_preprocessed_image(dataset, folder_of, images):
    encoder = load_encoder(str(folder_of("dinov2-registers")), device="cpu", modality="images")
    heads = table(dataset, "heads")
    model: Any = encoder.model
    model.set_attn_implementation("eager")
    for document, name in ((0, "a.png"), (5, "deep/f.png")):
        pixels = torch.from_numpy(preprocess_image(encoder.processor, Image.open(images / name).convert("RGB")))[None]
        with torch.inference_mode():
            patterns = model(pixels, output_attentions=True).attentions
        for row in heads.filter(document_id=document).iter_rows(named=True):
            p = patterns[row["layer"]][0, row["head"]].double().numpy()
            expected = distance_patches(p, rows=4, columns=4, prefix=4)
            assert row["distance_patches"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
            assert row["mass_patches"] == pytest.approx(p[4:20, 4:20].sum(-1).mean(), rel=1e-4)
            assert row["entropy_nats"] == pytest.approx(-(p * np.log(p)).sum(-1).mean(), rel=1e-4)
            assert row["query_rows"] == 20


def test_columns_of_text_are_null_for_images(dataset):
    heads = table(dataset, "heads")
    for name in ("mass_same_token", "mass_induction", "mass_bos", "mass_word_start"):
        assert heads[name].null_count() == heads.height
    assert heads["distance_patches"].null_count() == 0


@pytest.mark.parametrize("kind", ["vit", "clip-vision", "clip", "swin"])
def test_a_run_gives_a_valid_dataset_and_a_report(folder_of, images, tmp_path, kind):
    from attlas.analysis.report import write_report
    from attlas.analysis.verify import verify

    out = run(folder_of(kind), images, tmp_path / "out", limit=4)
    assert verify(out) == []
    assert "<html" in write_report(out, None).read_text()
    manifest = manifest_of(out)
    assert {s["stack"] for s in manifest["model"]["stacks"]} == {"vision"}
    has_distances = table(out, "heads")["distance_patches"].null_count() == 0
    assert has_distances == (kind != "swin")
    assert manifest["images"]["tokens"] == (64 if kind == "swin" else 17)
    if kind == "swin":
        assert manifest["model"]["stacks"] == [{"stack": "vision", "layers": 4, "heads": None, "of_tokens": False}]
        assert manifest["images"]["grids"] == {}
        assert table(out, "sequences")["special_tokens"].to_list() == [0] * 4


def test_an_interrupted_run_gives_the_same_bytes(folder_of, images, tmp_path):
    def parts(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    complete = run(folder_of("vit"), images, tmp_path / "a")
    options = RunOptions(model=str(folder_of("vit")), corpus=str(images), out=tmp_path / "b", shard_sequences=3)
    for shard in reversed(range(3)):
        measure_shard(plan_run(options).open_worker(), shard)
    assert parts(finish(options.out)) == parts(complete)


def test_an_image_that_changes_during_a_run_is_refused(folder_of, images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    options = RunOptions(model=str(folder_of("vit")), corpus=str(tmp_path / "images"), out=tmp_path / "out")
    worker = plan_run(options).open_worker()
    (tmp_path / "images" / "b.jpg").write_bytes(saved(picture(60, 45, 99), "JPEG"))
    with pytest.raises(Refusal, match=r"b\.jpg has changed since the run was planned"):
        measure_shard(worker, 0)
    (tmp_path / "images" / "b.jpg").unlink()
    with pytest.raises(Refusal, match=r"must stay in place until it ends; .*b\.jpg: No such file"):
        measure_shard(worker, 0)


# --- refusals


def test_a_mix_of_images_and_texts_is_refused(images, tmp_path):
    shutil.copy(images / "a.png", tmp_path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(Refusal, match=r"images \(1\): a\.png; text \(1\): a\.txt"):
        open_corpus(str(tmp_path))


def test_a_text_model_is_refused_for_images(images, tmp_path):
    with pytest.raises(Refusal, match="needs a model that reads pixel_values; BertModel reads input_ids; use texts"):
        run(Path("demo"), images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_vision_model_is_refused_for_texts(folder_of, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(Refusal, match="needs a model that reads input_ids; ViTModel reads pixel_values; use images"):
        run(folder_of("vit"), tmp_path / "a.txt", tmp_path / "out")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_length": 8}, "--max-length"),
        ({"stride": 1}, "--stride"),
        ({"tokens": "ids"}, "--tokens ids"),
        ({"stacks": "all"}, "--stacks all"),
        ({"unit": "line"}, "unit line applies to text files only; this corpus is images"),
    ],
)
def test_options_for_texts_are_refused(folder_of, images, tmp_path, changes, message):
    with pytest.raises(Refusal, match=message):
        run(folder_of("vit"), images, tmp_path / "out", **changes)


def test_a_model_without_its_image_processor_is_refused(folder_of, images, tmp_path):
    shutil.copytree(folder_of("vit"), tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(Refusal, match=r"comes with its preprocessor_config\.json; none could be loaded from .*vit"):
        run(tmp_path / "vit", images, tmp_path / "out")


def with_preprocessor(folder: Path, kind: Path, **changes) -> Path:
    shutil.copytree(kind, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | changes))
    return folder


def test_an_image_processor_of_another_size_than_the_models_is_refused(folder_of, images, tmp_path):
    model = with_preprocessor(tmp_path / "vit", folder_of("vit"), crop_size={"height": 24, "width": 24})
    with pytest.raises(Refusal, match=r"ViTModel does not accept \[3, 24, 24\]"):
        run(model, images, tmp_path / "out")


def test_pixels_of_several_shapes_are_refused_before_measuring(folder_of, images, tmp_path):
    model = with_preprocessor(tmp_path / "vit", folder_of("vit"), do_center_crop=False, size={"shortest_edge": SIZE})
    with pytest.raises(Refusal, match=r"all images must become pixels of the same shape; .*preprocessor_config"):
        plan_run(RunOptions(model=str(model), corpus=str(images), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_strict_run_refuses_the_first_unreadable_image(folder_of, images, tmp_path):
    with pytest.raises(Refusal, match=r"h\.png is unreadable: no image of a known format"):
        run(folder_of("vit"), images, tmp_path / "out", strict=True)
