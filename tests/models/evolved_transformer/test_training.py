"""Training: transformers' own Trainers, accumulation, checkpointing, adapters, narrow types."""

import pytest
import torch
from datasets import Dataset
from models.evolved_transformer.small_models import EXACT, VOCAB_SIZE, random_ids, small_config, small_model
from models.evolved_transformer.whole_models import DROPOUT, STACKS
from models.universal_transformer.whole_models import enable_checkpointing
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_efficient import (
    EvolvedTransformerForCausalLM,
    EvolvedTransformerForConditionalGeneration,
    EvolvedTransformerForSequenceClassification,
)

ROWS, LENGTH = 8, 9
# Kinds of models: class and stacks.
KINDS = {
    "causal": (EvolvedTransformerForCausalLM, STACKS["decoder"]),
    "translation": (EvolvedTransformerForConditionalGeneration, STACKS["both"]),
    "sequences": (EvolvedTransformerForSequenceClassification, STACKS["encoder"]),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def training_model(kind: str = "causal", seed: int = 0, **changes) -> nn.Module:
    """A model as initialised, in training mode."""
    cls, stacks = KINDS[kind]
    torch.manual_seed(seed)
    return cls(small_config(**({"hidden_size": 16} | stacks | changes))).train()


def batch(kind: str = "causal", rows: int = ROWS, seed: int = 1) -> dict:
    """Inputs and labels of a kind of model, no pads; labels can be learned from the inputs."""
    ids = random_ids(rows, LENGTH, seed=seed)
    labels = {"causal": ids, "translation": ids.flip(1), "sequences": (ids[:, 0] > VOCAB_SIZE // 2).long()}[kind]
    return {"input_ids": ids, "labels": labels}


def dataset(kind: str) -> Dataset:
    return Dataset.from_dict({name: tensor.tolist() for name, tensor in batch(kind).items()})


def trainer_of(kind: str, model: nn.Module, output_dir, **settings) -> Trainer:
    """transformers' own, on a data set of `ROWS` rows; of translations the one that generates."""
    defaults = {
        "per_device_train_batch_size": ROWS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    is_pair = kind == "translation"
    cls, arguments = (Seq2SeqTrainer, Seq2SeqTrainingArguments) if is_pair else (Trainer, TrainingArguments)
    if is_pair:
        defaults |= {"predict_with_generate": True, "generation_max_length": LENGTH + 1}
    data = dataset(kind)
    return cls(model, arguments(str(output_dir), **(defaults | settings)), train_dataset=data, eval_dataset=data)


def predictions(trainer: Trainer, kind: str) -> torch.Tensor:
    """What the Trainer predicts; behind what was generated it puts pads."""
    predicted = torch.tensor(trainer.predict(dataset(kind)).predictions)
    if kind == "translation":
        assert not predicted[:, LENGTH + 1 :].any()
        return predicted[:, : LENGTH + 1]
    return predicted


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# --- transformers' own Trainers ------------------------------------------------------------------------------


@every_kind
def test_trains_and_evaluates(kind, tmp_path):
    """A translation's predictions are what the model generates itself."""
    trainer = trainer_of(kind, training_model(kind), tmp_path, max_steps=20, eval_strategy="steps", eval_steps=20)
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]
    model, inputs = trainer.model.eval(), batch(kind)
    with torch.no_grad():
        output = model(**inputs)
    *_, log = (entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert log["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    expected = output.logits
    if kind == "translation":
        expected = model.generate(inputs["input_ids"], max_length=LENGTH + 1, do_sample=False)
    torch.testing.assert_close(predictions(trainer, kind), expected, rtol=1e-4, atol=1e-4)


def test_learns_to_translate(tmp_path):
    """A text backwards, by heart: what `Seq2SeqTrainer` generates in the end is right."""
    trainer = trainer_of("translation", training_model("translation"), tmp_path, max_steps=50, logging_steps=50)
    trainer.train()
    predicted = predictions(trainer, "translation")[:, 1:]
    assert (predicted == batch("translation")["labels"]).float().mean() > 0.95


@every_kind
def test_resumes_exactly(kind, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}
    whole = trainer_of(kind, training_model(kind, **DROPOUT), tmp_path, **settings)
    whole.train()
    resumed = trainer_of(kind, training_model(kind, seed=1, **DROPOUT), tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    for name, value in whole.model.named_parameters():
        assert torch.equal(dict(resumed.model.named_parameters())[name], value), name


@every_kind
def test_accumulation_in_the_trainer_equals_one_batch(kind, tmp_path):
    results = []
    for rows in (8, 2):
        settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows, "max_steps": 2}
        settings |= {"train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 0.1}
        trainer = trainer_of(kind, training_model(kind), tmp_path, **settings)
        trainer.train()
        results.append((losses(trainer), dict(trainer.model.named_parameters())))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


# --- accumulation by hand ------------------------------------------------------------------------------------


def gradients_of(model: nn.Module, *calls: dict) -> tuple[float, dict[str, torch.Tensor]]:
    """The sum of the losses of these calls, and its gradients."""
    model.zero_grad()
    total = 0.0
    for inputs in calls:
        loss = model(**inputs).loss
        loss.backward()
        total += loss.item()
    return total, {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("kind", ["causal", "translation"])
def test_accumulated_batches_give_the_gradient_of_one(kind):
    """The Trainer passes the number of labels of all micro-batches and then does not divide again."""
    cls, stacks = KINDS[kind]
    model = small_model(cls, **stacks).train()
    inputs = batch(kind, rows=4)
    count = (inputs["labels"][:, 1:] if kind == "causal" else inputs["labels"]).numel()
    whole, expected = gradients_of(model, inputs)
    parts = [{name: value[rows] for name, value in inputs.items()} for rows in ([0], [1, 2], [3])]
    total, found = gradients_of(model, *(part | {"num_items_in_batch": count} for part in parts))
    assert total == pytest.approx(whole, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_label_smoothing_is_for_training():
    model, inputs = small_model(label_smoothing=0.2), batch(rows=2)
    plain = small_model()(**inputs)
    assert model(**inputs).loss == plain.loss
    log_probs = plain.logits[:, :-1].log_softmax(-1)
    target = 0.8 * nn.functional.one_hot(inputs["labels"][:, 1:], VOCAB_SIZE).double() + 0.2 / VOCAB_SIZE
    torch.testing.assert_close(model.train()(**inputs).loss, -(target * log_probs).sum(-1).mean(), **EXACT)


# --- dropout -------------------------------------------------------------------------------------------------

# By channels in units of the states' width, in the order of the sub-layers: r the residual stream's and the branches',
# f the feed-forward's, a the attention weights' rate.
ENCODER_DROPOUTS = ["r 1", "r 1", "r 4", "r 0.5", "r 0.5", "a", "r 1", "f 4", "r 1"]
DECODER_DROPOUTS = ["r 1", "a", "r 1", "r 2", "r 0.5", "r 1", "a", "r 1", "f 4", "r 1"]
CROSS_DROPOUTS = ["r 1", "a", "r 1", "a", "r 1", "r 2", "r 0.5", "r 1", "a", "r 1", "a", "r 1", "f 4", "r 1"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("causal", DECODER_DROPOUTS),
        ("sequences", [*ENCODER_DROPOUTS, "r 1"]),
        ("translation", ENCODER_DROPOUTS + CROSS_DROPOUTS),
    ],
)
def test_what_drops_out(kind, expected, monkeypatch):
    """As in tensor2tensor: what enters a stack, every sub-layer's result, and what leaves either branch."""
    names = {0.11: "r", 0.12: "a", 0.13: "f"}
    rates = dict(zip(("dropout", "attention_dropout", "activation_dropout"), names, strict=True))
    model = training_model(kind, num_encoder_layers=1, num_decoder_layers=1, attn_implementation="eager", **rates)
    found, width = [], model.config.hidden_size

    def recorded(states, p=0.5, training=True, inplace=False):
        if training and p:
            is_attention = names[p] == "a"
            channels = 1 if states.dim() == 2 else states.shape[-1] / width
            found.append("a" if is_attention else f"{names[p]} {channels:g}")
        return states

    monkeypatch.setattr(nn.functional, "dropout", recorded)
    model(**batch(kind))
    assert found == expected
    found.clear()
    model.eval()(**batch(kind))
    assert found == []


# --- activation checkpointing --------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
@every_kind
def test_checkpointing_changes_nothing(kind, use_reentrant):
    """Each block runs again in the backward pass, with its dropout; loss and gradients stay."""
    model, inputs = training_model(kind, **DROPOUT), batch(kind, rows=3)
    torch.manual_seed(1)
    loss, expected = gradients_of(model, inputs)
    calls = []
    for name, module in model.named_modules():
        if name.endswith("layers.0.feed_forward"):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    enable_checkpointing(model, use_reentrant)
    torch.manual_seed(1)
    checkpointed_loss, found = gradients_of(model, inputs)
    assert len(calls) == {"causal": 2, "translation": 4, "sequences": 2}[kind]
    assert checkpointed_loss == loss
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


# --- what is trained and what is not -------------------------------------------------------------------------


def train(model: nn.Module, kind: str = "causal", num_steps: int = 3) -> list[float]:
    torch.manual_seed(7)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    found = []
    for number in range(num_steps):
        optimizer.zero_grad()
        loss = model(**batch(kind, seed=number)).loss
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def moved_by_training(model: nn.Module, kind: str = "causal") -> set[str]:
    before = {name: value.clone() for name, value in model.named_parameters()}
    train(model, kind)
    return {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}


@every_kind
def test_everything_moves(kind):
    changes = {} if kind == "causal" else {"encoder_input_bias": True}
    model = training_model(kind, **changes, **DROPOUT)
    assert moved_by_training(model, kind) == {name for name, _ in model.named_parameters()}


@every_kind
def test_every_parameter_has_a_gradient_of_a_single_token(kind):
    """DDP waits for one of each, also where kernels see nothing but zeros around it."""
    model = training_model(kind)
    inputs = {name: value[:, :1] if value.dim() == 2 else value for name, value in batch(kind).items()}
    if kind == "causal":
        inputs = {"input_ids": inputs["input_ids"], "shift_labels": inputs["labels"], "labels": inputs["labels"]}
    model(**inputs).loss.backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_frozen_embeddings():
    model = training_model()
    model.model.embed_tokens.requires_grad_(False)
    assert moved_by_training(model) == {name for name, _ in model.named_parameters() if "embed_tokens" not in name}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks by the old name
@pytest.mark.parametrize(("kind", "task"), [("causal", "CAUSAL_LM"), ("translation", "SEQ_2_SEQ_LM")])
def test_lora_trains_and_merges(kind, task):
    """Nothing but the adapters moves; merged into the weights they compute and generate the same."""
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "pointwise", "up_proj"]
    settings = {"task_type": task, "lora_dropout": 0.1, "init_lora_weights": False}
    adapters = LoraConfig(r=2, target_modules=targets, **settings)
    plain = training_model(kind, **DROPOUT)
    num_targets = sum(name.endswith(tuple(targets)) for name, _ in plain.named_modules())
    model = get_peft_model(plain, adapters)
    names = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(names) == 2 * num_targets
    assert moved_by_training(model, kind) == names
    inputs, generation = batch(kind), {"max_new_tokens": 4, "do_sample": False}
    expected = model.eval()(**inputs)
    generated = model.generate(input_ids=inputs["input_ids"], **generation)
    merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(merged(**inputs).logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.generate(inputs["input_ids"], **generation), generated)


@every_kind
def test_same_seed_same_losses(kind):
    first, second, other = (train(training_model(kind, seed=seed, **DROPOUT), kind) for seed in (0, 0, 1))
    assert first == second != other


# --- precision -----------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(kind, dtype):
    """The loss in float32; gradients differ from float32's by what the narrow type costs."""
    model, inputs = training_model(kind), batch(kind)
    _, exact = gradients_of(model, inputs)
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        output = model(**inputs)
    if kind != "sequences":  # transformers' own loss takes the logits as they are
        assert output.loss.dtype == torch.float32
    output.loss.backward()
    found = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    wanted = torch.cat([gradient.flatten() for gradient in exact.values()])
    assert (found - wanted).norm() < 0.1 * wanted.norm()


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision(kind, dtype):
    model, inputs = training_model(kind), batch(kind)
    expected = model.eval()(**inputs)
    narrow = training_model(kind).to(dtype)
    output = narrow.eval()(**inputs)
    assert output.logits.dtype == dtype
    torch.testing.assert_close(output.loss.float(), expected.loss, rtol=0.05, atol=0.05)
    output.loss.backward()
    assert all(weight.grad.isfinite().all() for weight in narrow.parameters())


# --- rows of pads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal", "translation"])
def test_a_row_of_pads_gives_no_gradient_and_no_nan(kind):
    cls, stacks = KINDS[kind]
    model = small_model(cls, **stacks).train()
    ids, mask = random_ids(2, 5), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    labels = ids.masked_fill(mask == 0, -100)
    loss, found = gradients_of(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    alone, expected = gradients_of(model, {"input_ids": ids[:1], "labels": labels[:1]})
    assert loss == pytest.approx(alone, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **EXACT, msg=name)
