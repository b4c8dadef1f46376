import base64
import hashlib
import io
import json
import math
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from scipy import stats

from attlas.analysis.dataset import Dataset
from attlas.analysis.documents import outlying_documents
from attlas.analysis.heads import HEAD, head_estimates, head_means
from attlas.analysis.kinds import head_kinds
from attlas.analysis.query import query
from attlas.analysis.report import report, write_report
from attlas.analysis.report.content import gather
from attlas.analysis.report.head_columns import shown_columns
from attlas.analysis.report.numbers import THIN, estimate, format_number, half_width, interval, percent
from attlas.extract.store import Refusal, Store
from tests.analysis.synthetic import first_token_scores, rewrite, write_dataset
from tests.files import read_json, write_json

HOSTILE = """<script>alert("1")</script>'"><img src=https://example.org/x.png onerror=alert(1)>{{ 7 * 7 }}"""
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; `open` holds unclosed tags, `misnested` those closed out of order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.misnested: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.misnested.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def html(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(folder, tmp_path_factory.mktemp("report") / "r.html").read_text("utf-8")


def test_by_default_the_report_lies_in_the_dataset(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", documents=3, layers=1, heads=2)
    assert write_report(root) == root / "report.html"
    assert (root / "report.html").stat().st_size > 10_000


def test_the_same_dataset_gives_the_same_page(folder: Path, html: str, tmp_path: Path) -> None:
    assert write_report(folder, tmp_path / "again.html").read_text("utf-8") == html


def frames_of(html: str) -> dict[str, list[dict[str, Any]]]:
    """The frames that a page shares among its charts, as rows."""
    (content,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return {name: rows_of(columns) for name, columns in json.loads(content).items()}


def charts_of(html: str) -> dict[str, dict[str, Any]]:
    """The charts of a page by name: `label`, `spec`, and `data` as rows."""
    found = {}
    pattern = r'aria-label="([^"]*)" data-name="([^"]*)".*?<script type="application/json">(.*?)</script></figure>'
    for label, name, text in re.findall(pattern, html, re.DOTALL):
        content = json.loads(text)
        data = {of: rows_of(columns) for of, columns in content["data"].items()}
        found[name] = {"label": label, "spec": content["spec"], "data": data}
    return found


def rows_of(frame: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a frame as pages have it: by columns, numbers as float32 in base64, texts as numbers of words."""
    return [dict(zip(frame["names"], row, strict=True)) for row in zip(*map(_values, frame["values"]), strict=True)]


def _values(column: Any) -> list[Any]:
    if isinstance(column, list):
        return column
    if "floats" in column:
        floats = np.frombuffer(base64.b64decode(column["floats"]), "<f4").tolist()
        return [None if math.isnan(value) else value for value in floats]
    return [None if code is None else column["words"][code] for code in column["codes"]]


def test_names_are_escaped_wherever_they_stand(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", documents=3, layers=1, heads=2, model_name=HOSTILE, corpus_name=HOSTILE)
    text = write_report(root).read_text("utf-8")
    page = Page(text)
    assert HOSTILE not in text
    assert not any(tag == "img" for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert HOSTILE in "".join(page.text)
    assert "{{ 7 * 7 }}" in "".join(page.text)


def test_stack_names_are_escaped_in_figures(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", documents=3, layers=1, heads=2, summaries=False)
    _rename_some_rows(root, "<b>odd</b>")
    text = write_report(root).read_text("utf-8")
    assert "<b>odd</b>" not in text
    assert "Heads by layer, &lt;b&gt;odd&lt;/b&gt;" in text and "\\u003cb>odd" in text


def test_the_page_loads_nothing_and_runs_its_own_scripts_alone(html: str) -> None:
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "img", "base")
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or value == "data:,", (tag, name, value)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "eval" not in policy
    scripts = [
        base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()
        for s in re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    ]
    assert re.findall(r"'sha256-([^']+)'", policy) == scripts and len(scripts) == 2


def test_tags_are_closed_in_order(html: str) -> None:
    page = Page(html)
    assert (page.open, page.misnested) == ([], [])


def test_the_map_and_the_table_have_every_head_with_every_mean(html: str, folder: Path) -> None:
    expected = head_means(Dataset.open(folder)).sort(HEAD)
    frames = frames_of(html)
    rows = pl.DataFrame(frames["heads"], infer_schema_length=None).sort(HEAD)
    assert rows.select("layer", "head").rows() == expected.select("layer", "head").rows()
    names = [column["name"] for column in frames["columns"]]
    assert {"entropy_normalized", "distance_tokens", "mass_first"} <= set(names)
    for name in names:
        assert rows[name].to_list() == pytest.approx(expected[name].to_list(), rel=1e-6, nan_ok=True)
        half = ((expected[f"{name}_high"] - expected[f"{name}_low"]) / 2).to_list()
        assert rows[f"{name}_half"].to_list() == pytest.approx(half, rel=1e-6, abs=1e-12)
        assert f">{name}</option>" in html


def test_every_chart_has_a_label_files_and_code(html: str) -> None:
    charts = charts_of(html)
    assert {
        "map",
        "kinds",
        "rest",
        "distance",
        "entropy-by-position",
        "entropy-by-length",
        "similarity",
    } <= charts.keys()
    page = Page(html)
    figures = [a for t, a in page.tags if t == "figure"]
    assert len(figures) == len(charts) and all(a["aria-label"] for a in figures)
    assert sum(a.get("data-save") == "csv" for _, a in page.tags) == len(charts)
    assert html.count('<details class="code">') == len(charts)


def _codes(html: str) -> dict[str, list[str]]:
    """By the name of a figure, its Python and its SQL."""
    blocks = re.findall(r'<div class="figure-block" id="figure-([^"]+)">(.*?)</details>', html, re.DOTALL)
    return {name: [unescape(code) for code in re.findall(r'data-code="([^"]*)"', block)] for name, block in blocks}


@pytest.fixture(scope="module")
def runs_of_code(html: str, folder: Path) -> dict[str, pl.DataFrame]:
    """What the Python of each figure leaves in `rows`, run in the dataset's folder."""
    codes = _codes(html)
    frames = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, (code, *_) in codes.items():
            names: dict[str, Any] = {}
            exec(code.replace("{column}", "entropy_nats"), names)
            frames[name] = names["rows"]
    return frames


def _near(rows: list[dict[str, Any]], frame: pl.DataFrame, columns: dict[str, str], by: list[str]) -> None:
    """Assert that these columns of a chart have the values of those of a frame, in the order of `by`."""
    shown = pl.DataFrame(rows, infer_schema_length=None).sort(by)
    expected = frame.sort(by)
    assert shown.height == expected.height > 0
    for of_chart, of_frame in columns.items():
        assert shown[of_chart].to_list() == pytest.approx(expected[of_frame].to_list(), rel=1e-5, abs=1e-9), of_chart


def test_the_python_of_each_figure_makes_its_numbers(html: str, runs_of_code: dict[str, pl.DataFrame]) -> None:
    charts, heads, made = charts_of(html), frames_of(html)["heads"], runs_of_code
    assert made.keys() == charts.keys()
    _near(heads, made["map"], {"entropy_nats": "estimate"}, ["layer", "head"])
    kinds = made["kinds"].sort("layer", "head")
    assert [(h["kind"], h["awake"]) for h in heads] == kinds.select(pl.col("kind").fill_null("none"), "awake").rows()
    _near(heads, made["rest"], {"rest": "rest"}, ["layer", "head"])
    offsets = charts["distance"]["data"]["rows"]
    _near(
        offsets,
        made["distance"].sort("layer", "head", "bin").with_columns(id=pl.struct("layer", "head").rle_id()),
        {"mass": "mass", "ratio": "ratio"},
        ["id", "bin"],
    )
    _near(
        charts["entropy-by-position"]["data"]["rows"],
        made["entropy-by-position"],
        {"entropy_nats": "entropy_nats"},
        ["layer", "bin"],
    )
    lengths = made["entropy-by-length"].filter(pl.col("entropy_normalized").is_not_null())
    _near(
        charts["entropy-by-length"]["data"]["rows"],
        lengths,
        {"entropy_normalized": "entropy_normalized", "low": "entropy_normalized_low"},
        ["layer", "stratum"],
    )
    for name, column in (
        ("update-cosine", "update_cosine"),
        ("anisotropy", "anisotropy"),
        ("stream-norm", "stream_norm"),
    ):
        frame = made[name].filter(pl.col(column).is_not_null()).with_columns(pl.col("site").str.replace_all("_", " "))
        _near(charts[name]["data"]["rows"], frame, {"estimate": column, "high": f"{column}_high"}, ["layer", "site"])
    matrix = np.array([row["similarity"] for row in charts["similarity"]["data"]["rows"]])
    pairs = made["similarity"]["bhattacharyya"].to_list()
    above = matrix.reshape(len(heads), len(heads))[np.triu_indices(len(heads), 1)]
    assert sorted(above) == pytest.approx(sorted(pairs), abs=1e-6)


def test_the_sql_of_each_figure_makes_its_means(html: str, folder: Path, runs_of_code: dict[str, pl.DataFrame]) -> None:
    names = {
        "map": "estimate",
        "distance": "mass",
        "entropy-by-position": "entropy_nats",
        "update-cosine": "update_cosine",
    }
    for name, (_, *queries) in _codes(html).items():
        for sql in queries:
            rows = pl.from_arrow(query(folder, sql.replace("{column}", "entropy_nats")))
            assert isinstance(rows, pl.DataFrame) and rows.height > 0
            if name in names:
                column = {"map": "entropy_nats"}.get(name, names[name])
                by = [c for c in ("stack", "layer", "head", "site", "bin") if c in rows.columns]
                both = rows.filter(pl.col(column).is_not_null()).join(runs_of_code[name], on=by, suffix="_python")
                expected = both[names[name] if name == "map" else f"{column}_python"]
                assert both.height > 0 and both[column].to_list() == pytest.approx(
                    expected.to_list(), rel=1e-5, abs=1e-9
                )
    assert sum(len(codes) > 1 for codes in _codes(html).values()) >= 6


def test_the_findings_are_those_of_the_tables(html: str, folder: Path) -> None:
    from attlas.analysis.distance import distance_ranking

    dataset = Dataset.open(folder)
    awake = head_kinds(dataset).filter(~pl.col("is_at_rest"))
    farthest = distance_ranking(dataset).join(awake, on=HEAD, how="semi", maintain_order="left").row(-1, named=True)
    # the farthest of many: an interval that holds for all of them (Bonferroni), from the jackknife's error and SciPy's quantile
    estimates = head_estimates(dataset, ["distance_tokens"]).filter(layer=farthest["layer"], head=farthest["head"])
    se, effective = estimates["se"][0], estimates["effective_documents"][0]
    half = stats.t.ppf(1 - 0.025 / awake.height, effective - 1) * se
    low, high = farthest["distance_tokens"] - half, farthest["distance_tokens"] + half
    sentence = (
        f"It looks {estimate(farthest['distance_tokens'], low, high)} tokens away on average "
        f"({interval(low, high)}, simultaneous over {awake.height} heads)"
    )
    assert sentence in html
    assert f">L{farthest['layer']}H{farthest['head']}</button>" in html


def test_a_model_whose_heads_all_rest_has_a_report_without_extremes(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", layers=1, heads=2, lengths=(20, 40), recipes=[first_token_scores])
    text = "".join(Page(write_report(root).read_text("utf-8")).text)
    assert "farthest head" not in text and "where attention goes" not in text
    assert "2 of 2 heads are at rest, 2 of them on the first token" in text
    console = Console(width=140, file=io.StringIO())
    console.print(report(root).terminal())
    assert "Heads that stand out" not in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_sink_is_reported_once_and_is_no_extreme(html: str, folder: Path) -> None:
    resting = head_kinds(Dataset.open(folder)).filter(pl.col("is_at_rest")).select("layer", "head").rows()
    assert resting == [(0, 3)]
    highlights = html[html.index('<ul class="highlights">') : html.index('<section id="map">')]
    assert highlights.count("attention at rest") == 1
    assert ">L0H3</button>" not in highlights
    assert "Over the heads that are not at rest, this share of the attention goes to" in highlights


def test_medians_take_the_place_of_means_where_they_were_measured(html: str, tmp_path: Path) -> None:
    assert "mean over all tokens, massive ones too (--statistics stream_norm_median)" in html
    columns = ("stream_norm_median", "update_ratio_median")
    root = write_dataset(tmp_path / "d", documents=3, layers=2, heads=1, lengths=(20, 40), statistics=columns)
    text = write_report(root).read_text("utf-8")
    assert "size of the stream before the sublayer, median token" in text
    assert "massive ones too" not in text
    assert "times the norm of the median token&#39;s stream" in text


def test_one_document_gives_a_report_without_intervals_that_says_so(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", documents=1, layers=1, heads=2)
    text = write_report(root).read_text("utf-8")
    assert "Fewer than 2 documents were measured: estimates have no intervals." in text
    assert f"95{THIN}% interval" not in text
    assert "no interval: fewer than 2 documents" in text


def test_a_model_whose_stream_could_not_be_seen_has_a_report_without_it(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", documents=3, layers=1, heads=2)
    manifest = read_json(root / "manifest.json")
    assert manifest is not None
    del manifest["tables"]["residual"]
    manifest["model"]["residual"] = "the norms were not found"
    write_json(root / "manifest.json", manifest)
    shutil.rmtree(root / "residual")
    text = write_report(root).read_text("utf-8")
    assert "The residual stream was not measured: the norms were not found." in text
    assert 'id="residual"' not in text
    assert "massive activation</h3>" in text


def test_two_stacks_have_a_map_each(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", documents=3, layers=1, heads=2, summaries=False)
    _rename_some_rows(root, "decoder")
    html = write_report(root).read_text("utf-8")
    charts = charts_of(html)
    labels = [chart["label"] for name, chart in charts.items() if name.startswith("map")]
    assert [label.split(":")[0] for label in labels] == [
        "heads by layer, encoder",
        "heads by layer, decoder",
    ]  # as the manifest has them, others last
    assert frames_of(html)["heads"][1]["label"] == "decoder L0H1"
    assert "no distance between them" not in html


def test_a_stack_without_distances_says_so(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", documents=3, layers=1, heads=2, summaries=False)
    _rename_some_rows(root, "cross")
    for path in sorted((root / "profiles").glob("*.parquet")):
        rewrite(root, f"profiles/{path.name}", _drop_cross_offsets)
    html = write_report(root).read_text("utf-8")
    assert [name for name in charts_of(html) if name.startswith("distance")] == ["distance-0"]
    assert html.count("there is no distance between them") == 1


def test_heads_that_look_over_an_image_are_ranked_by_patches(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", documents=3, layers=1, heads=2, summaries=False)
    for path in sorted((root / "heads").glob("*.parquet")):
        rows = pq.read_table(path)
        at = rows.schema.get_field_index("distance_patches")
        patches = pa.array([9.0 - head for head in rows["head"].to_pylist()], pa.float32())  # other than in tokens
        pq.write_table(rows.set_column(at, rows.schema.field(at), patches), path)
    text = "".join(Page(write_report(root).read_text("utf-8")).text)
    assert "It looks 8.00 patches of the image away on average" in text
    assert "heads.distance_patches" in text
    console = Console(width=140, file=io.StringIO())
    console.print(report(root).terminal())
    output = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "patches" in output
    nearest = next(line for line in output.splitlines() if "nearest" in line)
    assert "L0H1" in nearest and "8.00" in nearest


def _drop_cross_offsets(rows: pa.Table) -> pa.Table:
    pairs = zip(rows["stack"].to_pylist(), rows["profile"].to_pylist(), strict=True)
    return rows.filter([pair != ("cross", "offset") for pair in pairs])


def test_a_folder_is_no_place_for_a_report(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="a report is a file"):
        write_report(folder, tmp_path)


def test_the_summary_names_extremes_kinds_and_defects(folder: Path) -> None:
    console = Console(width=140, file=io.StringIO())
    console.print(report(folder).terminal())
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    for word in ("sharpest", "farthest", "L1H3", "previous", "entropy collapse", "Note: Sequences hold"):
        assert word in text


def test_a_class_that_no_sequence_has_a_token_of_is_shown_nowhere(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", summaries=False)
    for part in sorted((root / "heads").glob("*.parquet")):
        table = pq.read_table(part)
        place = table.schema.get_field_index("mass_separator")
        nothing = pa.array([0.0] * table.num_rows, pa.float32())
        pq.write_table(table.set_column(place, table.schema.field(place), nothing), part)
    html = write_report(root, tmp_path / "report.html").read_text()
    assert ">mass_punctuation</option>" in html and ">mass_separator</option>" not in html
    content = gather(Dataset.open(root))
    assert content.heads["mass_separator"].is_null().all()
    assert content.heads["mass_punctuation"].is_not_null().all()
    console = Console(width=160, file=io.StringIO())
    console.print(report(root).terminal())
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    ranked = [line for line in text.splitlines() if re.search(r"L\dH\d .*±", line)]
    assert ranked and all(line.rstrip().endswith("–") for line in ranked)


def test_numbers_show_the_digits_that_their_interval_knows() -> None:
    assert estimate(0.97312, 0.9721, 0.9741, share=True) == f"97.3{THIN}%"
    assert interval(0.9721, 0.9741, share=True) == f"95{THIN}% interval 97.2{THIN}% to 97.4{THIN}%"
    assert (estimate(52.567, 52.3, 52.84), half_width(52.3, 52.84)) == ("52.6", "±0.3")
    assert (estimate(1234.5, 1200.0, 1270.0), half_width(1200.0, 1270.0)) == (f"1{THIN}234", "±35")
    assert (estimate(0.5, None, None), interval(None, None)) == ("0.500", "no interval: fewer than 2 documents")
    assert half_width(None, None) == ""
    assert estimate(3e-12, 2e-12, 4e-12) == "3.0e−12"


def test_numbers_read_well_without_an_interval() -> None:
    assert [format_number(v) for v in (None, 0, 0.0123, -2.5, 31.44, 987.6, 12345.6, 2e-7)] == [
        "–",
        "0",
        "0.012",
        "−2.50",
        "31.4",
        "988",
        f"12{THIN}346",
        "2.0e−07",
    ]
    assert [percent(v) for v in (None, 0.012, 0.5)] == ["–", f"1.2{THIN}%", f"50{THIN}%"]


def test_a_few_outliers_do_not_decide_the_scale_of_a_map() -> None:
    values = pl.DataFrame({name: [0.1 + n / 1000 for n in range(200)] for name in ("entropy_nats", "distance_tokens")})
    values = values.with_columns(
        distance_tokens=pl.when(pl.int_range(200) == 7).then(900.0).otherwise("distance_tokens"),
        offset_tokens=pl.int_range(200) - 50.0,
        mass_first=pl.lit(0.0),
    )
    scales = {row["name"]: row for row in shown_columns(values, {}).iter_rows(named=True)}
    assert scales["distance_tokens"]["high"] < 0.31 and scales["distance_tokens"]["beyond"]
    assert scales["entropy_nats"]["low"] == 0
    offset = scales["offset_tokens"]
    assert offset["signed"] and offset["low"] == -offset["high"] and offset["high"] > 140
    assert scales["mass_first"]["low"] == scales["mass_first"]["high"] == 0  # said, instead of a scale to 1


def test_a_document_that_is_unlike_the_others_and_the_dropped_ones_are_named(html: str, folder: Path) -> None:
    assert "Dropped before measuring: 1 empty" in html
    found = outlying_documents(Dataset.open(folder)).filter("is_outlier")
    assert (
        f"{found['document_id'].n_unique()} {'is' if found['document_id'].n_unique() == 1 else 'are'} unlike the others"
        in html
    )
    for source in found["source"].unique():
        assert source in html


def _rename_some_rows(root: Path, stack: str) -> None:
    """Move head 1 to another stack in every measured table; a report does not check checksums."""
    for table in ("heads", "profiles"):
        for path in sorted((root / table).glob("*.parquet")):
            rows = pq.read_table(path)
            frame = pl.from_arrow(rows)
            assert isinstance(frame, pl.DataFrame)
            renamed = frame.with_columns(
                stack=pl.when(pl.col("head") == 1).then(pl.lit(stack)).otherwise(pl.col("stack").cast(pl.String))
            ).to_arrow()
            columns = [renamed[n].cast(rows.schema.field(n).type) for n in rows.column_names]
            Store.at(root).write_part(table, int(path.stem[-5:]), type(rows).from_arrays(columns, schema=rows.schema))


def test_the_numbers_of_the_page_are_json(folder: Path) -> None:
    found = report(folder)
    numbers = json.loads(json.dumps(found.numbers(), allow_nan=False))
    assert numbers["model"] == "known patterns"
    assert [row["entropy_nats"] for row in numbers["heads"]] == found.content.heads["entropy_nats"].to_list()
    assert {"heads", "layers", "residual", "offsets", "rules", "found"} <= numbers.keys()


def test_a_notebook_shows_the_page_and_it_can_be_saved(folder: Path, tmp_path: Path) -> None:
    found = report(folder)
    assert found._repr_html_().startswith("<iframe srcdoc=")
    assert "<script>" not in found._repr_html_()  # it is escaped
    assert found.save(tmp_path / "page.html").read_text() == found.html
