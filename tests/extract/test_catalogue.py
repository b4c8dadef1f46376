"""What the catalogue says of a column is so: its known values, its example query."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attlas.analysis.query import query
from attlas.extract.engines.observations import NormObservation, ResidualObservation
from attlas.extract.options import RunOptions
from attlas.extract.tables import TABLES
from attlas.extract.tables.description import PATTERNS as NAMES
from attlas.extract.tables.description import description_of, example_of, grouped
from tests.extract.models import save_with_tokenizer
from tests.extract.runs import complete_run
from tests.extract.test_heads import columns_of_pattern
from tests.patterns import CLOSED_FORMS, PATTERNS, closed_form, harmonic

HEADS = [(c.name, letter) for c in TABLES["heads"].facts for letter in c.known]
RESIDUAL = [(c.name, state) for c in TABLES["residual"].facts for state in c.known]
BY_NAME = [c.name for table in TABLES.values() for c in table.statistics if c.by_name]
WIDTH = 8


def value_of(formula: str, **symbols: float) -> float:
    """The value of a formula as the catalogue writes it: 3n/(2(n+1)), ln(n!)/n, √((n²−1)/12)."""
    over = re.fullmatch(r"mean of (.+) over m = 1…n", formula)
    if over:
        return math.fsum(value_of(over[1], m=m) for m in range(1, int(symbols["n"]) + 1)) / symbols["n"]
    code = formula.replace("−", "-").replace("²", "**2").replace("·", "*").replace("^", "**")
    code = re.sub(r"ln\(n!\)", "lgamma(n+1)", code)
    code = re.sub(r"ln (\w+)", r"log(\1)", code)
    code = re.sub(r"√(\w)", r"sqrt(\1)", code).replace("√(", "sqrt(")
    code = re.sub(r"(\d)(?=[a-z(])", r"\1*", code)
    known = {"lgamma": math.lgamma, "log": math.log, "sqrt": math.sqrt, "__builtins__": {}}
    return float(eval(code, known, symbols))


def test_formulas_of_the_catalogue_are_read_as_people_read_them() -> None:
    assert value_of("3n/(2(n+1))", n=5) == 15 / 12
    assert value_of("ln n − 2·ln 2/n", n=8) == math.log(8) - math.log(2) / 4
    assert value_of("√((n²−1)/12)", n=5) == math.sqrt(2) and value_of("√d", d=9) == 3
    assert value_of("n·4^(−1/n)", n=2) == 1
    assert value_of("mean of √((m²−1)/12) over m = 1…n", n=2) == math.sqrt(3 / 12) / 2


@pytest.mark.parametrize("n", [8, 32])
@pytest.mark.parametrize(("column", "letter"), HEADS)
def test_a_head_column_has_its_known_values(column: str, letter: str, n: int) -> None:
    (record,) = (c for c in TABLES["heads"].facts if c.name == column)
    stated = value_of(record.known[letter], n=n, h=harmonic(n))
    assert columns_of_pattern(*PATTERNS[letter](n))[column] == pytest.approx(stated, abs=1e-6, rel=1e-6)
    if letter in CLOSED_FORMS.get(column, {}):
        assert closed_form(column, letter, n) == pytest.approx(stated)


def test_a_column_with_known_values_states_every_closed_form_that_the_tests_have() -> None:
    stated = {c.name: set(c.known) for c in TABLES["heads"].facts if c.known}
    missing = {
        (name, letter) for name, letters in stated.items() for letter in set(CLOSED_FORMS.get(name, ())) - letters
    }
    # which depend on the first rows alone
    assert missing == {("sink_keys", "P"), ("mean_log_self", "P"), ("mean_log_self", "F")}
    assert set(NAMES) == set(PATTERNS)


def random_states(tokens: int = 5) -> torch.Tensor:
    return torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(0))


def site(after: torch.Tensor, **facts) -> ResidualObservation:
    return ResidualObservation(torch.ones(after.shape[:2], dtype=torch.bool), after, **facts)


def update(share: float) -> ResidualObservation:
    stream = random_states()
    return site(stream * (1 + share), stream=stream, update=stream * share)


def plain_norm() -> ResidualObservation:
    read = random_states()
    wrote = torch.nn.functional.layer_norm(read, (WIDTH,), eps=1e-5)
    return site(read, norm=NormObservation(read, wrote, "layer", 1e-5))


STATES: dict[str, Callable[[], ResidualObservation]] = {
    "F = −x": lambda: update(-1.0),
    "F = −x/2": lambda: update(-0.5),
    "F = x": lambda: update(1.0),
    "equal tokens": lambda: site(random_states(1).expand(-1, 5, -1)),
    "orthogonal tokens": lambda: site(torch.eye(5, WIDTH)[None]),
    "one-hot tokens": lambda: site(3 * torch.eye(5, WIDTH)[None]),
    "constant tokens": lambda: site(torch.full((1, 5, WIDTH), 2.0)),
    "γ = 1, β = 0": plain_norm,
    "equal heads": lambda: site(random_states(), contexts=random_states()[:, None].expand(-1, 3, -1, -1)),
}


@pytest.mark.parametrize(("column", "state"), RESIDUAL)
def test_a_residual_column_has_its_known_values(column: str, state: str) -> None:
    (record,) = (c for c in TABLES["residual"].facts if c.name == column)
    assert record.compute is not None
    got = float(record.compute(STATES[state]()).item())
    assert got == pytest.approx(value_of(record.known[state], d=WIDTH), abs=1e-5)


@pytest.fixture(scope="module")
def dataset(demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with every column of every table."""
    folder = tmp_path_factory.mktemp("everything")
    model = save_with_tokenizer(demo.tokenizer, folder / "model")
    on_request = [table.name for table in TABLES.values() if table.on_request]
    asked = RunOptions(
        model=str(model),
        corpus="needle",
        out=folder / "out",
        blocks=1,
        length=40,
        tokens="text",
        statistics=["all", *BY_NAME, *on_request],
        engine="reference",
    )
    complete_run(asked)
    return folder / "out"


@pytest.mark.parametrize("name", list(TABLES))
def test_every_example_runs_and_gives_rows(dataset: Path, name: str) -> None:
    table = TABLES[name]
    for column in table.columns:
        assert query(dataset, example_of(table, column)).num_rows > 0, column.name


def test_every_column_is_described_in_json() -> None:
    for table in TABLES.values():
        for column in table.columns:
            description = json.loads(json.dumps(description_of(table, column)))
            assert {"table", "name", "formula", "type", "nullable", "measured", "example"} <= set(description)
            assert set(description.get("known", {})) == {NAMES.get(key, key) for key in column.known}


def test_columns_of_heads_and_residual_that_every_run_measures_have_a_group() -> None:
    for name in ("heads", "residual"):
        groups = grouped(TABLES[name].facts)
        assert len(groups) >= 4
        assert sorted(c.name for columns in groups.values() for c in columns) == sorted(
            c.name for c in TABLES[name].facts
        )
