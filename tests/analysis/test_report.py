import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from attlas.analysis.dataset import Dataset
from attlas.analysis.heads import HEAD
from attlas.analysis.kinds import head_kinds
from attlas.analysis.report import report, summary, write_report
from attlas.analysis.report.content import gather
from attlas.analysis.report.figures import nice_ticks, step
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


def test_names_are_escaped_wherever_they_stand(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", documents=3, layers=1, heads=2, model_name=HOSTILE, corpus_name=HOSTILE)
    text = write_report(root).read_text("utf-8")
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not any(tag == "img" for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert HOSTILE in "".join(page.text)
    assert "{{ 7 * 7 }}" in "".join(page.text)


def test_stack_names_are_escaped_in_figures(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", documents=3, layers=1, heads=2, summaries=False)
    _rename_some_rows(root, "<b>odd</b>")
    text = write_report(root).read_text("utf-8")
    assert "<b>odd</b>" not in text
    assert "&lt;b&gt;odd&lt;/b&gt;" in text


def test_the_page_loads_nothing(html: str) -> None:
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "img", "base")
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or value == "data:,", (tag, name, value)
    assert not re.search(
        r"https?://|//[a-z]|url\(|@import|fetch\(|XMLHttpRequest", re.sub(r"\n// .*|; // .*", "", html)
    )
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_tags_are_closed_in_order(html: str) -> None:
    page = Page(html)
    assert (page.open, page.misnested) == ([], [])


def test_every_head_is_in_the_atlas_and_in_the_table(html: str, folder: Path) -> None:
    heads = Dataset.open(folder).scan("heads").select(HEAD).unique().collect().height
    page = Page(html)
    plates = [a for t, a in page.tags if t == "g" and (a.get("class") or "").startswith("plate")]
    rows = [a for t, a in page.tags if t == "tr" and "data-h" in a]
    assert len(plates) == len(rows) == heads
    assert {a["data-h"] for a in plates} == {a["data-h"] for a in rows}


def test_every_figure_has_a_name_and_every_mark_of_a_map_a_title(html: str) -> None:
    page = Page(html)
    figures = [a for t, a in page.tags if t == "svg" and a.get("aria-hidden") != "true"]
    assert figures
    assert all(a.get("role") == "img" and a.get("aria-label") for a in figures)
    assert len(re.findall(r'<rect class="cell[^>]*><title>', html)) > 0
    assert not re.search(r'<rect class="cell r[^>]*/>', html)


def test_the_findings_are_those_of_the_tables(html: str, folder: Path) -> None:
    from attlas.analysis.distance import distance_ranking

    dataset = Dataset.open(folder)
    awake = head_kinds(dataset).filter(~pl.col("is_at_rest"))
    farthest = distance_ranking(dataset).join(awake, on=HEAD, how="semi", maintain_order="left").row(-1, named=True)
    low, high = farthest["distance_tokens_low"], farthest["distance_tokens_high"]
    sentence = (
        f"It looks {estimate(farthest['distance_tokens'], low, high)} tokens away on average ({interval(low, high)})"
    )
    assert sentence in html
    assert f">L{farthest['layer']}H{farthest['head']}</button>" in html


def test_a_model_whose_heads_all_rest_has_a_report_without_extremes(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", layers=1, heads=2, lengths=(20, 40), recipes=[first_token_scores])
    text = "".join(Page(write_report(root).read_text("utf-8")).text)
    assert "farthest head" not in text and "where attention goes" not in text
    assert "2 of 2 heads are at rest, 2 of them on the first token" in text
    console = Console(width=140, file=io.StringIO())
    console.print(summary(root))
    assert "Heads that stand out" not in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_sink_is_reported_once_and_is_no_extreme(html: str, folder: Path) -> None:
    resting = head_kinds(Dataset.open(folder)).filter(pl.col("is_at_rest")).select("layer", "head").rows()
    assert resting == [(0, 3)]
    highlights = html[html.index('<ul class="highlights">') : html.index('<section id="atlas">')]
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


def test_two_stacks_have_an_atlas_each(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", documents=3, layers=1, heads=2, summaries=False)
    _rename_some_rows(root, "decoder")
    page = Page(write_report(root).read_text("utf-8"))
    assert _atlases(page) == ["encoder", "decoder"]  # as the manifest has them, others last
    assert "decoder L0H1" in "".join(page.text)
    assert "no distance between them" not in "".join(page.text)


def test_a_stack_without_distances_says_so_at_its_atlas(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", documents=3, layers=1, heads=2, summaries=False)
    _rename_some_rows(root, "cross")
    for path in sorted((root / "profiles").glob("*.parquet")):
        rewrite(root, f"profiles/{path.name}", _drop_cross_offsets)
    page = Page(write_report(root).read_text("utf-8"))
    assert _atlases(page) == ["encoder", "cross"]
    assert "".join(page.text).count("there is no distance between them") == 1


def test_heads_that_look_over_an_image_are_ranked_by_patches(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", documents=3, layers=1, heads=2, summaries=False)
    for path in sorted((root / "heads").glob("*.parquet")):
        rows = pq.read_table(path)
        at = rows.schema.get_field_index("distance_patches")
        patches = pa.array([9.0 - head for head in rows["head"].to_pylist()], pa.float32())  # other than in tokens
        pq.write_table(rows.set_column(at, rows.schema.field(at), patches), path)
    text = "".join(Page(write_report(root).read_text("utf-8")).text)
    assert "It looks 8.00 patches of the image away on average" in text
    assert "Distance over the image" in text and "heads.distance_patches" in text
    console = Console(width=140, file=io.StringIO())
    console.print(summary(root))
    output = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "patches" in output
    nearest = next(line for line in output.splitlines() if "nearest" in line)
    assert "L0H1" in nearest and "8.00" in nearest


def _drop_cross_offsets(rows: pa.Table) -> pa.Table:
    pairs = zip(rows["stack"].to_pylist(), rows["profile"].to_pylist(), strict=True)
    return rows.filter([pair != ("cross", "offset") for pair in pairs])


def _atlases(page: Page) -> list[str]:
    names = [
        a["aria-label"] or "" for t, a in page.tags if t == "svg" and "Every head of" in (a.get("aria-label") or "")
    ]
    return [name.split("Every head of ")[1].split()[0] for name in names]


def test_a_folder_is_no_place_for_a_report(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="a report is a file"):
        write_report(folder, tmp_path)


def test_the_summary_names_extremes_kinds_and_defects(folder: Path) -> None:
    console = Console(width=140, file=io.StringIO())
    console.print(summary(folder))
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
    assert "weight on punctuation" in html and "weight on tokens that end" not in html
    assert "mass separator" not in html
    content = gather(Dataset.open(root))
    assert content.heads["mass_separator"].is_null().all()
    assert content.heads["mass_punctuation"].is_not_null().all()
    console = Console(width=160, file=io.StringIO())
    console.print(summary(root))
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


def test_ticks_span_the_data_and_steps_span_the_scale() -> None:
    for low, high in ((0.0, 1.0), (0.13, 0.17), (-3.0, 5.0), (2.0, 2.0), (0.0, 0.0), (1e-9, 2e-9), (980.0, 1210.0)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low <= high <= ticks[-1]
        assert 2 <= len(ticks) <= 8
    assert (step(0.0, 0.0, 1.0), step(1.0, 0.0, 1.0), step(9.0, 0.0, 1.0), step(0.5, 1.0, 1.0)) == (0, 19, 19, 0)


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
