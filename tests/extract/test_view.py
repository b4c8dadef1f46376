"""The page of one input: the weights on it are those of the model, its texts are safe, and bad input is refused."""

import base64
import html
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import attlas
from attlas.extract.engines.patches import Grid
from attlas.extract.errors import Refusal
from attlas.extract.view import View, view, view_named
from attlas.extract.view.labels import grid_axis, text_axis, token_label
from attlas.extract.view.observer import MAX_WEIGHTS, ViewObserver
from attlas.extract.view.weight_codes import BELOW, HIDDEN, THUMBNAIL, UNMEASURED, ZERO, WeightCodes
from tests.extract.checkpoints import TEXT, model_of, save, tokenizer_of
from tests.extract.models import eager_patterns, tiny
from tests.extract.test_images import PREPROCESSOR, vision_model
from tests.properties import cases

DETAILED = 1e-4


def codes_of(shown: View, layer: int, head: int) -> np.ndarray:
    """The codes [window, query, key] of a head."""
    of_layer = shown.content.layers[layer]
    flat = np.frombuffer(zlib.decompress(of_layer.weights[head]), np.uint8)
    high, low = flat[: len(flat) // 2].astype(np.uint16), flat[len(flat) // 2 :]
    return ((high << 8) | low).reshape(of_layer.windows, len(of_layer.queries), len(of_layer.keys))


def weights_of(shown: View, layer: int, head: int) -> np.ndarray:
    (pattern,) = WeightCodes(shown.content.digits).decode(codes_of(shown, layer, head))
    return pattern


def rounded(weight: float, digits: int) -> float:
    """The weight as the page prints it, by Python's own formatting."""
    detailed = float(f"{weight:.{digits - 1}e}")
    return detailed if float(f"{weight:.1e}") >= DETAILED else float(f"{weight:.1e}")


# codes


@pytest.mark.parametrize("digits", [3, 4])
@cases(600, quick=100)
@given(st.floats(2.0**-116, 1, width=32))
def test_a_code_is_the_weight_rounded_once(digits: int, weight: float) -> None:
    codes = WeightCodes(digits)
    (code,) = codes.encode(np.array([weight], np.float32))
    assert codes.decode(np.array([code]))[0] == rounded(float(np.float32(weight)), digits)


@pytest.mark.parametrize("digits", [3, 4])
def test_codes_rise_with_the_weights_and_have_names_at_the_ends(digits: int) -> None:
    codes = WeightCodes(digits)
    weights = np.concatenate([[0, 1e-40], np.logspace(-36, 0, 4001)]).astype(np.float32)
    encoded = codes.encode(weights)
    assert (np.diff(encoded.astype(int)) >= 0).all()
    assert encoded[0] == ZERO and encoded[1] == BELOW and encoded[-1] == codes.largest <= np.iinfo(np.uint16).max
    assert codes.encode(np.array([1 + 1e-6], np.float32))[0] == codes.largest  # a sum of roundings


@pytest.mark.parametrize(("digits", "bound"), [(3, 5e-3), (4, 5e-4)])
def test_the_error_of_a_weight_is_within_half_a_unit_of_its_last_digit(digits: int, bound: float) -> None:
    codes, weights = WeightCodes(digits), np.logspace(-4, 0, 100_000)
    error = np.abs(codes.decode(codes.encode(weights)) - weights) / weights
    assert error.max() <= bound


def test_a_thumbnail_keeps_the_weight_of_a_single_token() -> None:
    codes = WeightCodes(3)
    pattern = np.zeros((1, 500, 500), np.float32)
    pattern[0, :, 333] = 1
    thumbnail = codes.thumbnails(codes.encode(pattern))[0]
    assert thumbnail.shape == (THUMBNAIL, THUMBNAIL)
    assert (thumbnail.max(1) == 255).all() and ((thumbnail == 255).sum(1) == 1).all()


# patterns


@pytest.fixture(scope="module")
def demo_view() -> View:
    return view_named("demo", "Attention heads look around, unbelievably often.", device="cpu")


def test_the_weights_are_those_of_the_models_eager_attention(demo_view: View, demo: Any) -> None:
    batch = demo.tokenizer("Attention heads look around, unbelievably often.", return_tensors="pt")
    content = demo_view.content
    assert content.digits == 4
    for layer, pattern in enumerate(eager_patterns(demo.model, **batch)):
        exact = pattern[0].numpy()
        shown = np.stack([weights_of(demo_view, layer, head) for head in range(len(exact))])
        # 4 digits of the weight, and the difference of two ways to compute it
        assert np.allclose(shown, exact, rtol=6e-4, atol=1e-5)


def test_entropy_and_received_mass_are_those_of_the_patterns(demo_view: View) -> None:
    layer = demo_view.content.layers[3]
    pattern = np.stack([weights_of(demo_view, 3, head) for head in range(layer.heads)])
    entropy = -(pattern * np.log(np.where(pattern > 0, pattern, 1))).sum(-1)
    assert np.allclose(layer.entropy[:, 0], entropy, atol=5e-3)
    assert np.allclose(layer.received[:, 0], pattern.sum(1), atol=5e-3)


def test_the_norms_of_the_stream_are_those_of_the_models_hidden_states() -> None:
    model, ids = tiny("gpt2"), torch.arange(1, 8)[None]
    with torch.inference_mode():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    sites = view(model, input_ids=ids).content.sites
    after_blocks = [sites[0], *(site for site in sites if site.site == "mlp")][:3]
    for site, state in zip(after_blocks, states, strict=False):
        assert np.allclose(site.norms, state[0].norm(dim=-1), rtol=1e-5)
    assert np.isnan(sites[0].updates).all() and (sites[1].updates > 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_shown(side: str) -> None:
    model, tokenizer = model_of("bert"), tokenizer_of()
    alone = view(model, "The cat sat on the mat", tokenizer=tokenizer)
    tokenizer.padding_side = side
    batch = tokenizer("The cat sat on the mat", return_tensors="pt", padding="max_length", max_length=20)
    # positions as without padding, so that the patterns are the same
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    padded = view(model, **batch, position_ids=positions, tokenizer=tokenizer)
    assert padded.content.layers[0].keys == alone.content.layers[0].keys
    assert len(padded.content.layers[0].queries) == 8
    assert np.allclose(weights_of(padded, 1, 2), weights_of(alone, 1, 2), rtol=2e-3, atol=1e-6)
    assert len(padded.content.sites[0].norms) == 8


def test_keys_that_a_query_does_not_see_are_marked() -> None:
    shown = view(tiny("gpt2"), input_ids=torch.arange(1, 8)[None])
    (codes,) = codes_of(shown, 0, 0)
    assert ((codes == HIDDEN) == np.triu(np.ones((7, 7), bool), 1)).all()


def test_rows_that_are_not_measured_are_marked() -> None:
    model = tiny("bert")
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[5] = torch.nan
    shown = view(model, input_ids=torch.tensor([[3, 5, 7]]))
    (codes,) = codes_of(shown, 0, 0)
    assert (codes == UNMEASURED).all()
    assert np.isnan(shown.content.layers[0].entropy).all()


def test_every_stack_of_an_encoder_decoder_model_is_shown(tmp_path: Path) -> None:
    shown = view_named(str(save(model_of("bart"), tmp_path)), TEXT, stacks="all", device="cpu")
    assert [layer.stack for layer in shown.content.layers] == ["encoder"] * 2 + ["decoder", "cross"] * 2
    assert {site.stack for site in shown.content.sites} >= {"encoder", "decoder"}


def test_windows_of_an_image_are_shown_one_by_one() -> None:
    torch.manual_seed(1)
    shown = view(vision_model("swin"), pixel_values=torch.randn(1, 3, 32, 32))
    assert [(layer.windows, len(layer.queries), layer.heads) for layer in shown.content.layers] == [
        (4, 16, 2),
        (4, 16, 2),
        (1, 16, 4),
        (1, 16, 4),
    ]
    assert {len(site.norms) for site in shown.content.sites} == {64, 16}


def test_a_model_by_its_name_is_fed_as_a_run_feeds_it() -> None:
    # a sentence-transformers folder that lower-cases, and special tokens around the text
    labels = view_named("demo", "The CAT", device="cpu").content.layers[0].queries.labels
    assert labels == ("[CLS]", "the", "cat", "[SEP]")


def test_an_image_is_shown_as_the_model_reads_it(tmp_path: Path) -> None:
    folder = vision_folder(tmp_path)
    Image.new("RGB", (60, 40), (200, 100, 50)).save(tmp_path / "image.png")
    shown = view_named(str(folder), image=tmp_path / "image.png", device="cpu")
    axis = shown.content.layers[0].queries
    assert axis.grid == Grid(4, 4, 1, 17)
    assert axis.labels[:3] == ("class", "r0 c0", "r0 c1") and axis.special[:2] == (True, False)
    assert shown.content.picture is not None
    (tmp_path / "picture.png").write_bytes(shown.content.picture)
    picture = Image.open(tmp_path / "picture.png")
    assert picture.size == (32, 32)
    assert np.abs(np.asarray(picture, int) - (200, 100, 50)).max() <= 1


def vision_folder(folder: Path) -> Path:
    vision_model("vit").save_pretrained(folder / "vit")
    (folder / "vit" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder / "vit"


# labels


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" the", "the"),
        ("ing", "ing"),
        (" ", "␣"),
        ("\n\n", "⏎⏎"),
        ("\t", "⇥"),
        ("", "∅"),
        ("\udce2\udc82", "⟨E2⟩⟨82⟩"),
        ("a\x1b[31m", r"a\x1b[31m"),
        ("\u202eabc", r"\u202eabc"),
        ("x" * 100, "x" * 20 + "…" + "x" * 19),
    ],
)
def test_a_token_is_labelled_as_people_read_it(text: str, label: str) -> None:
    assert token_label(text) == label


