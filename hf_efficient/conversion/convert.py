"""One call from a checkpoint of an earlier release to a folder that `from_pretrained` loads."""

import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..models.reformer import ReformerConfig, ReformerForCausalLM, ReformerTokenizer
from ..models.transformer_xl import (
    TransformerXLConfig,
    TransformerXLForCausalLM,
    TransformerXLForSequenceClassification,
    TransformerXLForTokenClassification,
    TransformerXLModel,
)
from ..models.transformer_xl.checkpoint_names_transformer_xl import to_model_names
from .legacy_vocabulary import find_vocabulary, load_legacy_tokenizer
from .original_transformer_xl import read_original_checkpoint
from .restricted_reader import is_state_dict, read_restricted
from .trax_reformer import find_trax_checkpoint, read_trax_reformer
from .verify import Verification, check_ties, verify_conversion

ORIGINAL_RELEASE = "the original PyTorch release"
ORIGINAL_CHECKPOINT = "model.pt"
TRAX = "trax"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")

# Classes by the names that transformers 4 wrote into config.json. Its language model is what an older file, without a
# name, holds.
LEGACY_CLASSES = {
    "TransfoXLModel": TransformerXLModel,
    "TransfoXLLMHeadModel": TransformerXLForCausalLM,
    "TransfoXLForSequenceClassification": TransformerXLForSequenceClassification,
}
CLASSES = LEGACY_CLASSES | {
    model_class.__name__: model_class
    for model_class in (*LEGACY_CLASSES.values(), TransformerXLForTokenClassification)
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of an earlier release in memory.

    Attributes:
        release: Which release wrote it.
        model_class: Class of the model it becomes.
        config: Its configuration.
        state_dict: Its weights under their names on disk.
        notes: What is worth knowing about it, a sentence each.
    """

    release: str
    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    state_dict: dict[str, Tensor]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion read, wrote and compared.

    Attributes:
        source: What was converted.
        output: Folder with the result.
        release: Which release wrote the source.
        model_class: Name of the class that was saved.
        num_parameters: Parameters of the model, shared ones counted once.
        verification: What was compared after loading the result again.
        vocab_size: Tokens of the tokenizer that was saved, None where there was no vocabulary.
        notes: What is worth knowing, a sentence each.
    """

    source: Path
    output: Path
    release: str
    model_class: str
    num_parameters: int
    verification: Verification
    vocab_size: int | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        words = "no tokenizer" if self.vocab_size is None else f"a tokenizer of {self.vocab_size:,} words"
        lines = [
            f"{self.source} ({self.release}) -> {self.output}",
            f"{self.model_class} with {self.num_parameters:,} parameters, {words}",
            f"Loaded again: {self.verification.num_tensors} tensors equal bit for bit, outputs differ by "
            f"{self.verification.max_output_difference}",
        ]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


def convert_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    vocabulary: str | os.PathLike | None = None,
    config: PreTrainedConfig | str | os.PathLike | None = None,
) -> ConversionReport:
    """Convert a checkpoint of Transformer-XL or of trax's Reformer, load the result again and compare.

    Nothing in the source's pickles is run. `output` appears only when everything agrees.

    Args:
        source: A folder of transformers 4 (`config.json`, `pytorch_model.bin` or `model.safetensors`, and perhaps a
            vocabulary); the original PyTorch release's `model.pt` or the folder of its run; a `ReformerLM` of trax,
            `model.pkl.gz` or `model.pkl`, or the folder of its run.
        output: Folder to write: config.json, model.safetensors, generation_config.json and the tokenizer's files.
            It must be empty or not exist.
        vocabulary: Vocabulary file, or folder with one, where it is not in the source folder: `vocab.pkl`,
            `vocab.bin`, `vocab.txt`, or the original release's `cache.pt`; for trax a SentencePiece model.
        config: Configuration, or a config.json, for a bare state dict of the original release. For trax, whose
            weights do not tell chunk lengths or hashes, the run's gin file (`config.gin` beside the model is found),
            a config.json that has them, or a configuration.

    Raises:
        FileNotFoundError: the source, or a file in it, is missing.
        ValueError: the output folder is not empty; a file is truncated, was changed, or is no checkpoint of these
            releases; the checkpoint cannot be represented, or contradicts itself.
    """
    source, output = Path(source), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={str(output)!r} exists and is not empty; give a new or an empty folder.")
    checkpoint = _read_checkpoint(source, config)
    model = _build_model(checkpoint, source)
    tokenizer = _read_tokenizer(source, vocabulary, checkpoint.release)
    notes = (*checkpoint.notes, *_fit_tokenizer(model, tokenizer))

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as staging:
        folder = Path(staging) / "converted"
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        verification = verify_conversion(model, checkpoint.state_dict, folder)
        if output.exists():
            output.rmdir()
        shutil.move(folder, output)
    return ConversionReport(
        source=source,
        output=output,
        release=checkpoint.release,
        model_class=type(model).__name__,
        num_parameters=model.num_parameters(),
        verification=verification,
        vocab_size=None if tokenizer is None else len(tokenizer),
        notes=notes,
    )


