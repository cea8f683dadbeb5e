"""The model as a whole: the forms it is computed in, padding, outputs, precision, and what it must leave alone."""

import copy

import pytest
import torch
import transformers
from models.evolved_transformer.gradient_tools import assert_all_close, gradients
from models.evolved_transformer.small_models import (
    EXACT,
    SINGLE,
    STRUCTURES,
    VOCAB_SIZE,
    fill,
    pair_model,
    random_ids,
    small_config,
    small_model,
)
from models.evolved_transformer.whole_models import DROPOUT, STACKS
from torch.nn import functional as F

from hf_efficient import (
    EvolvedTransformerCache,
    EvolvedTransformerConfig,
    EvolvedTransformerEncoderModel,
    EvolvedTransformerForCausalLM,
    EvolvedTransformerForConditionalGeneration,
    EvolvedTransformerModel,
)

BUILDERS = {"decoder": small_model, "both": pair_model}
each_stacks = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
every_structure = pytest.mark.parametrize("name", STRUCTURES)


def encoder_model(**changes: object) -> torch.nn.Module:
    return small_model(EvolvedTransformerEncoderModel, **(STACKS["encoder"] | changes))


def enable_checkpointing(model: torch.nn.Module, use_reentrant: bool) -> None:
    """Under the method's name of this release of transformers, or of those before 5.23."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": use_reentrant})


# --- the forms it can be computed in ---


@each_stacks
@every_structure
def test_fused_attention_equals_eager(name, build):
    model, ids = build(**STRUCTURES[name]).train(), random_ids(2, 7)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    labels = ids.clone()
    # What comes after a pad is predicted from the pad, whose state means nothing.
    labels[1, :4] = -100
    results = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        output = model(ids, attention_mask=mask, labels=labels)
        results.append((output.loss, gradients(model, output.loss)))
    torch.testing.assert_close(results[0][0], results[1][0], **EXACT)
    assert_all_close(results[0][1], results[1][1], **EXACT)


@each_stacks
@every_structure
def test_every_parameter_learns(name, build):
    changes = STRUCTURES[name] | ({"encoder_input_bias": True} if build is pair_model else {})
    model, ids = build(**changes).train(), random_ids(2, 13)
    for parameter, gradient in gradients(model, model(ids, labels=ids).loss).items():
        assert gradient is not None, parameter
        assert (gradient != 0).any(), parameter


@each_stacks
def test_all_parameters_are_in_the_graph_of_a_single_token(build):
    """Data-parallel training with default flags wants every parameter used in every step."""
    model, ids = build().train(), random_ids(1, 2 if build is small_model else 1)
    assert all(gradient is not None for gradient in gradients(model, model(ids, labels=ids).loss).values())


@pytest.mark.parametrize("use_reentrant", [False, True])
@each_stacks
def test_checkpointing_changes_nothing_but_what_is_kept(build, use_reentrant):
    model, ids = build(**DROPOUT).train(), random_ids(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    results = []
    for is_on in (False, True):
        if is_on:
            enable_checkpointing(model, use_reentrant)
        model.zero_grad()
        torch.manual_seed(3)
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        results.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert_all_close(*results, **EXACT)


@each_stacks
def test_checkpointing_keeps_one_tensor_for_each_block(build):
    kept = []
    for is_on in (False, True):
        model, ids = build().train(), random_ids(2, 7)
        if is_on:
            enable_checkpointing(model, use_reentrant=False)
        sizes = []
        pack = lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.model(ids, **({"decoder_input_ids": ids} if build is pair_model else {}))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 10


def test_a_cache_and_checkpointing_exclude_each_other():
    model, ids = small_model().train(), random_ids(2, 5)
    enable_checkpointing(model, use_reentrant=False)
    assert model(ids, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="past_key_values was given, but gradient checkpointing.*disable"):
        model(ids, past_key_values=EvolvedTransformerCache(model.config))
    assert model.eval()(ids).past_key_values.get_seq_length() == 5


def called_dropouts(monkeypatch, model: torch.nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> list[float]:
    calls = []
    original = F.dropout
    with monkeypatch.context() as patch:
        patch.setattr(
            F, "dropout", lambda x, p=0.5, training=True, inplace=False: (calls.append(p), original(x, p, training))[1]
        )
        model(*args, **kwargs)
    return calls


@pytest.mark.parametrize("stacks", STACKS)
def test_dropout_stands_where_tensor2tensor_has_it(stacks, monkeypatch):
    """On embeddings, on every sub-layer's output and in both branches; on weights of attention; in feed-forward."""
    rates = {"dropout": 0.1, "attention_dropout": 0.2, "activation_dropout": 0.3}
    model = small_model(EvolvedTransformerModel, **(rates | STACKS[stacks])).train()
    model.set_attn_implementation("eager")
    ids = random_ids(2, 5)
    calls = called_dropouts(monkeypatch, model, ids, **({"decoder_input_ids": ids} if stacks == "both" else {}))
    # Per block: (of states, of attention weights); there are two blocks in each stack.
    per_block = {"encoder": [(6, 1)], "decoder": [(6, 2)], "both": [(6, 1), (8, 4)]}[stacks]
    assert calls.count(0.1) == sum(1 + 2 * states for states, _ in per_block)
    assert calls.count(0.2) == sum(2 * weights for _, weights in per_block)
    assert calls.count(0.3) == 2 * len(per_block)