def test_pieces_that_go_on_with_a_word_are_marked(demo: Any) -> None:
    ids = demo.tokenizer("unbelievably so")["input_ids"]
    axis = text_axis(ids, demo.tokenizer)
    assert axis.labels == ("[CLS]", "un", "bel", "ie", "va", "bly", "so", "[SEP]")
    assert axis.continues == (False, False, True, True, True, True, False, False)


def test_tokens_without_a_tokenizer_are_labelled_by_their_ids() -> None:
    assert text_axis([7, 9], None).labels == ("#7", "#9")
    assert grid_axis(Grid(1, 2, 2, 5)).labels == ("extra 0", "extra 1", "r0 c0", "r0 c1", "extra 2")


# the page

HOSTILE = "</script><img src=x onerror=alert(1)><!-- <script> {{data}} ]]> & ' \" \u2028 \u202e \x1b"


def test_hostile_texts_do_not_leave_their_places() -> None:
    tokenizer = tokenizer_of(HOSTILE)
    tokenizer.add_tokens(["</script><b>", "<!--<script>"])
    model = model_of("bert")
    model.resize_token_embeddings(len(tokenizer))
    shown = view(model, f"{HOSTILE} </script><b> <!--<script>", tokenizer=tokenizer)
    page = View(shown.content, model=HOSTILE, given=HOSTILE).page.decode()
    assert "<img" not in page and "</script><b>" not in page and "<!--" not in page.replace("<!doctype", "")
    assert "\u202e" not in page and "\x1b" not in page
    # as many elements as without the texts: nothing they hold began or ended one
    plain = View(shown.content, model="m", given="text").page.decode()
    assert page.count("<") == plain.count("<")
    assert "</script><b>" in data_of(page)["axes"][0]["labels"]


