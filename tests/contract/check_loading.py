"""Loading: Auto classes, weights on disk, pipelines, devices."""

from pathlib import Path

import torch
from accelerate import cpu_offload, disk_offload, infer_auto_device_map
from contract.inputs import generated, inputs_of, result
from contract.rows import Row
from models.model_tools import EXACT, VOCAB_SIZE, word_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedTokenizerFast, pipeline

TEXTS = ["w3 w5 w2 w7", "w9 w1 w4"]


def check_auto_classes(row: Row, folder: Path) -> None:
    """The configuration names its type, and the Auto class builds and loads the class."""
    model = row.build()
    model.save_pretrained(folder)
    assert type(AutoConfig.from_pretrained(folder)) is type(model.config)
    for found in (row.auto_class.from_pretrained(folder), row.auto_class.from_config(model.config)):
        assert isinstance(model, type(found))
    # The base class's earlier name is a class of its own, which loads as the class of today's name.
    if row.kind != "ModelWithLMHead":
        assert type(found) is row.model_class


def check_safetensors(row: Row, folder: Path) -> None:
    """Saved, loaded and saved again: the same bits in memory and on disk, the same result."""
    model = row.build()
    model.save_pretrained(folder / "first")
    loaded = row.model_class.from_pretrained(folder / "first").eval()
    loaded.save_pretrained(folder / "second")
    expected, given = model.state_dict(), loaded.state_dict()
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())
    names = sorted(path.name for path in (folder / "first").iterdir())
    assert "model.safetensors" in names
    for name in names:
        assert (folder / "first" / name).read_bytes() == (folder / "second" / name).read_bytes(), name
    torch.testing.assert_close(result(loaded, **inputs_of(row)), result(model, **inputs_of(row)), **EXACT)


# What a file holds of the first layer, in the models whose checkpoints transformers 4 has to read or has written.
EARLIER_NAMES = {
    "transformer_xl": "layers.0.dec_attn.qkv_net.weight",
    "reformer": "layers.0.attention.layer_norm.weight",
}


def check_key_names(row: Row, folder: Path) -> None:
    """Files use the names of transformers 4, where it had the architecture; the model's own names are read as well."""
    model, inputs = row.build(), inputs_of(row)
    model.save_pretrained(folder)
    on_disk = load_file(folder / "model.safetensors")
    earlier = EARLIER_NAMES.get(row.variant.architecture)
    if earlier is None:
        assert on_disk.keys() <= model.state_dict().keys()
    else:
        assert any(name.endswith(earlier) for name in on_disk)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    loaded, report = row.model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(result(loaded, **inputs), result(model, **inputs), **EXACT)


# --- pipelines --------------------------------------------------------------------------------------------


def saved(row: Row, folder: Path, **changes: object) -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    """The model and a tokenizer of its words, both also in `folder`."""
    model, tokenizer = row.build(**changes), word_tokenizer()
    if row.kind == "ForMaskedLM":
        tokenizer.mask_token = "w15"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """(1, L) ids of a text."""
    return tokenizer(text, return_tensors="pt").input_ids


def check_text_generation(row: Row, folder: Path) -> None:
    """`pipeline("text-generation")`, a batch of two texts, against `generate` for each."""
    model, tokenizer = saved(row, folder)
    pipe = pipeline("text-generation", model=str(folder), dtype=torch.float64)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    answers = pipe(TEXTS, batch_size=2, return_full_text=False, **settings)
    for text, answer in zip(TEXTS, answers, strict=True):
        ids = ids_of(tokenizer, text)
        expected = generated(model, ids, max_new_tokens=5)[0, ids.shape[1] :]
        assert answer[0]["generated_text"].split() == tokenizer.decode(expected, skip_special_tokens=True).split()


def check_text_classification(row: Row, folder: Path) -> None:
    """`pipeline("text-classification")`, a batch of two texts, against the logits of each."""
    model, tokenizer = saved(row, folder)
    answers = pipeline("text-classification", model=str(folder), dtype=torch.float64)(TEXTS, batch_size=2)
    for text, answer in zip(TEXTS, answers, strict=True):
        probabilities = result(model, input_ids=ids_of(tokenizer, text))[0].softmax(-1)
        assert answer["label"] == model.config.id2label[int(probabilities.argmax())]
        assert abs(answer["score"] - float(probabilities.max())) < 1e-5


def check_zero_shot(row: Row, folder: Path) -> None:
    """`pipeline("zero-shot-classification")`, against the logits of every pair of text and label."""
    names = {"id2label": {0: "contradiction", 1: "neutral", 2: "entailment"}}
    model, tokenizer = saved(row, folder, **names, label2id={name: key for key, name in names["id2label"].items()})
    labels = ["w4", "w6", "w8"]
    pipe = pipeline("zero-shot-classification", model=str(folder), dtype=torch.float64)
    answer = pipe(TEXTS[0], candidate_labels=labels, hypothesis_template="w2 {}")
    ids = [tokenizer(TEXTS[0], f"w2 {label}", return_tensors="pt").input_ids for label in labels]
    logits = torch.cat([result(model, input_ids=pair) for pair in ids])
    expected = dict(zip(labels, logits[:, 2].softmax(0).tolist(), strict=True))
    for label, score in zip(answer["labels"], answer["scores"], strict=True):
        assert abs(score - expected[label]) < 1e-5


def check_token_classification(row: Row, folder: Path) -> None:
    """`pipeline("token-classification")`, a batch of two texts, against the logits of each."""
    model, tokenizer = saved(row, folder)
    answers = pipeline("token-classification", model=str(folder), dtype=torch.float64)(TEXTS, batch_size=2)
    for text, answer in zip(TEXTS, answers, strict=True):
        probabilities = result(model, input_ids=ids_of(tokenizer, text))[0].softmax(-1)
        assert [entity["word"] for entity in answer] == text.split()
        scores = torch.tensor([float(entity["score"]) for entity in answer], dtype=torch.float64)
        torch.testing.assert_close(scores, probabilities.max(-1).values, rtol=1e-5, atol=1e-5)


