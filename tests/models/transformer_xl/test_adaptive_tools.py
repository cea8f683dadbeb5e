"""Adaptive embedding and softmax under other libraries' tools: offloading, device maps, adapters, sharding, hooks."""

import pytest
import torch
from accelerate import cpu_offload, infer_auto_device_map
from models.transformer_xl.small_models import EXACT, VARIANTS, fill, random_ids, small_config, small_model
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from hf_efficient import TransformerXLForCausalLM, TransformerXLModel
from hf_efficient.models.transformer_xl.adaptive_softmax import AdaptiveEmbedding, AdaptiveSoftmax

NAMES = ["narrow_embedding", "adaptive", "adaptive_narrow", "adaptive_shrinking", "adaptive_untied"]
IDS = random_ids(2, 7)


@pytest.fixture(params=NAMES)
def changes(request):
    return VARIANTS[request.param]


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.numel = max(self.numel, output.numel())
        return output


def assert_same(model, expected):
    """Log-probabilities beside the loss, losses without them, and what is generated."""
    with torch.no_grad():
        output, losses = model(IDS, labels=IDS), model(IDS, labels=IDS, logits_to_keep=1).losses
    torch.testing.assert_close(output.logits, expected.logits, **EXACT)
    torch.testing.assert_close(output.losses, expected.losses, **EXACT)
    torch.testing.assert_close(losses, expected.losses, **EXACT)


def test_offloaded_weights_are_there_when_they_are_read(changes):
    expected = small_model(**changes)(IDS, labels=IDS)
    model = cpu_offload(small_model(**changes), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.lm_head.parameters())
    assert_same(model, expected)


@pytest.mark.parametrize("part", [0.2, 0.7])
def test_a_device_map_leaves_embedding_and_softmax_whole(changes, part, tmp_path):
    model = small_model(**changes)
    model.save_pretrained(tmp_path / "model")
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    memory = {"cpu": int(size * part), "disk": 10 * size}
    device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=list(model._no_split_modules))
    assert set(device_map.values()) == {"cpu", "disk"} or part < 0.5
    assert not any(name.startswith(("model.embed_tokens.", "lm_head.")) for name in device_map)
    mapped = TransformerXLForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert_same(mapped, model(IDS, labels=IDS))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks by the old name
def test_adapters_of_all_linear_layers_pass_by_the_vocabulary(changes):
    """Its tables may be the embedding's too, which merged adapters would change."""
    adapted = get_peft_model(small_model(**changes), LoraConfig(target_modules="all-linear", r=2))
    names = [name for name, _ in adapted.named_modules() if name.endswith("lora_A")]
    assert names
    assert not any("lm_head" in name or "embed_tokens" in name for name in names)


def test_hooks_on_the_embedding_see_its_embeddings_alone(changes):
    """NEFTune and frozen models with checkpointing change what the embedding returns."""
    model, shapes = small_model(**changes), []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    model(IDS, labels=IDS)
    model.train()(IDS, labels=IDS)
    assert shapes == [(2, 7, 8)] * 2


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_fsdp_shards_layers_one_by_one_and_the_vocabulary_with_the_rest(one_process):
    model = small_model(**VARIANTS["adaptive_shrinking"])
    assert model._no_split_modules == {"TransformerXLLayer"}
    expected = model(IDS, labels=IDS).losses
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    # As accelerate does where the words are tied, and where they are not.
    fully_shard([model.model.embed_tokens, model.lm_head], mesh=mesh)
    sharded = fully_shard(model, mesh=mesh)
    torch.testing.assert_close(sharded(IDS, labels=IDS).losses, expected, **EXACT)
    untied = small_model(**VARIANTS["adaptive_shrinking"], tie_word_embeddings=False)
    fully_shard(untied.model.embed_tokens, mesh=mesh)
    with pytest.raises(ValueError, match="tie_word_embeddings=True.*or with tie_projs=False"):
        fully_shard(untied, mesh=mesh)(IDS, labels=IDS)


@pytest.mark.parametrize("logits_to_keep", [1, torch.tensor([], dtype=torch.int64)])
def test_losses_alone_never_build_the_full_distribution(logits_to_keep):
    config = small_config(vocab_size=1000, cutoffs=[20, 100], div_val=2)
    model, ids = fill(TransformerXLForCausalLM(config)).eval(), torch.arange(64)[None] % 20
    with torch.no_grad(), Largest() as largest:
        model(ids, shift_labels=ids, logits_to_keep=logits_to_keep)
    assert largest.numel < 16 * 1000  # not 64 * 1000; the attention's scores have 2 * 64 * 64


# --- replacing -------------------------------------------------------------------------------------------------------


def test_embedding_and_softmax_can_be_replaced_by_their_like(changes):
    model, other = small_model(**changes), small_model(**changes, seed=3)
    embedding, softmax = other.get_input_embeddings(), other.get_output_embeddings()
    assert isinstance(embedding, AdaptiveEmbedding)
    assert isinstance(softmax, AdaptiveSoftmax)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(softmax)
    assert model.get_input_embeddings() is embedding
    assert model.get_output_embeddings() is softmax
    assert model(IDS).logits.shape == (2, 7, 17)


@pytest.mark.parametrize("cls", [TransformerXLForCausalLM, TransformerXLModel])
def test_what_has_other_bins_is_refused(cls):
    model = small_model(cls, **VARIANTS["adaptive_shrinking"])
    for value in (nn.Embedding(17, 8), AdaptiveEmbedding(small_config(cutoffs=[4], div_val=2))):
        with pytest.raises(TypeError, match=r"AdaptiveEmbedding with bins ending at \[5, 11, 17\].*cutoffs"):
            model.set_input_embeddings(value)
    for value in (nn.Linear(8, 17), AdaptiveSoftmax(small_config(cutoffs=[4], div_val=2))):
        with pytest.raises(TypeError, match=r"AdaptiveSoftmax with bins ending at \[5, 11, 17\].*cutoffs"):
            model.set_output_embeddings(value)
    plain = small_model(cls)
    plain.set_input_embeddings(nn.Embedding(30, 8))
    assert plain.get_input_embeddings().num_embeddings == 30


def test_a_resized_vocabulary_can_be_offloaded_and_replaced():
    model = small_model(**VARIANTS["adaptive_shrinking"])
    model.resize_token_embeddings(23)
    model.set_output_embeddings(model.get_output_embeddings())
    expected = model(IDS, labels=IDS)
    assert expected.logits.shape[-1] == 23
    assert_same(cpu_offload(model, execution_device=torch.device("cpu")), expected)
