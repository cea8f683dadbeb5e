"""Fine-tunes a causal language model on a text file with library calls alone, as transformers' run_clm.py does.

Nothing in it knows the model: configuration, tokenizer and model come from the Auto classes, the data from
`datasets`, blocks of `block_size` tokens from the same function as there, the rest from `Trainer`.
"""

import math
from dataclasses import dataclass, field
from itertools import chain

from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
)


@dataclass
class ScriptArguments:
    """What the Trainer's own arguments do not say."""

    model_name_or_path: str = field(metadata={"help": "Folder or repository of the model."})
    train_file: str = field(metadata={"help": "Text to train on."})
    validation_file: str = field(metadata={"help": "Text to evaluate on."})
    block_size: int = field(default=128, metadata={"help": "Tokens of an example."})


def main() -> dict[str, float]:
    """Train, save and evaluate; the evaluation's metrics."""
    script, training = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    raw = load_dataset("text", data_files={"train": script.train_file, "validation": script.validation_file})
    config = AutoConfig.from_pretrained(script.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(script.model_name_or_path, config=config)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))

    def group_texts(batch: dict[str, list]) -> dict[str, list]:
        joined = {name: list(chain(*batch[name])) for name in batch}
        total = len(joined["input_ids"]) // script.block_size * script.block_size
        blocks = {
            name: [tokens[start : start + script.block_size] for start in range(0, total, script.block_size)]
            for name, tokens in joined.items()
        }
        return blocks | {"labels": blocks["input_ids"].copy()}

    tokenized = raw.map(lambda batch: tokenizer(batch["text"]), batched=True, remove_columns=["text"])
    blocks = tokenized.map(group_texts, batched=True)
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        preprocess_logits_for_metrics=lambda logits, labels: (
            logits[0] if isinstance(logits, tuple) else logits
        ).argmax(-1),
        compute_metrics=lambda predictions: {
            "accuracy": float((predictions.predictions[:, :-1] == predictions.label_ids[:, 1:]).mean())
        },
    )
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate()
    return metrics | {"perplexity": math.exp(metrics["eval_loss"])}


if __name__ == "__main__":
    main()
