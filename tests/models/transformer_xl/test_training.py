"""Training: losses and how they are counted, gradient checkpointing, dropout, accumulation."""

import copy

import pytest
import torch
from models.transformer_xl.naive_transformer_xl import NaiveRows
from models.transformer_xl.small_models import EXACT, VARIANTS, log_probs, random_ids, small_model

from hf_efficient import TransformerXLForCausalLM, TransformerXLForTokenClassification

HEADS = ["plain", "adaptive", "adaptive_shrinking", "narrow_embedding"]
IGNORED = torch.tensor([[5, -100, 16, 0, -100], [-100, -100, -100, -100, -100]])


def gradients(loss, model):
    """Gradient of every parameter by name."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True))


def assert_same_gradients(given, wanted, tolerance=EXACT):
    assert given.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(
            given[name], wanted[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("variant", HEADS)
def test_losses_are_in_token_order_and_their_mean_is_the_loss(variant):
    model = small_model(**VARIANTS[variant])
    ids = random_ids(2, 5)
    probabilities = log_probs(model(ids))
    output = model(ids, labels=ids)
    expected = -probabilities[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(output.losses, expected, **EXACT)
    torch.testing.assert_close(output.loss, expected.mean(), **EXACT)
    torch.testing.assert_close(output.logits.log_softmax(-1), probabilities, **EXACT)


@pytest.mark.parametrize("variant", HEADS)
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_loss_is_the_same_whatever_logits_are_kept(name, variant):
    """In evaluation they stand beside the loss; in training an adaptive softmax computes none."""
    model = small_model(**VARIANTS[variant])
    ids, labels = random_ids(2, 5), IGNORED
    logits, losses = model(ids).logits, model(ids, **{name: labels}).losses
    for kept, expected in ((0, logits), (2, logits[:, -2:]), (torch.tensor([3, 1]), logits[:, [3, 1]])):
        output = model(ids, logits_to_keep=kept, **{name: labels})
        torch.testing.assert_close(output.logits, expected, **EXACT)
        torch.testing.assert_close(output.losses, losses, **EXACT)
    trained = model.train()(ids, **{name: labels})
    torch.testing.assert_close(trained.losses, losses, **EXACT)
    assert (trained.logits is None) == model.config.is_adaptive


@pytest.mark.parametrize("variant", HEADS)
def test_shift_labels_are_taken_as_they_are(variant):
    """The last one may be the first token of the next segment."""
    model = small_model(**VARIANTS[variant])
    ids = random_ids(2, 6)
    whole = model(ids, labels=ids)
    output = model(ids[:, :5], shift_labels=ids[:, 1:])
    torch.testing.assert_close(output.losses, whole.losses, **EXACT)
    torch.testing.assert_close(output.loss, whole.loss, **EXACT)
    both = model(ids[:, :5], labels=torch.zeros_like(ids[:, :5]), shift_labels=ids[:, 1:])
    assert torch.equal(both.losses, output.losses)


@pytest.mark.parametrize("variant", HEADS)
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_ignored_labels_count_nowhere(name, variant):
    model = small_model(**VARIANTS[variant])
    ids = random_ids(2, 5)
    output = model(ids, **{name: IGNORED})
    labels = IGNORED[:, 1:] if name == "labels" else IGNORED
    is_scored = labels != -100
    assert (output.losses[~is_scored] == 0).all()
    assert (output.losses[is_scored] > 0).all()
    torch.testing.assert_close(output.loss, output.losses.sum() / is_scored.sum(), **EXACT)


@pytest.mark.parametrize("variant", HEADS)
def test_a_batch_without_labels_has_loss_zero_and_no_gradient(variant):
    model = small_model(**VARIANTS[variant]).train()
    loss = model(random_ids(2, 5), shift_labels=torch.full((2, 5), -100)).loss
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, model).values())


def test_a_single_token_has_nothing_to_predict():
    model = small_model()
    output = model(random_ids(2, 1), labels=random_ids(2, 1))
    assert output.loss == 0
    assert output.losses.shape == (2, 0)


@pytest.mark.parametrize("variant", ["plain", "adaptive"])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_accumulated_batches_give_the_gradient_of_one(as_tensor, variant):
    """The Trainer passes the number of predicted tokens of all micro-batches and then does not divide again."""
    model = small_model(**VARIANTS[variant]).train()
    ids = random_ids(4, 5)
    labels = ids.clone()
    labels[0, 2:] = -100
    labels[3] = -100
    count = (labels[:, 1:] != -100).sum()
    whole = gradients(model(ids, labels=labels).loss, model)
    num_items = count if as_tensor else int(count)
    parts = [
        gradients(model(ids[rows], labels=labels[rows], num_items_in_batch=num_items).loss, model)
        for rows in ([0], [1, 2], [3])
    ]
    assert_same_gradients({name: sum(part[name] for part in parts) for name in whole}, whole)


def test_accumulation_of_token_labels():
    model = small_model(TransformerXLForTokenClassification, num_labels=3).train()
    ids, labels = random_ids(4, 5), random_ids(4, 5, seed=2) % 3
    labels[1, 1:] = -100
    whole = gradients(model(ids, labels=labels).loss, model)
    count = (labels != -100).sum()
    parts = [
        gradients(model(ids[rows], labels=labels[rows], num_items_in_batch=count).loss, model)
        for rows in ([0, 1], [2, 3])
    ]
    assert_same_gradients({name: sum(part[name] for part in parts) for name in whole}, whole)


def train_segments(model, num_segments=3, mask=None, **changes):
    """Losses and gradients of segments with carried memory, dropout drawn from the same seed each time."""
    torch.manual_seed(5)
    cache, losses = model.create_cache(), []
    for step in range(num_segments):
        ids = random_ids(2, 4, seed=step)
        losses.append(model(ids, past_key_values=cache, labels=ids, attention_mask=mask, **changes).loss)
    return torch.stack(losses), gradients(sum(losses), model), cache


def enable_checkpointing(model, *arguments):
    """The method has another name before transformers 5.23."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(*arguments)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("variant", ["plain", "shared_biases", "everything"])
