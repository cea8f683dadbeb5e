"""Sequence and token classification: which token is classified, with pads and memory, and the losses."""

import pytest
import torch
from models.transformer_xl.small_models import EXACT, MODES, SINGLE, VARIANTS, random_ids, small_model, word_tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, pipeline
from transformers.modeling_outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput

from hf_efficient import (
    TransformerXLForSequenceClassification,
    TransformerXLForTokenClassification,
    TransformerXLModel,
)

PATTERNS = {
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "holes": [[1, 0, 1, 0, 0], [0, 1, 1, 1, 0], [1, 1, 0, 0, 1]],
}


@pytest.fixture(params=["plain", "everything", "adaptive_narrow"])
def variant(request):
    return VARIANTS[request.param]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_sequences_are_classified_by_their_last_token(pattern, mode, variant):
    """With a memory by the last one of this segment; each row as if it were alone."""
    model = small_model(TransformerXLForSequenceClassification, num_labels=3, **variant)
    mask, cache = torch.tensor(pattern), model.create_cache()
    alone = [model.create_cache() for _ in pattern]
    with MODES[mode]():
        for step in range(3):
            ids = random_ids(3, 5, seed=step)
            output = model(ids, attention_mask=mask, past_key_values=cache)
            assert isinstance(output, SequenceClassifierOutputWithPast)
            assert output.past_key_values is cache
            for row, row_mask in enumerate(mask.bool()):
                states = model.model(ids[row : row + 1, row_mask], past_key_values=alone[row]).last_hidden_state
                expected = model.score.weight @ states[0, -1]
                torch.testing.assert_close(output.logits[row], expected, **EXACT)


def test_last_token_is_found_by_the_pad_token_without_a_mask():
    model = small_model(TransformerXLForSequenceClassification, num_labels=3, pad_token_id=0)
    ids = torch.tensor([[4, 5, 6, 0, 0], [4, 5, 6, 7, 8], [9, 0, 1, 0, 0]])
    expected = [model(row[None, : row.nonzero().max() + 1]).logits[0] for row in ids]
    torch.testing.assert_close(model(ids).logits, torch.stack(expected), **EXACT)


def test_rows_without_an_end_are_refused():
    model = small_model(TransformerXLForSequenceClassification, num_labels=3)
    assert model(random_ids(1, 4)).logits.shape == (1, 3)
    with pytest.raises(ValueError, match="where the 2 rows end.*attention_mask.*pad_token_id"):
        model(random_ids(2, 4))


def test_sequences_of_embeddings_are_classified_like_ids():
    model = small_model(TransformerXLForSequenceClassification, num_labels=3)
    ids, mask = random_ids(3, 5), torch.tensor(PATTERNS["right"])
    expected = model(ids, attention_mask=mask).logits
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings, attention_mask=mask).logits, expected, **EXACT)
    whole = model(ids, attention_mask=torch.ones(3, 5)).logits
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, whole, **EXACT)


def test_a_row_of_pads_disturbs_no_other_and_stays_finite():
    model = small_model(TransformerXLForSequenceClassification, num_labels=3)
    ids = random_ids(2, 4)
    mask = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0]])
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1:], model(ids[1:, :3]).logits, **EXACT)


REGRESSION, CLASSES = torch.nn.functional.mse_loss, torch.nn.functional.cross_entropy
SEVERAL = torch.nn.functional.binary_cross_entropy_with_logits


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels", "loss"),
    [
        ("single_label_classification", 3, [2, 0], CLASSES),
        (None, 3, [2, 0], CLASSES),
        ("regression", 1, [0.5, -1.0], REGRESSION),
        (None, 1, [0.5, -1.0], REGRESSION),
        ("regression", 2, [[0.5, -1.0], [0.0, 2.0]], REGRESSION),
        ("multi_label_classification", 3, [[0.0, 1, 1], [1, 0, 0]], SEVERAL),
        (None, 3, [[0.0, 1, 1], [1, 0, 0]], SEVERAL),
    ],
)
def test_loss_of_sequences(problem_type, num_labels, labels, loss):
    model = small_model(TransformerXLForSequenceClassification, num_labels=num_labels, problem_type=problem_type)
    labels = torch.tensor(labels)
    labels = labels.double() if labels.is_floating_point() else labels
    output = model(random_ids(2, 4), attention_mask=torch.ones(2, 4), labels=labels)
    expected = loss(output.logits.squeeze(-1) if num_labels == 1 else output.logits, labels)
    torch.testing.assert_close(output.loss, expected, **EXACT)