# --- what is read -------------------------------------------------------------------------------------------


def _read_checkpoint(source: Path, config: PreTrainedConfig | str | os.PathLike | None) -> Checkpoint:
    """Tell the releases apart and read whichever it is."""
    if not source.exists():
        raise FileNotFoundError(
            f"there is no {source}; give a checkpoint's folder or file. One on the Hub has to be downloaded first "
            "(`hf download NAME --local-dir FOLDER`)."
        )
    trax = find_trax_checkpoint(source)
    if trax is not None:
        return _read_trax(trax, config)
    if (source / "config.json").is_file():
        if config is not None:
            raise ValueError(f"{source} has a config.json of its own; leave config out.")
        return _read_legacy_folder(source)
    path = source / ORIGINAL_CHECKPOINT if source.is_dir() else source
    if not path.is_file():
        raise FileNotFoundError(
            f"{source} holds neither config.json (transformers 4) nor {ORIGINAL_CHECKPOINT} (the original release) "
            "nor model.pkl.gz (trax); give a folder with one of them."
        )
    if config is not None and not isinstance(config, TransformerXLConfig):
        config = _read_config(Path(config))
    original = read_original_checkpoint(path, config)
    return Checkpoint(
        ORIGINAL_RELEASE,
        TransformerXLForCausalLM,
        original.config,
        original.state_dict,
        original.notes,
    )


def _read_trax(path: Path, config: PreTrainedConfig | str | os.PathLike | None) -> Checkpoint:
    if isinstance(config, PreTrainedConfig):
        trax = read_trax_reformer(path, config.to_dict())
    else:
        trax = read_trax_reformer(path, None if config is None else Path(config))
    try:
        config = ReformerConfig.from_dict(trax.settings)
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"The settings of {path} do not fit: {error}") from None
    return Checkpoint(TRAX, ReformerForCausalLM, config, trax.state_dict, trax.notes)


def _read_legacy_folder(folder: Path) -> Checkpoint:
    config = _read_config(folder / "config.json")
    name = (config.architectures or ["TransfoXLLMHeadModel"])[0]
    if name not in CLASSES:
        raise ValueError(f"{folder} holds a {name!r}; only {', '.join(CLASSES)} can be converted.")
    return Checkpoint("transformers 4", CLASSES[name], config, _read_state_dict(folder))