@pytest.mark.parametrize("name", DROPOUT)
@each_stacks
def test_every_dropout_is_for_training(build, name):
    model, ids = build(**{name: 0.5}), random_ids(2, 6)
    expected = build()(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids).loss, expected, **EXACT)
    torch.manual_seed(0)
    assert (model.train()(ids, labels=ids).loss - expected).abs() > 1e-4


# --- padding, batches, causality ---


@every_structure
@torch.no_grad()
def test_rows_are_what_they_are_alone_wherever_pads_stand_around_them(name):
    ids, mask = random_ids(3, 14), torch.ones(3, 14, dtype=torch.long)
    mask[0, :3], mask[1, 9:], mask[2, :12] = 0, 0, 0
    for model in (small_model(**STRUCTURES[name]), encoder_model(**STRUCTURES[name])):
        output = model(ids, attention_mask=mask, use_cache=False)[0]
        for row, tokens in enumerate(mask.bool()):
            alone = model(ids[row : row + 1, tokens], use_cache=False)[0]
            torch.testing.assert_close(output[row, tokens], alone[0], **EXACT)


@every_structure
@torch.no_grad()
def test_both_stacks_ignore_pads(name):
    model, source, target = pair_model(**STRUCTURES[name]), random_ids(2, 12), random_ids(2, 13, seed=5)
    source_mask, target_mask = torch.ones(2, 12), torch.ones(2, 13)
    source_mask[0, :2], source_mask[1, 8:], target_mask[1, 4:], target_mask[0, :1] = 0, 0, 0, 0
    output = model(source, source_mask, decoder_input_ids=target, decoder_attention_mask=target_mask, use_cache=False)
    for row, (seen, kept) in enumerate(zip(source_mask.bool(), target_mask.bool(), strict=True)):
        alone = model(source[row : row + 1, seen], decoder_input_ids=target[row : row + 1, kept], use_cache=False)
        torch.testing.assert_close(output.logits[row, kept], alone.logits[0], **EXACT)


@torch.no_grad()
def test_pads_between_tokens_are_places():
    """The convolutions go by place, where attention and positions see tokens alone."""
    model, ids = small_model(), random_ids(1, 8)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1]])
    output = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    alone = model(ids[mask.bool()][None], use_cache=False).logits[0]
    torch.testing.assert_close(output[:2], alone[:2], **EXACT)
    assert (output[2:] - alone[2:]).abs().max() > 1e-3
    changed = ids.masked_fill(mask == 0, 5)
    torch.testing.assert_close(
        model(changed, attention_mask=mask, use_cache=False).logits[mask.bool()], output, **EXACT
    )