def data_of(page: str) -> Any:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert match is not None
    return json.loads(match[1])


def test_the_page_admits_its_own_script_and_loads_nothing(demo_view: View) -> None:
    page = demo_view.page.decode()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy[1]
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "innerHTML" not in page


def test_the_blocks_of_the_page_are_the_patterns(demo_view: View) -> None:
    page = demo_view.page.decode()
    block = re.search(r'id="head13">([^<]*)<', page)
    assert block is not None
    assert base64.b64decode(block[1]) == demo_view.content.layers[1].weights[1]


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(demo_view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = demo_view._repr_html_()
    source = re.fullmatch(r'<iframe [^>]*sandbox="allow-scripts" srcdoc="([^"]*)" [^>]*></iframe>', frame)
    assert source is not None
    assert html.unescape(source[1]) == demo_view.page.decode()
    monkeypatch.setattr("attlas.extract.view.page._LARGEST_IN_NOTEBOOK", 10)
    assert ".save(path)" in demo_view._repr_html_() and "<iframe" not in demo_view._repr_html_()


def test_a_view_is_saved_and_described(demo_view: View, tmp_path: Path) -> None:
    assert demo_view.save(tmp_path / "page.html").read_bytes() == demo_view.page
    assert "encoder: 6 layers × 12 heads" in repr(demo_view)
    with pytest.raises(Refusal, match="a page is a file"):
        demo_view.save(tmp_path)


def test_the_public_name_takes_what_measure_takes() -> None:
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()
    shown = attlas.view(encoder, torch.randn(1, 9, 16))
    assert [layer.heads for layer in shown.content.layers] == [4, 4]
    assert shown.given == "src [1 × 9 × 16]"


# refusals

REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no tokenizer": (lambda: view(model_of("bert"), "text"), "got none; write view"),
    "no text": (lambda: view(model_of("bert"), "", tokenizer=tokenizer_of()), "at least one token"),
    "two sequences": (lambda: view(tiny("bert"), input_ids=torch.ones(2, 3, dtype=torch.long)), "these inputs hold 2"),
    "nothing": (lambda: view("demo"), "got none; give one of them"),
    "text and image": (lambda: view("demo", "x", image="y.png"), "got a text and --image"),
    "an empty text": (lambda: view("demo", ""), "at least one token"),
    "no tokens": (lambda: view("demo", " \n"), "none besides special ones"),
    "half a character": (lambda: view("demo", "\ud800"), "lone surrogate"),
    "too long": (lambda: view("demo", "word " * 300), "302 tokens .* at most 256; shorten it, or use --max-length 302"),
    "beyond the model": (lambda: view("demo", "word " * 600), "602 tokens .* the model has 512 positions"),
    "max_length": (lambda: view("demo", "x", max_length=0), "at least 1; got 0"),
    "a missing file": (lambda: view("demo", file="nowhere.txt"), "there is none at nowhere.txt"),
    "a missing image": (lambda: view("demo", image="nowhere.png"), "No such file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_what_to_do(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(Refusal, match=words):
        call()


def test_a_model_without_patterns_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.MambaConfig(vocab_size=80, hidden_size=32, num_hidden_layers=2)
    folder = save(transformers.MambaModel(config), tmp_path / "mamba")
    with pytest.raises(Refusal, match="can't be shown: a model is measured by its attention"):
        view(str(folder), TEXT)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "two.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "not.png").write_text("text")
    folder = vision_folder(tmp_path)
    for model, given_, words in (
        ("demo", {"file": tmp_path / "image.png"}, "is an image; use --image"),
        ("demo", {"file": tmp_path / "empty.txt"}, "at least one token"),
        ("demo", {"file": tmp_path / "two.jsonl"}, "holds several"),
        ("demo", {"file": tmp_path / "latin.txt"}, "not UTF-8 at byte 3"),
        ("demo", {"file": tmp_path}, "is a folder"),
        ("demo", {"image": tmp_path / "not.png"}, "no image of a known format"),
        ("demo", {"image": tmp_path / "image.png"}, "needs a model that reads pixel_values"),
        (str(folder), {"text": "words"}, "needs a model that reads input_ids"),
    ):
        with pytest.raises(Refusal, match=words):
            view(model, **given_)


def test_an_input_with_more_weights_than_a_page_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attlas.extract.view.observer.MAX_WEIGHTS", 500)
    with pytest.raises(Refusal, match=r"at most 500; 9 tokens .* 972; give an input of at most 6 tokens"):
        view(tiny("bert"), input_ids=torch.arange(1, 10)[None])
    assert MAX_WEIGHTS >= 144 * 512 * 512


def test_the_observer_asks_for_no_column() -> None:
    assert not ViewObserver.needs.residual and not ViewObserver.needs.profiles
