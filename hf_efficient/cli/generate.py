"""`hf-efficient generate`: continue a prompt with a saved model, translate it, or talk."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from ..data import encode_sources
from .arguments import Command, Invocation
from .chat import chat
from .errors import CommandError
from .models import depth_settings, load_model, memory_settings, quiet


@dataclass
class GenerateOptions:
    """Flags of `hf-efficient generate`."""

    model: str | None = field(default=None, metadata={"help": "Folder of a saved model, or its name on the Hub"})
    prompt: str | None = field(
        default=None,
        metadata={"help": "The text to continue, or to translate"},
    )
    interactive: bool = field(default=False, metadata={"help": "Talk to the model: one line, one answer"})
    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "How many tokens to write at most; 200, but 64 in a talk, and as trained for a translation"},
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Below 1 plays safe, above 1 takes risks; 0.8, but 0.88 in a talk"}
    )
    top_k: int | None = field(
        default=None, metadata={"help": "Choose among the k likeliest tokens only; 0, the default, for all"}
    )
    top_p: float | None = field(
        default=None,
        metadata={"help": "Choose among the likeliest tokens that together have this share; 0.95, but 1 in a talk"},
    )
    greedy: bool = field(
        default=False,
        metadata={"help": "Always take the likeliest token, no chance involved; so a translation is made"},
    )
    num_beams: int = field(
        default=1,
        metadata={"help": "Translations to follow at once, of which the likeliest is given"},
    )
    num_samples: int = field(
        default=20, metadata={"help": "In a talk, answers to draw for each line; the likeliest per token is given"}
    )
    max_turns: int = field(default=7, metadata={"help": "Turns of a talk that the model sees"})
    num_texts: int = field(default=1, metadata={"help": "How many texts to write"})
    seed: int = field(default=0, metadata={"help": "The same seed gives the same text"})
    mem_len: int | None = field(default=None, metadata={"help": "Memory length, if not that of training"})
    num_steps: int | None = field(
        default=None, metadata={"help": "Steps of a model that repeats its layers, if not those of training"}
    )
    exit_threshold: float | None = field(
        default=None,
        metadata={"help": "Summed halting probability at which a token takes no further step, if not as trained"},
    )
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; the accelerator if there is one"})

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_texts", "num_beams", "num_samples", "max_turns"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CommandError(f"--{name} {value} must be at least 1.")
        if self.temperature is not None and self.temperature <= 0:
            raise CommandError(
                f"--temperature {self.temperature} must be positive; for no chance at all use --greedy."
            )
        if self.top_k is not None and self.top_k < 0:
            raise CommandError(f"--top_k {self.top_k} must not be negative; 0 turns it off.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise CommandError(f"--top_p {self.top_p} must be above 0 and at most 1; 1 turns it off.")

    def sampling(self) -> dict[str, float]:
        """How to draw tokens, as far as it was given."""
        given = {name: getattr(self, name) for name in SAMPLING}
        return {name: value for name, value in given.items() if value is not None}


# How texts are continued where nothing else is given.
SAMPLING = {"temperature": 0.8, "top_k": 0, "top_p": 0.95}
MAX_NEW_TOKENS = 200


def run(invocation: Invocation) -> None:
    """Print the continuation as it is written, the prompt first; of a model with encoder and decoder, the answer."""
    (options,) = invocation.options
    if options.model is None:
        raise CommandError(f"no model given; write `{COMMAND.usage}`.")
    if not options.prompt and not options.interactive:
        raise CommandError("--prompt is empty; give the text to continue, in quotes.")
    check_talk(options, invocation.given)
    model, tokenizer = load_model(options.model, options.device)
    depth = depth_settings(model, num_steps=options.num_steps, exit_threshold=options.exit_threshold)
    with memory_settings(model.config, mem_len=options.mem_len):
        if options.interactive:
            chat(model, tokenizer, options, depth)
            return
        if model.config.is_encoder_decoder:
            check_answer(options)
        for number in range(options.num_texts):
            if options.num_texts > 1:
                print(f"--- {number + 1} ---")
            if model.config.is_encoder_decoder:
                print(write_answer(model, tokenizer, options, options.seed + number, depth))
            else:
                write_text(model, tokenizer, options, options.seed + number, depth)


def check_talk(options: GenerateOptions, given: dict[str, Any]) -> None:
    """Raises CommandError for flags of a talk where there is none."""
    for name in ("num_samples", "max_turns"):
        if name in given and not options.interactive:
            raise CommandError(f"--{name} {given[name]} is for a talk; add --interactive, or leave it out.")
    if options.interactive and options.num_beams > 1:
        raise CommandError(f"--num_beams {options.num_beams} is not for --interactive, which draws; leave it out.")


def check_answer(options: GenerateOptions) -> None:
    """Raises CommandError for flags that contradict each other where a prompt is answered."""
    sampling = options.sampling()
    if options.greedy and sampling:
        name, value = next(iter(sampling.items()))
        raise CommandError(f"--{name} {value} and --greedy contradict each other; leave one out.")
    if options.num_texts > 1 and not sampling:
        raise CommandError(f"--num_texts {options.num_texts} would all be the likeliest answer; add --temperature 1.")


def write_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: GenerateOptions,
    seed: int,
    depth: dict[str, Any],
) -> None:
    """Print the prompt and its continuation, each word as soon as it is complete."""
    if options.num_beams > 1:
        raise CommandError(
            f"--num_beams {options.num_beams} is for models with encoder and decoder, not for a "
            f"{model.config.model_type} model that continues texts; leave it out."
        )
    inputs = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    check_prompt(options, inputs["input_ids"])
    set_seed(seed)
    model.generate(
        **inputs,
        max_new_tokens=options.max_new_tokens or MAX_NEW_TOKENS,
        do_sample=not options.greedy,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **({} if options.greedy else SAMPLING | options.sampling()),
        **depth,
    )


def write_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: GenerateOptions,
    seed: int,
    depth: dict[str, Any],
) -> str:
    """What a model with encoder and decoder makes of the prompt: the likeliest answer, unless flags say to draw."""
    assert options.prompt is not None  # a required flag
    input_ids = torch.tensor(encode_sources([options.prompt], tokenizer), device=model.device)
    check_prompt(options, input_ids[:, :-1])
    sampling = options.sampling()
    settings = {"do_sample": bool(sampling), "num_beams": options.num_beams, **sampling, **depth}
    if options.max_new_tokens is not None:
        settings["max_new_tokens"] = options.max_new_tokens
    set_seed(seed)
    with quiet():  # of the saved longest length beside --max_new_tokens
        (answer,) = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **settings)
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


def check_prompt(options: GenerateOptions, input_ids: Tensor) -> None:
    """Raises CommandError if the prompt has no token."""
    if input_ids.shape[1] == 0:
        raise CommandError(f"--prompt '{options.prompt}' has no token in this model's vocabulary; write another.")


COMMAND = Command(
    name="generate",
    description=(
        "Continue a prompt with a saved model; a memory carries what was written before. A model that was trained to "
        "translate translates the prompt instead, and with --interactive any model talks."
    ),
    usage="hf-efficient generate MODEL PROMPT [--flag value ...]",
    examples="""\
  hf-efficient generate runs/demo "The import statement"
  hf-efficient generate runs/demo "The import statement" --temperature 0.6 --max_new_tokens 400
  hf-efficient generate runs/demo "A class" --greedy
  hf-efficient generate runs/universal "A class" --num_steps 4
  hf-efficient generate runs/en-de "A dog runs." --num_beams 4
  hf-efficient generate runs/talk --interactive""",
    options=(GenerateOptions,),
    positionals=("model", "prompt"),
    run=run,
)
