"""A talk: what the model reads, what is kept, what is refused."""

import pytest
import torch
from datasets import Dataset
from transformers import set_seed

from hf_efficient import (
    UniversalTransformerConfig,
    UniversalTransformerForCausalLM,
    UniversalTransformerForConditionalGeneration,
)
from hf_efficient.data import tokenize_conversations, train_seq2seq_tokenizer
from hf_efficient.generation import Conversation, sample_and_rank

TURNS = ["Hi there.", "Hello!", "Do you like music?", "Yes, I do.", "Which?"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_seq2seq_tokenizer(Dataset.from_dict({"text": TURNS}), 270)


def make_model(tokenizer, encoder):
    set_seed(0)
    config = UniversalTransformerConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        max_steps=2,
        is_encoder_decoder=encoder,
        is_decoder=not encoder,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    kind = UniversalTransformerForConditionalGeneration if encoder else UniversalTransformerForCausalLM
    return kind(config).eval()


@pytest.fixture(scope="module", params=[True, False], ids=["seq2seq", "causal"])
def model(request, tokenizer):
    return make_model(tokenizer, request.param)


SAMPLING = {"num_samples": 3, "max_new_tokens": 6}


def test_the_model_reads_what_it_was_trained_on(model, tokenizer):
    talk = Conversation(model, tokenizer, max_turns=3)
    conversations = Dataset.from_dict({"turns": [[*TURNS, "The last."]]})
    sources = tokenize_conversations(conversations, tokenizer, max_turns=3)["input_ids"]
    assert [talk.input_ids(TURNS[:number])[0].tolist() for number in range(1, 6)] == sources[:]


def test_replies_become_turns_and_are_the_best_samples(model, tokenizer):
    talk = Conversation(model, tokenizer, **SAMPLING)
    set_seed(1)
    first, second = talk.reply(" Hi there. "), talk.reply("Which?")
    assert talk.turns == ["Hi there.", first, "Which?", second]

    set_seed(1)
    skip = 0 if model.config.is_encoder_decoder else None
    said = ["Hi there."]
    for answer in (first, second):
        input_ids = torch.tensor([[token for turn in said for token in tokenizer(turn)["input_ids"]]])
        output = sample_and_rank(model, input_ids, **SAMPLING)
        ids = output.sequences[0, input_ids.shape[1] if skip is None else skip :]
        assert answer == tokenizer.decode(ids, skip_special_tokens=True).strip()
        said += [answer, "Which?"]
    assert talk.score == output.scores.item()


def test_length_comes_from_the_tokenizer(model, tokenizer):
    length = len(tokenizer("Which?")["input_ids"])
    tokenizer.model_max_length = length + 1
    try:
        talk = Conversation(model, tokenizer)
        assert talk.input_ids(TURNS).tolist() == [tokenizer("Which?")["input_ids"]]
        with pytest.raises(ValueError, match=rf"more than max_length={length + 1}; make it shorter"):
            talk.reply("Do you like music? Which?")
        assert Conversation(model, tokenizer, max_length=1000).input_ids(TURNS).shape[1] > length + 1
    finally:
        tokenizer.model_max_length = int(1e30)


def test_reset_forgets(model, tokenizer):
    talk = Conversation(model, tokenizer, **SAMPLING)
    set_seed(1)
    first = talk.reply("Hi there.")
    talk.reset()
    assert (talk.turns, talk.score) == ([], None)
    set_seed(1)
    assert talk.reply("Hi there.") == first


def test_what_fails_leaves_the_talk_as_it_was(model, tokenizer, monkeypatch):
    talk = Conversation(model, tokenizer, **SAMPLING)
    talk.reply("Hi there.")
    before = list(talk.turns)
    with pytest.raises(ValueError, match="text is blank"):
        talk.reply("  ")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        talk.reply("Which?")
    assert talk.turns == before


def test_refused(model, tokenizer):
    with pytest.raises(ValueError, match="max_turns=0 must be at least 1"):
        Conversation(model, tokenizer, max_turns=0)
    with pytest.raises(ValueError, match="max_length=0 must be at least 1"):
        Conversation(model, tokenizer, max_length=0)
