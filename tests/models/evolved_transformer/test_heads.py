"""The head that classifies sequences: what it reads, with pads, its losses, its configuration."""

import pytest
import torch
from models.evolved_transformer.small_models import EXACT, random_ids, small_model, word_tokenizer
from models.evolved_transformer.whole_models import STACKS
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, pipeline
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_efficient import (
    EvolvedTransformerForCausalLM,
    EvolvedTransformerForConditionalGeneration,
    EvolvedTransformerForSequenceClassification,
    EvolvedTransformerModel,
)

PATTERNS = {
    "left": [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0]],
    "both": [[0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0, 0]],
}
POOLED = {
    "mean": lambda states: states.mean(dim=0),
    "first": lambda states: states[0],
    "last": lambda states: states[-1],
}
both_stacks = pytest.mark.parametrize("kind", ["encoder", "decoder"])


def small_head(num_labels=2, kind="encoder", **changes):
    settings = {"num_labels": num_labels} | STACKS[kind]
    return small_model(EvolvedTransformerForSequenceClassification, **(settings | changes))


@pytest.fixture(params=PATTERNS.values(), ids=PATTERNS)
def mask(request):
    return torch.tensor(request.param)


# --- what is read -------------------------------------------------------------------------------------------


@both_stacks
@pytest.mark.parametrize("pooling", POOLED)
def test_a_sequence_is_classified_by_its_tokens(mask, pooling, kind):
    """Each row as if it were alone, wherever its pads are."""
    model = small_head(3, kind, pooling=pooling)
    ids = random_ids(3, 7)
    logits = model(ids, attention_mask=mask).logits
    for row, row_mask in enumerate(mask.bool()):
        states = model.model(ids[row : row + 1, row_mask]).last_hidden_state[0]
        expected = model.classifier.weight @ POOLED[pooling](states) + model.classifier.bias
        torch.testing.assert_close(logits[row], expected, **EXACT)


@pytest.mark.parametrize("pooling", POOLED)
def test_without_a_mask_all_tokens_are_read(pooling):
    model = small_head(3, pooling=pooling)
    ids = random_ids(2, 9)
    states = model.model(ids).last_hidden_state
    expected = torch.stack([model.classifier(POOLED[pooling](row)) for row in states])
    torch.testing.assert_close(model(ids).logits, expected, **EXACT)
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, expected, **EXACT)


@both_stacks
@pytest.mark.parametrize("pooling", POOLED)
def test_a_row_of_pads_disturbs_no_other_and_stays_finite(pooling, kind):
    model = small_head(3, kind, pooling=pooling)
    ids, mask = random_ids(2, 4), torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0]])
    output = model(ids, attention_mask=mask, labels=torch.tensor([0, 1]))
    assert output.logits.isfinite().all()
    output.loss.backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    torch.testing.assert_close(output.logits[1:], model(ids[1:, :3]).logits, **EXACT)


@both_stacks
def test_a_head_has_one_stack(kind):
    names = {name.split(".")[1] for name in small_head(kind=kind).state_dict() if name.startswith("model.")}
    assert names == {"embed_tokens", kind}


def test_of_two_stacks_the_head_is_the_encoder():
    """And the caller's configuration stays as it is."""
    config = small_model(EvolvedTransformerForConditionalGeneration, **STACKS["both"]).config
    model = EvolvedTransformerForSequenceClassification(config)
    assert config.is_encoder_decoder
    assert not model.config.is_encoder_decoder
    assert model.model.decoder is None


# --- losses -------------------------------------------------------------------------------------------------

SEVERAL = F.binary_cross_entropy_with_logits


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels", "loss"),
    [
        ("single_label_classification", 3, [2, 0], F.cross_entropy),
        (None, 3, [2, 0], F.cross_entropy),
        ("regression", 1, [0.5, -1.0], F.mse_loss),
        (None, 1, [0.5, -1.0], F.mse_loss),
        ("regression", 2, [[0.5, -1.0], [0.0, 2.0]], F.mse_loss),
        ("multi_label_classification", 3, [[0.0, 1, 1], [1, 0, 0]], SEVERAL),
        (None, 3, [[0.0, 1, 1], [1, 0, 0]], SEVERAL),
    ],
)
def test_loss(problem_type, num_labels, labels, loss):
    model = small_head(num_labels, problem_type=problem_type)
    labels = torch.tensor(labels)
    labels = labels.double() if labels.is_floating_point() else labels
    output = model(random_ids(2, 4), labels=labels)
    expected = loss(output.logits.squeeze(-1) if num_labels == 1 else output.logits, labels)
    torch.testing.assert_close(output.loss, expected, **EXACT)


def test_loss_does_not_write_into_the_config():
    """A call with class ids must not decide how a later one with numbers is counted."""
    model = small_head(3)
    model(random_ids(2, 4), labels=torch.tensor([2, 0]))
    assert model.config.problem_type is None
    several = torch.tensor([[0.0, 1, 1], [1, 0, 0]]).double()
    output = model(random_ids(2, 4), labels=several)
    torch.testing.assert_close(output.loss, SEVERAL(output.logits, several), **EXACT)


def test_the_trainer_averages_over_accumulated_batches_itself():
    """The loss is one per row, and is not told the size of the whole batch."""
    assert EvolvedTransformerForSequenceClassification.accepts_loss_kwargs is False


# --- everything else ----------------------------------------------------------------------------------------


@both_stacks
def test_outputs_and_auto_class(kind):
    model = small_head(kind=kind, attn_implementation="eager")
    assert type(AutoModelForSequenceClassification.from_config(model.config)) is type(model)
    output = model(random_ids(1, 4), output_hidden_states=True, output_attentions=True)
    assert isinstance(output, SequenceClassifierOutput)
    assert len(output.hidden_states) == 3
    # A decoder's block has two self-attentions.
    assert len(output.attentions) == {"encoder": 2, "decoder": 4}[kind]
    assert "past_key_values" not in output
    first, *_ = model(random_ids(1, 4), return_dict=False)
    torch.testing.assert_close(first, output.logits, **EXACT)


@pytest.mark.parametrize("setting", ["classifier_dropout", "dropout"])
def test_dropout(setting):
    for is_on in (True, False):
        model = small_head(**{setting: 0.5 * is_on}).train()
        model.model.eval()
        ids = random_ids(1, 6)
        assert torch.equal(model(ids).logits, model(ids).logits) != is_on


@both_stacks
def test_body_weights_load_into_the_head(tmp_path, kind):
    """An encoder's, and a language model's where the head is causal."""
    source = EvolvedTransformerForCausalLM if kind == "decoder" else EvolvedTransformerModel
    body = small_model(source, **STACKS[kind])
    body.save_pretrained(tmp_path)
    body = getattr(body, "model", body)
    ids = random_ids(1, 9)
    model = EvolvedTransformerForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(model.model(ids).last_hidden_state, body(ids).last_hidden_state, **EXACT)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_pipeline(batch_size):
    """A text gets the same classes in a padded batch as alone."""
    texts, tokenizer = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"], word_tokenizer()
    model = small_head(3, dtype=torch.float32)
    classifier = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    for text, scores in zip(texts, classifier(texts, batch_size=batch_size), strict=True):
        expected = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].softmax(-1)
        for score in scores:
            assert abs(score["score"] - expected[int(score["label"].removeprefix("LABEL_"))]) < 1e-5