def check_fill_mask(row: Row, folder: Path) -> None:
    """`pipeline("fill-mask")`, against the logits at the mask."""
    model, tokenizer = saved(row, folder)
    text = "w3 w15 w2 w7"
    answers = pipeline("fill-mask", model=str(folder), dtype=torch.float64)(text, top_k=VOCAB_SIZE)
    logits = result(model, input_ids=ids_of(tokenizer, text))[0, 1]
    assert [answer["token"] for answer in answers] == logits.sort(descending=True).indices.tolist()


def check_feature_extraction(row: Row, folder: Path) -> None:
    """`pipeline("feature-extraction")`, against the body's states."""
    model, tokenizer = saved(row, folder)
    features = pipeline("feature-extraction", model=str(folder), dtype=torch.float64)(TEXTS, return_tensors=True)
    body = row.auto_class.from_pretrained(folder)
    assert type(body) is type(model) or row.kind == "EncoderModel"
    for text, given in zip(TEXTS, features, strict=True):
        torch.testing.assert_close(given, result(model, input_ids=ids_of(tokenizer, text)), **EXACT)


# --- devices ----------------------------------------------------------------------------------------------


def check_device_map(row: Row, folder: Path) -> None:
    """Part of the weights on disk, no block of `_no_split_modules` cut in two: the same result."""
    model, inputs = row.build(), inputs_of(row)
    expected = result(model, **inputs)
    model.save_pretrained(folder / "model")
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    blocks = list(model._no_split_modules)
    assert blocks
    device_map = infer_auto_device_map(
        model, max_memory={"cpu": size // 2, "disk": 10 * size}, no_split_module_classes=blocks
    )
    assert "disk" in device_map.values()
    whole = [name for name, module in model.named_modules() if type(module).__name__ in blocks]
    assert not any(entry.startswith(f"{name}.") for entry in device_map for name in whole)
    mapped = row.model_class.from_pretrained(
        folder / "model", device_map=device_map, offload_folder=str(folder / "offload")
    )
    torch.testing.assert_close(result(mapped, **inputs), expected, **EXACT)


def check_offload(row: Row, folder: Path) -> None:
    """All weights on the processor or on disk until a module runs (accelerate): the same result."""
    inputs = inputs_of(row)
    expected = result(row.build(), **inputs)
    device = torch.device("cpu")
    on_processor = cpu_offload(row.build(), execution_device=device)
    assert any(parameter.is_meta for parameter in on_processor.parameters())
    torch.testing.assert_close(result(on_processor, **inputs), expected, **EXACT)
    on_disk = disk_offload(row.build(), str(folder), execution_device=device)
    torch.testing.assert_close(result(on_disk, **inputs), expected, **EXACT)


# --- embeddings -------------------------------------------------------------------------------------------


def check_resize(row: Row, folder: Path) -> None:
    """Three more words: old words score as before, new ones can be read, and it can be saved and loaded."""
    model, inputs = row.build(), inputs_of(row)
    expected = result(model, **inputs)
    model.resize_token_embeddings(VOCAB_SIZE + 3, mean_resizing=False)
    assert model.config.vocab_size == VOCAB_SIZE + 3
    given = result(model, **inputs)
    if given.shape[-1] == VOCAB_SIZE + 3:
        # An adaptive softmax gives log-probabilities, of which new words take a part in the last bin only.
        cutoffs = row.settings.get("cutoffs")
        old_words = cutoffs[-1] if cutoffs else VOCAB_SIZE
        given, expected = given[..., :old_words], expected[..., :old_words]
    torch.testing.assert_close(given, expected, **EXACT)
    with_new = inputs | {"input_ids": inputs["input_ids"].clone().fill_(VOCAB_SIZE + 2)}
    assert result(model, **with_new).isfinite().all()
    model.save_pretrained(folder)
    loaded = row.model_class.from_pretrained(folder)
    torch.testing.assert_close(result(loaded, **with_new), result(model, **with_new), **EXACT)


def check_inputs_embeds(row: Row, folder: Path) -> None:
    """Vectors instead of ids."""
    model, inputs = row.build(), inputs_of(row)
    expected = result(model, **inputs)
    embedding = model.get_input_embeddings()
    for name, place in (("input_ids", "inputs_embeds"), ("decoder_input_ids", "decoder_inputs_embeds")):
        if name in inputs:
            inputs[place] = embedding(inputs.pop(name)).detach()
    torch.testing.assert_close(result(model, **inputs), expected, **EXACT)


def check_hidden_states(row: Row, folder: Path) -> None:
    """`output_hidden_states=True`: states (B, L, D) of every layer, asked for in the call or in the configuration."""
    inputs = inputs_of(row)
    with torch.no_grad():
        asked, configured = (
            row.build()(**inputs, output_hidden_states=True),
            row.build(output_hidden_states=True)(**inputs),
        )
    fields = {name for name in asked if name.endswith("hidden_states") and isinstance(asked[name], tuple)}
    pair = {"encoder_hidden_states": "input_ids", "decoder_hidden_states": "decoder_input_ids"}
    sources = pair if row.kind == "ForConditionalGeneration" else {"hidden_states": "input_ids"}
    assert sources.keys() <= fields
    for name, source in sources.items():
        assert len(asked[name]) >= 2
        assert all(state.shape[:2] == inputs[source].shape for state in asked[name])
        for given, expected in zip(configured[name], asked[name], strict=True):
            torch.testing.assert_close(given, expected, **EXACT)