def test_checkpointing_changes_nothing(variant, padded, reentrant):
    """With memory, pads and dropout, whose masks the backward pass must draw again."""
    changes = VARIANTS[variant] | {"dropout": 0.3, "attention_dropout": 0.2}
    model = small_model(**changes).train()
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]]) if padded else None
    losses, wanted, cache = train_segments(model, mask=mask)
    enable_checkpointing(model, {"use_reentrant": reentrant})
    if reentrant:
        # Reentrant checkpoints do not allow torch.autograd.grad.
        torch.manual_seed(5)
        again, total = model.create_cache(), 0.0
        for step in range(3):
            ids = random_ids(2, 4, seed=step)
            total = total + model(ids, past_key_values=again, labels=ids, attention_mask=mask).loss
        total.backward()
        torch.testing.assert_close(total, losses.sum(), **EXACT)
        given = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    else:
        again_losses, given, again = train_segments(model, mask=mask)
        torch.testing.assert_close(again_losses, losses, **EXACT)
    assert_same_gradients(given, wanted)
    assert again.row_lengths.tolist() == cache.row_lengths.tolist()
    for layer, other in zip(again.layers, cache.layers, strict=True):
        torch.testing.assert_close(layer.hidden_states, other.hidden_states, **EXACT)


def test_checkpointing_recomputes():
    """The test above compares something: with checkpointing a layer's parts run twice."""
    model = small_model().train()
    calls = []
    model.model.layers[0].feed_forward.up_proj.register_forward_hook(lambda *_: calls.append(1))
    model(random_ids(1, 4), labels=random_ids(1, 4)).loss.backward()
    assert len(calls) == 1
    enable_checkpointing(model)
    model(random_ids(1, 4), labels=random_ids(1, 4)).loss.backward()
    assert len(calls) == 3