@every_structure
@torch.no_grad()
def test_later_tokens_change_nothing_before_them(name):
    source, target = random_ids(2, 9), random_ids(2, 15, seed=3)
    changed = target.clone()
    changed[:, 11:] = (changed[:, 11:] + 5) % VOCAB_SIZE
    causal, pair = small_model(**STRUCTURES[name]), pair_model(**STRUCTURES[name])
    for run in (causal, lambda ids, **kwargs: pair(source, decoder_input_ids=ids, **kwargs)):
        given, expected = run(changed, use_cache=False).logits, run(target, use_cache=False).logits
        torch.testing.assert_close(given[:, :11], expected[:, :11], **EXACT)
        assert (given[:, 11:] - expected[:, 11:]).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_row_of_pads_alone_is_harmless(implementation):
    ids, mask = random_ids(2, 5), torch.tensor([[1] * 5, [0] * 5])
    for model in (small_model(), encoder_model()):
        model.set_attn_implementation(implementation)
        output = model(ids, attention_mask=mask)[0]
        torch.testing.assert_close(output[:1], model(ids[:1])[0], **EXACT)
        assert output.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 6), (3, 0)], ids=["no rows", "no tokens"])
def test_nothing_at_all(shape):
    ids = random_ids(3, 6)[: shape[0], : shape[1]]
    assert small_model()(ids, use_cache=False).logits.shape == (*shape, VOCAB_SIZE)
    assert encoder_model()(ids).last_hidden_state.shape == (*shape, 8)


# --- outputs ---


@torch.no_grad()
def test_states_and_attentions_on_request():
    model, ids = small_model(), random_ids(2, 6)
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, 6, 8)] * 3
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), expected, **EXACT)
    # Two blocks, in each the wide attention and the other.
    assert [weights.shape[1] for weights in output.attentions] == [4, 2, 4, 2]
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3], dtype=torch.float64), **EXACT)
        assert (weights.triu(1) == 0).all()
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 3


@torch.no_grad()
def test_states_of_both_stacks_on_request():
    model, ids = pair_model(), random_ids(2, 6)
    model.set_attn_implementation("eager")
    output = model(ids, decoder_input_ids=ids[:, :4], output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in output.encoder_hidden_states] == [(2, 6, 8)] * 3
    assert [tuple(states.shape) for states in output.decoder_hidden_states] == [(2, 4, 8)] * 3
    assert torch.equal(output.encoder_hidden_states[-1], output.encoder_last_hidden_state)
    assert [tuple(weights.shape) for weights in output.encoder_attentions] == [(2, 2, 6, 6)] * 2
    assert [tuple(weights.shape) for weights in output.decoder_attentions] == [(2, 4, 4, 4), (2, 2, 4, 4)] * 2
    assert [tuple(weights.shape) for weights in output.cross_attentions] == [(2, 2, 4, 6)] * 4


@torch.no_grad()
def test_attention_that_makes_no_weights_gives_none():
    output = pair_model()(random_ids(1, 3), decoder_input_ids=random_ids(1, 3), output_attentions=True)
    assert output.decoder_attentions is output.encoder_attentions is output.cross_attentions is None


@torch.no_grad()
def test_every_entry_of_an_output_without_a_loss_has_one_row_per_row():
    """transformers' pipelines take outputs apart row by row."""
    ids = random_ids(3, 6)
    for model in (small_model(), encoder_model(), small_model().model):
        assert all(entry.shape[0] == 3 for entry in model(ids, use_cache=False).values())


@torch.no_grad()
def test_outputs_as_tuples():
    ids = random_ids(2, 4)
    for model in (small_model(), encoder_model(), small_model().model):
        given, expected = model(ids, return_dict=False), model(ids)
        assert isinstance(given, tuple)
        torch.testing.assert_close(given[0], expected[0], **EXACT)


