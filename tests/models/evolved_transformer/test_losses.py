"""The losses: of whole batches, of batches that come in parts, smoothed, and of nothing."""

import pytest
import torch
from models.evolved_transformer.gradient_tools import assert_all_close, gradients
from models.evolved_transformer.small_models import EXACT, VOCAB_SIZE, pair_model, random_ids, small_model
from torch.nn import functional as F


def test_loss_of_the_causal_model():
    model, ids = small_model(), random_ids(2, 7)
    labels = ids.clone()
    labels[0, :3] = -100
    kept = labels.clone()
    output = model(ids, labels=labels)
    nats = F.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    torch.testing.assert_close(output.losses, nats, **EXACT)
    torch.testing.assert_close(output.loss, nats.sum() / (labels[:, 1:] != -100).sum(), **EXACT)
    assert torch.equal(labels, kept)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    given = model(ids, shift_labels=shifted)
    torch.testing.assert_close(given.loss, output.loss, **EXACT)
    torch.testing.assert_close(given.losses, F.pad(nats, (0, 1)), **EXACT)


def test_loss_of_the_model_with_an_encoder():
    model, source, labels = pair_model(), random_ids(2, 7), random_ids(2, 5, seed=4)
    labels[1, 3:] = -100
    output = model(source, labels=labels)
    nats = F.cross_entropy(output.logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(output.losses, nats, **EXACT)
    torch.testing.assert_close(output.loss, nats.sum() / 8, **EXACT)
    # Begun by the start token; what follows a row's last label is a pad.
    inputs = torch.tensor([[0, *labels[0, :-1]], [0, *labels[1, :2], 0, 0]])
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels)[:, :3], inputs[:, :3])
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    given = model(source, decoder_input_ids=inputs, decoder_attention_mask=mask, labels=labels)
    torch.testing.assert_close(given.loss, output.loss, **EXACT)


def test_labels_without_ids_for_the_decoder_s_inputs_are_refused():
    for name in ("pad_token_id", "decoder_start_token_id"):
        with pytest.raises(ValueError, match=f"{name}=None, but decoder inputs are made from labels"):
            pair_model(**{name: None})(random_ids(1, 3), labels=random_ids(1, 3))


@pytest.mark.parametrize("build", [small_model, pair_model])
def test_logits_are_kept_on_request(build):
    model, ids = build(), random_ids(2, 6)
    decoder = {} if build is small_model else {"decoder_input_ids": ids}
    whole = model(ids, labels=ids, **decoder)
    assert whole.logits.shape == (2, 6, VOCAB_SIZE)
    for keep, expected in ((2, whole.logits[:, -2:]), (torch.tensor([1, 3]), whole.logits[:, [1, 3]])):
        torch.testing.assert_close(model(ids, logits_to_keep=keep, **decoder).logits, expected, **EXACT)
        output = model(ids, labels=ids, logits_to_keep=keep, **decoder)
        torch.testing.assert_close(output.logits, expected, **EXACT)
        torch.testing.assert_close(output.loss, whole.loss, **EXACT)


@pytest.mark.parametrize("build", [small_model, pair_model])
def test_accumulated_calls_give_the_loss_and_gradient_of_one(build):
    model, ids = build().train(), random_ids(4, 6)
    labels = ids.clone()
    labels[0, 3:] = -100
    whole = model(ids, labels=labels)
    expected = gradients(model, whole.loss)
    num_items = ((labels if build is pair_model else labels[:, 1:]) != -100).sum()
    for count in (num_items, int(num_items)):
        total, losses = {name: torch.zeros_like(value) for name, value in expected.items()}, 0
        for rows in ([0], [1, 2, 3]):
            loss = model(ids[rows], labels=labels[rows], num_items_in_batch=count).loss
            losses = losses + loss
            total = {name: total[name] + value for name, value in gradients(model, loss).items()}
        torch.testing.assert_close(losses, whole.loss, **EXACT)
        assert_all_close(total, expected, **EXACT)


@pytest.mark.parametrize("build", [small_model, pair_model])
def test_labels_are_smoothed_in_training(build):
    ids, shift = random_ids(2, 6), int(build is small_model)
    model = build(label_smoothing=0.2).train()
    output = model(ids, labels=ids)
    logits = output.logits[:, : 6 - shift].transpose(1, 2)
    # Most of the weight on the label, the rest on all ids alike.
    nats = -logits.log_softmax(dim=1)
    expected = 0.8 * nats.gather(1, ids[:, None, shift:]).squeeze(1) + 0.2 * nats.mean(dim=1)
    torch.testing.assert_close(output.losses, expected, **EXACT)
    torch.testing.assert_close(output.loss, expected.mean(), **EXACT)
    plain = model.eval()(ids, labels=ids)
    torch.testing.assert_close(plain.loss, F.cross_entropy(logits, ids[:, shift:]), **EXACT)


@pytest.mark.parametrize("build", [small_model, pair_model])
def test_without_labels_that_count_the_loss_is_zero(build):
    ids = random_ids(2, 4)
    model = build().train()
    loss = model(ids, labels=torch.full_like(ids, -100)).loss
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients(model, loss).values())


def test_loss_is_single_precision_at_least():
    ids = random_ids(2, 6)
    output = small_model(dtype=torch.bfloat16)(ids, labels=ids)
    assert output.loss.dtype == output.losses.dtype == torch.float32
    assert small_model()(ids, labels=ids).loss.dtype == torch.float64