def test_same_seed_same_dropout():
    model = small_model(dropout=0.4, attention_dropout=0.3).train()
    first, second = train_segments(model), train_segments(model)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    torch.manual_seed(6)
    ids = random_ids(2, 4, seed=0)
    assert not torch.equal(model(ids, labels=ids).loss, first[0][0])


class DropoutPlaces:
    """Replaces dropout by a function that records what it is given and zeroes nothing."""

    def __init__(self, monkeypatch):
        self.shapes = []
        monkeypatch.setattr(torch.nn.functional, "dropout", self)

    def __call__(self, tensor, p=0.5, training=True, inplace=False):
        if training and p > 0:
            self.shapes.append((tuple(tensor.shape), p))
        return tensor


def test_dropout_is_where_the_paper_s_code_has_it(monkeypatch):
    """Embeddings, position table, attention output, feed-forward twice, final states; probabilities have their own."""
    model = small_model(dropout=0.25, attention_dropout=0.125, num_hidden_layers=2).train()
    model.set_attn_implementation("eager")
    places = DropoutPlaces(monkeypatch)
    model(random_ids(3, 4))
    states, inner = ((3, 4, 8), 0.25), ((3, 4, 12), 0.25)
    probabilities = ((3, 2, 4, 4), 0.125)
    tables = [shape for shape in places.shapes if len(shape[0]) == 2]
    assert len(tables) == 1
    assert tables[0][0][1] == 8
    assert tables[0][0][0] >= 4
    others = [shape for shape in places.shapes if len(shape[0]) > 2]
    assert others == [states, *[probabilities, states, inner, states] * 2, states]


def test_no_dropout_anywhere_in_evaluation(monkeypatch):
    model = small_model(dropout=0.25, attention_dropout=0.125)
    model.set_attn_implementation("eager")
    places = DropoutPlaces(monkeypatch)
    model(random_ids(3, 4), labels=random_ids(3, 4))
    assert places.shapes == []


def test_attention_dropout_alone_changes_training():
    model = small_model(attention_dropout=0.5).train()
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert not torch.equal(model(random_ids(1, 6)).logits, model(random_ids(1, 6)).logits)


def test_memory_of_training_holds_what_dropout_left():
    """As in the original: the memory is the layer's input, its dropout included, not a clean second pass."""
    model = small_model(dropout=0.5).train()
    cache = model.create_cache()
    output = model(random_ids(2, 4), past_key_values=cache, output_hidden_states=True)
    for layer, states in zip(cache.layers, output.hidden_states, strict=False):
        assert torch.equal(layer.hidden_states, states)
    assert (cache.layers[0].hidden_states == 0).any()


def test_memory_advances_with_each_micro_batch_and_steps_follow_the_naive_model():
    """Three steps of SGD with carried memory, by the model and by the naive one, stay together."""
    model = small_model(pre_norm=True, same_length=True, mem_len=3).train()
    other = copy.deepcopy(model)
    cache, rows = model.create_cache(), NaiveRows(other, 2)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    for step in range(3):
        ids = random_ids(2, 4, seed=step)
        model(ids, past_key_values=cache, labels=ids).loss.backward()
        segments = rows.feed(ids)
        losses = [-segment.log_probs[range(3), ids[row, 1:].tolist()].sum() for row, segment in enumerate(segments)]
        (sum(losses) / 6).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (name, one), other_parameter in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, other_parameter, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def test_every_parameter_gets_a_gradient():
    """For data-parallel training, with every kind of head."""
    for variant in VARIANTS:
        model = small_model(TransformerXLForCausalLM, **VARIANTS[variant]).train()
        ids = torch.arange(17).repeat(2, 1)
        model(ids, labels=ids).loss.backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert missing == [], variant