def _read_config(path: Path) -> TransformerXLConfig:
    """A config.json of transformers 4 or of ours."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; give the path of a config.json.")
    try:
        values = json.loads(path.read_text("utf-8"))
        model_type = values["model_type"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no configuration: it is no JSON object with a model_type.") from None
    if model_type == ReformerConfig.model_type:
        raise ValueError(
            f"{path} is of a Reformer; that needs no conversion, from_pretrained loads its folder as it is."
        )
    if model_type != TransformerXLConfig.model_type:
        raise ValueError(
            f"{path} has model_type={model_type!r}; only {TransformerXLConfig.model_type!r} can be converted."
        )
    try:
        return TransformerXLConfig.from_dict(values)
    except StrictDataclassError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_state_dict(folder: Path) -> dict[str, Tensor]:
    """The weights, from safetensors where there are both."""
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no weights; it needs {' or '.join(WEIGHTS)}.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}. Fetch or save it again.") from None
    file = read_restricted(path)
    if not is_state_dict(file.root):
        raise ValueError(f"{path} is no state dict: it holds something beside tensors. Fetch or save it again.")
    return {name: file.tensor(stored) for name, stored in file.root.items()}


def _read_tokenizer(
    source: Path, vocabulary: str | os.PathLike | None, release: str
) -> PreTrainedTokenizerBase | None:
    if release == TRAX:
        return None if vocabulary is None else _read_sentencepiece(Path(vocabulary))
    if vocabulary is None and not (source.is_dir() and find_vocabulary(source)):
        return None
    return load_legacy_tokenizer(source if vocabulary is None else Path(vocabulary), release == ORIGINAL_RELEASE)


def _read_sentencepiece(path: Path) -> ReformerTokenizer:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; give the path of a SentencePiece model.")
    return ReformerTokenizer(**ReformerTokenizer.convert_to_native_format(vocab_file=str(path)))


# --- what becomes of it -------------------------------------------------------------------------------------


def _build_model(checkpoint: Checkpoint, source: Path) -> PreTrainedModel:
    """The model with all its weights from the checkpoint, and all the checkpoint's weights in the model."""
    _check_shapes(checkpoint, source)
    if isinstance(checkpoint.config, TransformerXLConfig):
        check_ties(checkpoint.config, checkpoint.state_dict)
    dtypes = {tensor.dtype for tensor in checkpoint.state_dict.values() if tensor.is_floating_point()}
    if len(dtypes) != 1:
        raise ValueError(f"{source} holds weights of {len(dtypes)} floating-point types; convert them to one.")
    model, report = checkpoint.model_class.from_pretrained(
        None,
        config=checkpoint.config,
        state_dict=checkpoint.state_dict,
        dtype=dtypes.pop(),
        output_loading_info=True,
    )
    complaints = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if complaints:
        raise ValueError(f"{source} does not fit its configuration: {complaints}. Give the files of one checkpoint.")
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def _check_shapes(checkpoint: Checkpoint, source: Path) -> None:
    """Refuse weights of other sizes than the configuration says, before memory is taken for such a model."""
    found = (re.search(r"\blayers\.(\d+)\.", name) for name in checkpoint.state_dict)
    num_layers = len({match[1] for match in found if match})
    config = checkpoint.config
    if config.num_hidden_layers != num_layers:
        raise ValueError(
            f"{source} has {num_layers} layers, and its configuration num_hidden_layers={config.num_hidden_layers}; "
            "give the files of one checkpoint."
        )
    with torch.device("meta"):
        expected = checkpoint.model_class(config).state_dict()
    is_renamed = isinstance(config, TransformerXLConfig)
    weights = to_model_names(checkpoint.state_dict) if is_renamed else checkpoint.state_dict
    for name, weight in weights.items():
        if name in expected and weight.shape != expected[name].shape:
            raise ValueError(
                f"{source}: the weight of {name} has shape {list(weight.shape)}, and its configuration asks for "
                f"{list(expected[name].shape)}; give the files of one checkpoint."
            )


def _fit_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Let the model know the end of text, where it does not; what else does not fit, as sentences."""
    if tokenizer is None:
        return ["No vocabulary was found, so no tokenizer was written; pass one with `vocabulary`."]
    size = model.config.vocab_size
    if tokenizer.vocab_size > size:
        raise ValueError(
            f"The vocabulary has {tokenizer.vocab_size} words and the model {size}; give the vocabulary that the "
            "model was trained with."
        )
    eos = tokenizer.eos_token_id
    if model.config.eos_token_id is None and eos is not None and eos < size:
        model.config.eos_token_id = eos
        if model.can_generate():
            model.generation_config.eos_token_id = eos
    notes = []
    if tokenizer.vocab_size < size:
        notes.append(f"The vocabulary has {tokenizer.vocab_size} words, fewer than the model's {size}.")
    homeless = [token for token, index in tokenizer.get_added_vocab().items() if index >= size]
    if homeless:
        notes.append(
            f"The tokens {', '.join(homeless)} have no row in the embedding, as in the source; before using them call "
            "model.resize_token_embeddings(len(tokenizer))."
        )
    return notes