def test_loss_does_not_write_into_the_config():
    """A call with class ids must not decide how a later one with numbers is counted."""
    model = small_model(TransformerXLForSequenceClassification, num_labels=3)
    mask = torch.ones(2, 4)
    model(random_ids(2, 4), attention_mask=mask, labels=torch.tensor([2, 0]))
    assert model.config.problem_type is None
    several = torch.tensor([[0.0, 1, 1], [1, 0, 0]]).double()
    output = model(random_ids(2, 4), attention_mask=mask, labels=several)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, several)
    torch.testing.assert_close(output.loss, expected, **EXACT)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_every_token_is_classified(pattern, mode, variant):
    model = small_model(TransformerXLForTokenClassification, num_labels=4, **variant)
    mask, cache = torch.tensor(pattern), model.create_cache()
    alone = [model.create_cache() for _ in pattern]
    with MODES[mode]():
        for step in range(3):
            ids = random_ids(3, 5, seed=step)
            output = model(ids, attention_mask=mask, past_key_values=cache)
            assert isinstance(output, TokenClassifierOutput)
            for row, row_mask in enumerate(mask.bool()):
                states = model.model(ids[row : row + 1, row_mask], past_key_values=alone[row]).last_hidden_state
                expected = states[0] @ model.score.weight.T + model.score.bias
                torch.testing.assert_close(output.logits[row, row_mask], expected, **EXACT)
    assert cache.get_seq_length() == 15


def test_loss_of_tokens_ignores_what_it_should():
    model = small_model(TransformerXLForTokenClassification, num_labels=4)
    ids, labels = random_ids(2, 5), torch.tensor([[0, 3, -100, 1, -100], [-100] * 5])
    before = labels.clone()
    output = model(ids, labels=labels)
    # transformers computes this loss in float32, whatever the model's dtype.
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1).float(), labels.flatten())
    torch.testing.assert_close(output.loss, expected, **SINGLE)
    assert torch.equal(labels, before)


def test_token_head_has_dropout_and_sequence_head_has_none():
    for cls, differs in [(TransformerXLForTokenClassification, True), (TransformerXLForSequenceClassification, False)]:
        model = small_model(cls, num_labels=2).train()
        model.model.eval()
        for module in model.children():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        ids = random_ids(1, 6)
        assert torch.equal(model(ids).logits, model(ids).logits) != differs


@pytest.mark.parametrize(
    ("auto_class", "cls"),
    [
        (AutoModel, TransformerXLModel),
        (AutoModelForSequenceClassification, TransformerXLForSequenceClassification),
        (AutoModelForTokenClassification, TransformerXLForTokenClassification),
    ],
)
def test_auto_classes_find_the_heads(auto_class, cls):
    model = small_model(cls)
    assert type(auto_class.from_config(model.config)) is cls


@pytest.mark.parametrize("cls", [TransformerXLForSequenceClassification, TransformerXLForTokenClassification])
def test_heads_give_hidden_states_attentions_and_tuples(cls):
    model = small_model(cls, num_labels=2)
    output = model(random_ids(1, 4), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert len(output.attentions) == 2
    labels = torch.tensor([1]) if cls is TransformerXLForSequenceClassification else torch.ones(1, 4).long()
    loss, logits, *_ = model(random_ids(1, 4), labels=labels, return_dict=False)
    assert loss.ndim == 0
    assert torch.equal(logits, output.logits)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_classification_pipelines(batch_size):
    """A text gets the same classes in a padded batch as alone."""
    texts, tokenizer = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"], word_tokenizer()
    model = small_model(TransformerXLForSequenceClassification, dtype=torch.float32, num_labels=3)
    classifier = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    for text, scores in zip(texts, classifier(texts, batch_size=batch_size), strict=True):
        expected = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].softmax(-1)
        for score in scores:
            assert abs(score["score"] - expected[int(score["label"].removeprefix("LABEL_"))]) < 1e-5
    model = small_model(TransformerXLForTokenClassification, dtype=torch.float32, num_labels=3)
    tagger = pipeline("token-classification", model=model, tokenizer=tokenizer, ignore_labels=[])
    for text, words in zip(texts, tagger(texts, batch_size=batch_size), strict=True):
        expected = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].argmax(-1)
        assert [word["entity"] for word in words] == [f"LABEL_{label}" for label in expected]
