"""The arguments of `measure`: options, inputs by name, tensors; mistakes are refused with the correct call."""

import re

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from attlas.extract import measure
from attlas.extract.errors import Refusal
from tests.extract.models import tiny
from tests.extract.test_projections import batch, built

IDS = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(6))


class Tolerant(nn.Module):
    """A user's own module with **kwargs, which reads one that its signature does not name."""

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
        ("per_token", "the options are tokenizer, engine, tables"),
        ("offset_mapping", ""),
    ],
)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_an_unknown_keyword_is_refused_by_name(family, name, hint):
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
def test_common_inputs_of_models_and_tokenizers_are_accepted(family, inputs):
    assert measure(tiny(family), input_ids=IDS, **inputs)["heads"].num_rows


def test_keywords_that_a_model_passes_on_are_accepted():
    model = transformers.BertForSequenceClassification(tiny("bert").config).eval()
    assert measure(model, input_ids=IDS, token_type_ids=torch.zeros_like(IDS))["heads"].num_rows


def test_a_user_module_may_read_any_keyword_except_a_misspelled_option():
    model = Tolerant().eval()
    assert measure(model, **batch(), gain=2.0)["heads"].num_rows
    with pytest.raises(Refusal, match=r"no input tokeniser; did you mean tokenizer\?"):
        measure(model, **batch(), tokeniser=None)


@pytest.mark.parametrize("kind", [dict, transformers.BatchEncoding])
def test_a_batch_passed_without_asterisks_is_refused(kind):
    with pytest.raises(
        Refusal, match=rf"passed by name; got a {kind.__name__} of input_ids.*measure\(model, \*\*batch\)"
    ):
        measure(tiny("bert"), kind({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}))


@pytest.mark.parametrize("given", [IDS.tolist(), tuple(IDS.tolist()), IDS.numpy(), IDS[0].tolist(), np.ones((2, 3))])
def test_lists_and_arrays_are_refused(given):
    message = rf"tensors; got input_ids as a {type(given).__name__} of numbers; write torch.tensor.*return_tensors"
    with pytest.raises(Refusal, match=message):
        measure(tiny("bert"), input_ids=given)
    with pytest.raises(Refusal, match=f"tensors; got a {type(given).__name__} of numbers"):
        measure(tiny("bert"), given)


@pytest.mark.parametrize("given", ["a text", ["a text", "another"], np.array(["a text"])])
def test_text_that_was_not_tokenized_is_refused(given):
    for arguments, inputs in (((given,), {}), ((), {"input_ids": given})):
        with pytest.raises(Refusal, match=r"tensors; got .*text; write measure\(model, \*\*tokenizer\(texts"):
            measure(tiny("bert"), *arguments, **inputs)


def test_tensors_inside_a_list_are_refused():
    class ListInput(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = built(nn.Linear)

        def forward(self, inputs):
            return self.inner(*inputs)

    given = batch()
    with pytest.raises(Refusal, match="needs the tensors"):
        measure(ListInput().eval(), [given["input_ids"], given["attention_mask"]])