def test_cache_is_returned_in_evaluation_only_unless_asked_for():
    model, ids = small_model(), random_ids(2, 4)
    assert isinstance(model(ids).past_key_values, EvolvedTransformerCache)
    assert model(ids, use_cache=False).past_key_values is None
    assert model.train()(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 4
    model.eval().config.use_cache = False
    assert model(ids).past_key_values is None


# --- numbers of other kinds ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_stacks
def test_half_precision(build, dtype):
    ids, model = random_ids(2, 12), build(dtype=torch.float32)
    expected = model(ids, labels=ids)
    with torch.autocast("cpu", dtype):
        mixed = model(ids, labels=ids)
    half = copy.deepcopy(model).to(dtype)
    output = half(ids, labels=ids)
    assert output.logits.dtype == dtype
    for given, owner in ((mixed, model), (output, half)):
        assert given.loss.dtype == torch.float32
        torch.testing.assert_close(given.loss, expected.loss, rtol=0.05, atol=0.05)
        assert all(gradient.isfinite().all() for gradient in gradients(owner, given.loss).values())


def test_layer_norm_is_exact_in_half_precision():
    """Rows of mean 300 and deviation 1: statistics in bfloat16, which has no number between 300 and 302, would be off
    by as much as there is."""
    norm = small_model(dtype=torch.float32).model.decoder.layers[0].wide_attention_norm
    rows = 300 + torch.tensor([[-1.0, 1.0] * 4]).mul(2).bfloat16().float()
    expected = norm(rows)
    given = copy.deepcopy(norm).bfloat16()(rows.bfloat16())
    torch.testing.assert_close(given.float(), expected, rtol=2e-2, atol=2e-2)


@each_stacks
def test_single_precision_is_near_double(build):
    ids = random_ids(2, 12)
    expected, given = build()(ids, labels=ids).logits, build(dtype=torch.float32)(ids, labels=ids).logits
    torch.testing.assert_close(given.double(), expected, **SINGLE)


# --- graphs ---

ONE_BLOCK = {"num_encoder_layers": 1, "num_decoder_layers": 1}


@pytest.mark.slow
@each_stacks
def test_one_graph_serves_all_lengths(build):
    model = build(dtype=torch.float32, **ONE_BLOCK).train()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9, 14):
        ids = random_ids(3, length)
        expected = gradients(model, model(ids, labels=ids).loss)
        assert_all_close(gradients(model, compiled(ids, labels=ids).loss), expected, **SINGLE)


@pytest.mark.slow
@each_stacks
def test_model_can_be_exported_for_any_shape(build):
    model = build(dtype=torch.float32, use_cache=False)
    any_size = torch.export.Dim
    batch, length, target = (
        any_size("batch", max=64),
        any_size("length", min=2, max=99),
        any_size("target", min=2, max=99),
    )

    def inputs(rows: int, num_tokens: int, num_targets: int) -> dict[str, torch.Tensor]:
        given = {"input_ids": random_ids(rows, num_tokens), "attention_mask": torch.ones(rows, num_tokens).long()}
        given["attention_mask"][0, -1] = 0
        return given | ({"decoder_input_ids": random_ids(rows, num_targets)} if build is pair_model else {})

    shapes = {"input_ids": (batch, length), "attention_mask": (batch, length)}
    if build is pair_model:
        shapes["decoder_input_ids"] = (batch, target)
    program = torch.export.export(model, (), inputs(2, 7, 5), dynamic_shapes=shapes).module()
    for sizes in ((2, 7, 5), (5, 30, 12), (3, 4, 40)):
        given = inputs(*sizes)
        torch.testing.assert_close(program(**given).logits, model(**given).logits, **SINGLE)


# --- what a call must leave alone ---


