"""A training on pairs small enough for a test, in this process or, run as a script, in several.

    torchrun --nproc_per_node 2 small_pairs.py RESULTS --settings '{"max_steps": 4}'

Each process writes what it measured to RESULTS/rank_<r>.json, the first one the weights to weights.safetensors.
"""

import argparse
import gc
import json
import os
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_efficient import (
    EvolvedTransformerConfig,
    EvolvedTransformerForConditionalGeneration,
    ReformerConfig,
    ReformerForConditionalGeneration,
    UniversalTransformerConfig,
    UniversalTransformerForConditionalGeneration,
)
from hf_efficient.data import PairCollator, tokenize_pairs, train_seq2seq_tokenizer
from hf_efficient.training import BleuMetric, PairTrainer, PairTrainingArguments

WORDS = {"the": "der", "dog": "hund", "cat": "kater", "runs": "läuft", "sleeps": "schläft", "fast": "schnell"}
# An odd number, so that two processes fill their last batch up.
NUM_PAIRS = 23
SIZES = {"vocab_size": 280, "hidden_size": 16, "num_attention_heads": 2, "is_encoder_decoder": True}
IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}


def small_pairs() -> Dataset:
    """Sentences of one to eight words, and their translations word for word."""
    generator = torch.Generator().manual_seed(0)
    words = list(WORDS)
    sources = []
    for _ in range(NUM_PAIRS):
        length = int(torch.randint(1, 9, (), generator=generator))
        sources.append([words[i] for i in torch.randint(len(words), (length,), generator=generator).tolist()])
    targets = [" ".join(WORDS[word] for word in source) for source in sources]
    return Dataset.from_dict({"source": [" ".join(source) for source in sources], "target": targets})


def evolved_transformer(**settings) -> EvolvedTransformerForConditionalGeneration:
    """One block on each side."""
    sizes = {"num_encoder_layers": 1, "num_decoder_layers": 1, "dropout": 0.0, "attention_dropout": 0.0}
    sizes |= {"activation_dropout": 0.0}
    torch.manual_seed(0)
    return EvolvedTransformerForConditionalGeneration(EvolvedTransformerConfig(**SIZES | IDS | sizes | settings))


def universal_transformer(**settings) -> UniversalTransformerForConditionalGeneration:
    """Two steps, of which tokens take as many as they like, at no cost: that would be a mean over each process."""
    sizes = {
        "ponder_cost": 0.0,
        "intermediate_size": 32,
        "max_steps": 2,
        "halting": "act",
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
    }
    torch.manual_seed(0)
    return UniversalTransformerForConditionalGeneration(UniversalTransformerConfig(**SIZES | IDS | sizes | settings))


def reformer(**settings) -> ReformerForConditionalGeneration:
    """A local layer and a hashed one on each side."""
    sizes = {"attn_layers": ["local", "windowed_lsh"], "feed_forward_size": 32, "num_buckets": 2, "hash_seed": 0}
    sizes |= {"axial_pos_shape": [8, 8], "max_position_embeddings": 64, "axial_pos_embds_dim": [8, 8]}
    sizes |= dict.fromkeys(("hidden_dropout_prob", "lsh_attention_probs_dropout_prob"), 0.0)
    sizes |= {"local_attention_probs_dropout_prob": 0.0}
    sizes |= {"attention_head_size": 8, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8}
    torch.manual_seed(0)
    return ReformerForConditionalGeneration(ReformerConfig(**SIZES | IDS | sizes | settings))


MODELS = {
    "evolved_transformer": evolved_transformer,
    "universal_transformer": universal_transformer,
    "reformer": reformer,
}


def prepare() -> tuple[PreTrainedTokenizerBase, Dataset]:
    """The tokenizer and the tokens of the small pairs."""
    pairs = small_pairs()
    tokenizer = train_seq2seq_tokenizer(pairs, SIZES["vocab_size"])
    return tokenizer, tokenize_pairs(pairs, tokenizer)


def pair_trainer(folder, model: PreTrainedModel, tokens: Dataset | None = None, **settings) -> PairTrainer:
    """A trainer on the small pairs, which it is also measured on; batches of 4 over all processes."""
    tokenizer, prepared = prepare()
    tokens = prepared if tokens is None else tokens
    rows = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    arguments = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no"}
    arguments |= {"per_device_train_batch_size": rows, "per_device_eval_batch_size": rows, "disable_tqdm": True}
    return PairTrainer(
        model,
        PairTrainingArguments(str(folder), use_cpu=True, **arguments | settings),
        train_dataset=tokens,
        eval_dataset=tokens,
        processing_class=tokenizer,
        compute_metrics=BleuMetric(tokenizer) if settings.get("predict_with_generate") else None,
    )


def exact_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Dataset) -> float:
    """Mean loss over all target tokens, each pair read alone."""
    nats, count = 0.0, 0
    model.eval()
    for row in tokens:
        batch = PairCollator(tokenizer)([row])
        with torch.no_grad():
            logits = model(**batch).logits.double().log_softmax(-1)
        nats -= logits.gather(-1, batch["labels"][..., None]).sum().item()
        count += len(row["labels"])
    return nats / count


def losses(trainer: PairTrainer) -> dict[int, float]:
    """Training loss of each logged step."""
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("--model", default="evolved_transformer", choices=MODELS)
    parser.add_argument("--settings", type=json.loads, default={}, help="training arguments as JSON")
    options = parser.parse_args()
    trainer = pair_trainer(options.results / "run", MODELS[options.model](), **options.settings)
    figures = trainer.train().metrics
    report = {"losses": losses(trainer), "train_tokens": figures["train_tokens"], "evaluation": trainer.evaluate()}
    (options.results / f"rank_{trainer.args.process_index}.json").write_text(json.dumps(report))
    if trainer.is_world_process_zero():
        weights = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        save_file(weights, options.results / "weights.safetensors")
    trainer.end()
    gc.collect()


if __name__ == "__main__":
    main()
