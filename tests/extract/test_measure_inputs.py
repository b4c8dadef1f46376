"""What `measure` is given: options, inputs by name, tensors; what is meant otherwise is refused with what to write."""

import re

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from extract import measure
from extract.errors import Refusal
from tests.extract.models import tiny
from tests.extract.test_projections import batch, built

IDS = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(6))


class Tolerant(nn.Module):
    """A user's own module that takes any keyword, and reads one that its signature does not name."""

    def __init__(self):
        super().__init__()
        self.inner = built(nn.Linear)

    def forward(self, input_ids, **others):
        return self.inner(input_ids, others["attention_mask"]) * others.get("gain", 1)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tokeniser", "did you mean tokenizer?"),
        ("Tokenizer", "did you mean tokenizer?"),
        ("engin", "did you mean engine?"),
        ("table", "did you mean tables?"),
        ("atention_mask", "did you mean attention_mask?"),
        ("attention_masks", "did you mean attention_mask?"),
        ("per_token", "options are tokenizer, engine, tables"),
        ("offset_mapping", ""),
    ],
)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_keyword_that_nobody_reads_is_refused_by_its_name(family, name, hint):
    with pytest.raises(Refusal, match=rf"{name}.*{re.escape(hint)}"):
        measure(tiny(family), input_ids=IDS, **{name: True})


@pytest.mark.parametrize(
    "inputs",
    [
        {"token_type_ids": torch.zeros_like(IDS)},
        {"position_ids": torch.arange(9)[None]},
        {"use_cache": False},
        {"output_hidden_states": True},
        {"return_dict": True},
    ],
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_models_and_tokenizers_name_is_taken(family, inputs):
    assert measure(tiny(family), input_ids=IDS, **inputs)["heads"].num_rows


def test_keywords_are_known_that_a_model_hands_on():
    model = transformers.BertForSequenceClassification(tiny("bert").config).eval()
    assert measure(model, input_ids=IDS, token_type_ids=torch.zeros_like(IDS))["heads"].num_rows


def test_a_module_of_ones_own_may_read_any_keyword_but_one_that_is_nearly_an_option():
    model = Tolerant().eval()
    assert measure(model, **batch(), gain=2.0)["heads"].num_rows
    with pytest.raises(Refusal, match=r"no tokeniser; did you mean tokenizer\?"):
        measure(model, **batch(), tokeniser=None)


@pytest.mark.parametrize("kind", [dict, transformers.BatchEncoding])
def test_a_batch_is_spread_by_name(kind):
    with pytest.raises(
        Refusal, match=rf"by their names; got a {kind.__name__} of input_ids.*measure\(model, \*\*batch\)"
    ):
        measure(tiny("bert"), kind({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}))


@pytest.mark.parametrize("given", [IDS.tolist(), tuple(IDS.tolist()), IDS.numpy(), IDS[0].tolist(), np.ones((2, 3))])
def test_lists_and_arrays_are_no_tensors(given):
    told = rf"tensors; got input_ids as a {type(given).__name__} of numbers; write torch.tensor.*return_tensors"
    with pytest.raises(Refusal, match=told):
        measure(tiny("bert"), input_ids=given)
    with pytest.raises(Refusal, match=f"tensors; got a {type(given).__name__} of numbers"):
        measure(tiny("bert"), given)


@pytest.mark.parametrize("given", ["a text", ["a text", "another"], np.array(["a text"])])
def test_text_is_tokenised_first(given):
    for arguments, inputs in (((given,), {}), ((), {"input_ids": given})):
        with pytest.raises(Refusal, match=r"tensors; got .*text; write measure\(model, \*\*tokenizer\(texts"):
            measure(tiny("bert"), *arguments, **inputs)


def test_tensors_are_inputs_themselves_and_none_in_a_list():
    class OfSeveral(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = built(nn.Linear)

        def forward(self, inputs):
            return self.inner(*inputs)

    given = batch()
    with pytest.raises(Refusal, match="needs the tensors"):
        measure(OfSeveral().eval(), [given["input_ids"], given["attention_mask"]])
