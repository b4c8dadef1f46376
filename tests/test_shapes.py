"""The checks of shapes are on: without them every other test would pass as well."""

import pytest
import torch
from jaxtyping import TypeCheckError

from attlas.extract.engines.observations import ResidualObservation


def test_a_record_of_shapes_that_do_not_fit_is_an_error():
    with pytest.raises(TypeCheckError, match="after"):
        ResidualObservation(real=torch.ones(2, 3, dtype=torch.bool), after=torch.zeros(2, 4, 8))


def test_a_call_with_shapes_that_do_not_fit_is_an_error():
    observation = ResidualObservation(real=torch.ones(2, 3, dtype=torch.bool), after=torch.zeros(2, 3, 8))
    assert observation.mean(torch.ones(2, 3)).tolist() == [1, 1]
    with pytest.raises(TypeCheckError, match="values"):
        observation.mean(torch.ones(2, 3, 8))