@each_stacks
def test_nothing_is_kept_on_the_model_or_written_to_the_configuration(build):
    model, ids = build(), random_ids(2, 6)
    before, attributes = model.config.to_dict(), {key: set(vars(part)) for key, part in model.named_modules()}
    first = model(ids, labels=ids).logits
    model(ids[:1, :3], labels=ids[:1, :3])
    model.train()(ids, labels=ids)
    assert torch.equal(model.eval()(ids, labels=ids).logits, first)
    assert model.config.to_dict() == before
    assert {key: set(vars(part)) for key, part in model.named_modules()} == attributes


@each_stacks
def test_random_numbers_are_drawn_only_where_asked_for(build):
    model, ids = build().train(), random_ids(2, 5)
    state = torch.get_rng_state()
    model(ids, labels=ids).loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


# --- building ---


def test_weights_begin_as_tensor2tensors():
    torch.manual_seed(0)
    config = EvolvedTransformerConfig(
        vocab_size=3000, hidden_size=64, num_attention_heads=2, encoder_input_bias=True, tie_word_embeddings=False
    )
    model = EvolvedTransformerForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "norm.weight" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "embed" in name:
            assert parameter.std().item() == pytest.approx(64**-0.5, rel=0.1), name
        else:
            taps = parameter[0, 0].numel()
            bound = (6 / (taps * sum(parameter.shape[:2]))) ** 0.5
            assert parameter.abs().max() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name


@pytest.mark.parametrize(
    ("auto", "cls"),
    [
        ("AutoModel", EvolvedTransformerModel),
        ("AutoModelForTextEncoding", EvolvedTransformerEncoderModel),
        ("AutoModelForCausalLM", EvolvedTransformerForCausalLM),
        ("AutoModelForSeq2SeqLM", EvolvedTransformerForConditionalGeneration),
        ("AutoModelForPreTraining", EvolvedTransformerForConditionalGeneration),
    ],
)
@pytest.mark.parametrize("stacks", STACKS)
def test_auto_classes_build_what_they_need_from_any_stacks(auto, cls, stacks):
    config = small_config(**STACKS[stacks])
    before = config.to_dict()
    model = getattr(transformers, auto).from_config(config)
    assert type(model) is cls
    body = getattr(model, "model", model)
    has_encoder, has_decoder = body.encoder is not None, body.decoder is not None
    expected = {
        EvolvedTransformerEncoderModel: (True, False),
        EvolvedTransformerForCausalLM: (False, True),
        EvolvedTransformerForConditionalGeneration: (True, True),
    }
    assert (has_encoder, has_decoder) == expected.get(cls, (stacks != "decoder", stacks != "encoder"))
    assert config.to_dict() == before


def test_model_can_be_copied():
    model, ids = pair_model(), random_ids(2, 4)
    twin = copy.deepcopy(model)
    fill(model, seed=5)
    torch.testing.assert_close(twin(ids, labels=ids).loss, pair_model()(ids, labels=ids).loss, **EXACT)


@pytest.mark.parametrize("is_tied", [True, False])
@each_stacks
def test_vocabulary_can_be_resized(build, is_tied):
    model, ids = build(tie_word_embeddings=is_tied), random_ids(2, 5)
    expected = model(ids, labels=ids).logits
    model.resize_token_embeddings(VOCAB_SIZE + 4, mean_resizing=False)
    given = model(ids, labels=ids).logits
    assert given.shape[-1] == model.config.vocab_size == VOCAB_SIZE + 4
    torch.testing.assert_close(given[..., :VOCAB_SIZE], expected, **EXACT)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == is_tied
    if build is pair_model:
        # The encoder looks ids up in the same table.
        new = torch.full_like(ids, VOCAB_SIZE + 1)
        before = model.get_encoder()(new).last_hidden_state
        with torch.no_grad():
            model.get_input_embeddings().weight[VOCAB_SIZE + 1] *= -1
        assert (model.get_encoder()(new).last_hidden_state - before).abs().max() > 1e-3
