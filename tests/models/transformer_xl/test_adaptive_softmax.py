"""Adaptive embedding and softmax against the loop over tokens: forward, losses in token order, every gradient."""

import pytest
import torch
from models.transformer_xl.small_models import EXACT, VOCAB_SIZE, fill, small_config, small_model
from torch.utils._python_dispatch import TorchDispatchMode

from hf_efficient.models.transformer_xl.adaptive_softmax import AdaptiveEmbedding, AdaptiveSoftmax
from hf_efficient.models.transformer_xl.adaptive_softmax_reference import (
    adaptive_embedding_reference,
    adaptive_log_probs_reference,
    adaptive_losses_reference,
)

# cutoffs, div_val, embedding_size, tie_projs, tie_word_embeddings; hidden_size is 8, so that 8 means no projection.
CASES = {
    "projected_only": ([], 1, 4, None, True),
    "projected_tied": ([], 1, 4, [True], True),
    "one_bin_div_2": ([], 2, 8, [True], False),
    "one_cutoff": ([6], 1, 8, None, True),
    "three_cutoffs": ([4, 5, 13], 1, 8, None, False),
    "one_table_projected": ([4, 11], 1, 6, [False, True, True], True),
    "one_table_own_projections": ([4, 11], 1, 12, [False, False, False], True),
    "div_2": ([4, 11], 2, 8, None, True),
    "div_2_all_tied": ([4, 11], 2, 12, [True, True, True], True),
    "div_2_nothing_tied": ([1, 16], 2, 8, [False, False, False], False),
    "div_2_mixed": ([4, 5, 13], 2, 10, [True, False, True, False], False),
    "div_4": ([4, 11], 4, 16, [False, True, False], True),
}
# Every first and last id of a bin of any case, in an order that is not ascending, and some twice.
BORDER_IDS = [16, 0, 4, 3, 5, 13, 12, 1, 15, 6, 10, 11, 5, 0]


def score(softmax, embedding, hidden_states, labels=None):
    """Log-probabilities, or with labels losses, as the model asks for them."""
    return softmax(hidden_states, embedding.project_back(hidden_states, softmax.shared_bins), labels)


class Pair:
    """The two optimised modules of a case, tied as the model ties them, and their weights for the reference."""

    def __init__(self, case):
        cutoffs, div_val, embedding_size, tie_projs, is_tied = case
        self.config = small_config(
            cutoffs=cutoffs,
            div_val=div_val,
            embedding_size=embedding_size,
            tie_projs=tie_projs,
            tie_word_embeddings=is_tied,
        )
        self.embedding, self.softmax = AdaptiveEmbedding(self.config).double(), AdaptiveSoftmax(self.config).double()
        fill(self.embedding, seed=1)
        fill(self.softmax, seed=2)
        if is_tied:
            self.softmax.weight = self.embedding.weight
            for name, tail in self.softmax.tails.items():
                tail.weight = self.embedding.tails[name].weight
        ends = [0, *cutoffs, VOCAB_SIZE]
        self.ranges = list(zip(ends, ends[1:], strict=False))
        self.bins = range(len(self.ranges))

    def score(self, hidden_states, labels=None):
        """See `score`."""
        return score(self.softmax, self.embedding, hidden_states, labels)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Every parameter once."""
        both = torch.nn.ModuleDict({"embedding": self.embedding, "softmax": self.softmax})
        return dict(both.named_parameters())

    def split(self, module, attribute):
        """Weight or bias of every bin."""
        if self.config.div_val == 1:
            return [getattr(module, attribute)[low:high] for low, high in self.ranges]
        return [getattr(module, attribute)] + [getattr(module.tails[str(i)], attribute) for i in self.bins[1:]]

    def embedding_arguments(self):
        """What the reference of the embedding is given."""
        keys = ["0" if self.config.div_val == 1 else str(i) for i in self.bins]
        projections = dict(self.embedding.projections.named_parameters())
        return {
            "tables": self.split(self.embedding, "weight"),
            "projections": [projections.get(key) for key in keys],
            "cutoffs": self.config.cutoffs,
        }

    def softmax_arguments(self):
        """What the reference of the softmax is given."""
        shared = self.embedding_arguments()["projections"]
        own = dict(self.softmax.projections.named_parameters())
        return {
            "weights": self.split(self.softmax, "weight"),
            "biases": self.split(self.softmax, "bias"),
            "projections": [shared[i] if self.config.tie_projs[i] else own.get(str(i)) for i in self.bins],
            "cluster_weight": getattr(self.softmax, "cluster_weight", None),
            "cluster_bias": getattr(self.softmax, "cluster_bias", None),
        }


@pytest.fixture(params=CASES.values(), ids=CASES)
def pair(request):
    return Pair(request.param)


def assert_same_gradients(given, wanted, tensors):
    """Both scalars have the same gradient with respect to every tensor."""
    given = torch.autograd.grad(given, list(tensors.values()), materialize_grads=True)
    wanted = torch.autograd.grad(wanted, list(tensors.values()), materialize_grads=True)
    for name, one, other in zip(tensors, given, wanted, strict=True):
        torch.testing.assert_close(one, other, **EXACT, msg=lambda text, name=name: f"gradient of {name}: {text}")


def test_embedding_equals_reference_with_every_gradient(pair):
    ids = torch.tensor(BORDER_IDS)
    expected = torch.stack([adaptive_embedding_reference(i, **pair.embedding_arguments()) for i in BORDER_IDS])
    embeddings = pair.embedding(ids)
    torch.testing.assert_close(embeddings, expected, **EXACT)
    torch.testing.assert_close(pair.embedding(ids.view(2, 7)), expected.view(2, 7, -1), **EXACT)
    upstream = torch.randn_like(expected)
    assert_same_gradients((embeddings * upstream).sum(), (expected * upstream).sum(), pair.parameters())


def test_log_probs_equal_reference_with_every_gradient(pair):
    hidden_states = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    arguments = pair.softmax_arguments()
    expected = torch.stack([torch.stack(adaptive_log_probs_reference(h, **arguments)) for h in hidden_states])
    log_probs = pair.score(hidden_states)
    assert log_probs.shape == (3, VOCAB_SIZE)
    torch.testing.assert_close(log_probs, expected, **EXACT)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3, dtype=torch.float64), **EXACT)
    batched = pair.score(hidden_states.view(1, 3, 8))
    torch.testing.assert_close(batched[0], expected, **EXACT)
    upstream = torch.randn_like(expected)
    tensors = pair.parameters() | {"hidden_states": hidden_states}
    assert_same_gradients((log_probs * upstream).sum(), (expected * upstream).sum(), tensors)


def test_losses_equal_reference_in_token_order_with_every_gradient(pair):
    labels = [-100, *BORDER_IDS, -100]
    hidden_states = torch.randn(len(labels), 8, dtype=torch.float64, requires_grad=True)
    expected = adaptive_losses_reference(hidden_states, labels, **pair.softmax_arguments())
    losses = pair.score(hidden_states, torch.tensor(labels))
    torch.testing.assert_close(losses, expected, **EXACT)
    assert losses[0] == losses[-1] == 0
    full = -pair.score(hidden_states)[range(1, 15), BORDER_IDS]
    torch.testing.assert_close(losses[1:-1], full, **EXACT)
    upstream = torch.randn_like(expected)
    tensors = pair.parameters() | {"hidden_states": hidden_states}
    assert_same_gradients((losses * upstream).sum(), (expected * upstream).sum(), tensors)


@pytest.mark.parametrize("labels", [[-100] * 3, [0, 1, -100], [16, 16, 16]])
def test_bins_without_labels_get_a_zero_gradient(labels):
    """Zero and not None: data-parallel training waits for every parameter's gradient."""
    pair = Pair(CASES["div_2_nothing_tied"])
    hidden_states = torch.randn(3, 8, dtype=torch.float64)
    losses = pair.score(hidden_states, torch.tensor(labels))
    losses.sum().backward()
    for name, parameter in pair.softmax.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    if labels == [-100] * 3:
        assert losses.tolist() == [0, 0, 0]
        assert all((parameter.grad == 0).all() for parameter in pair.softmax.parameters())


def test_cluster_columns_are_in_the_order_of_the_tails():
    """As transformers 4 and the TensorFlow release have them; the original PyTorch release reverses them."""
    pair = Pair(CASES["three_cutoffs"])
    hidden_state = torch.randn(1, 8, dtype=torch.float64)
    before = pair.score(hidden_state)[0].exp()
    with torch.no_grad():
        pair.softmax.cluster_bias[0] += 1
    after = pair.score(hidden_state)[0].exp()
    assert (after[4:5] > before[4:5]).all()
    assert (after[:4] < before[:4]).all()
    assert (after[5:] < before[5:]).all()


def test_losses_never_build_the_full_distribution():
    config = small_config(vocab_size=1000, cutoffs=[20, 100], div_val=2)
    embedding, softmax = fill(AdaptiveEmbedding(config)), fill(AdaptiveSoftmax(config))
    labels = torch.randint(0, 20, (64,))
    labels[::16] = 700  # 4 of 64 in the large tail

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor):
                self.numel = max(self.numel, output.numel())
            return output

    with Largest() as largest:
        score(softmax, embedding, torch.randn(64, 8), labels)
    assert largest.numel <= 900 * 4  # the tail's words for its own labels, not 64 * 1000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_probabilities_sum_to_one_in_low_precision(dtype):
    pair = Pair(CASES["div_2"])
    hidden_states = (torch.randn(4, 8) * 3).to(dtype)
    log_probs = score(pair.softmax.to(dtype), pair.embedding.to(dtype), hidden_states)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["plain", "projected", "one_table", "bins"])
@pytest.mark.parametrize(("label", "shown"), [(-1, "-1"), (VOCAB_SIZE, "17"), (-101, "-101"), (10**6, "1000000")])
def test_label_outside_the_vocabulary_is_refused(variant, label, shown):
    changes = {
        "plain": {},
        "projected": {"embedding_size": 4},
        "one_table": {"cutoffs": [5, 11]},
        "bins": {"cutoffs": [5, 11], "div_val": 2},
    }[variant]
    model = small_model(**changes)
    ids = torch.tensor([[1, 2, 3]])
    for name in ("labels", "shift_labels"):
        labels = torch.tensor([[1, 2, label]])
        with pytest.raises(ValueError, match=rf"labels.*{shown}.*vocab_size=17"):
            model(ids, **{name: labels})


@pytest.mark.parametrize("variant", ["plain", "bins"])
@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_id_outside_the_vocabulary_is_refused(variant, token):
    model = small_model(**({"cutoffs": [5, 11], "div_val": 2} if variant == "bins" else {}))
    with pytest.raises(ValueError, match=rf"input_ids.*{token}.*vocab_size=17.*0 to 16"):
        model(torch.tensor([[1, token, 2]]))


@pytest.mark.parametrize("is_tied", [True, False])
def test_words_are_tied_on_request(is_tied):
    model = small_model(cutoffs=[5, 11], div_val=2, tie_word_embeddings=is_tied)
    pairs = [(model.lm_head.weight, model.model.embed_tokens.weight)]
    for name in "12":
        pairs.append((model.lm_head.tails[name].weight, model.model.embed_tokens.tails[name].weight))
    assert all((one is other) == is_tied for one, other in pairs)


def test_projections_are_tied_bin_by_bin():
    model = small_model(cutoffs=[5, 11], div_val=2, tie_projs=[False, True, False])
    assert sorted(dict(model.lm_head.projections.named_parameters())) == ["0", "2"]
    hidden_states = torch.randn(2, 8, dtype=torch.float64)
    for index, (low, high) in enumerate([(0, 5), (5, 11), (11, 17)]):
        before = score(model.lm_head, model.model.embed_tokens, hidden_states)
        with torch.no_grad():
            model.model.embed_tokens.projections.get_parameter(str(index)).add_(0.5)
        after = score(model.lm_head, model.model.embed_tokens, hidden_states)
        changed = (before != after).any(0)
        expected = torch.zeros(17, dtype=torch.bool)
        expected[low:high] = index == 1
        assert torch.equal(changed, expected), index


RESIZES = {
    "plain": {},
    "plain_untied": {"tie_word_embeddings": False},
    "projected": {"embedding_size": 4},
    "one_table": {"cutoffs": [5, 11]},
    "one_table_projected": {"cutoffs": [5, 11], "embedding_size": 6, "tie_projs": [True, False, True]},
    "bins": {"cutoffs": [5, 11], "div_val": 2},
    "bins_untied": {"cutoffs": [5, 11], "div_val": 2, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("mean_resizing", [True, False])
@pytest.mark.parametrize("new_size", [14, 17, 23])
@pytest.mark.parametrize("changes", RESIZES.values(), ids=RESIZES)
def test_resized_vocabulary_keeps_the_words_it_has(changes, new_size, mean_resizing, tmp_path):
    model = small_model(**changes)
    ids = torch.tensor([[1, 13, 6, 2]])
    with torch.no_grad():
        before_embeddings, before = model.get_input_embeddings()(ids), model(ids).logits
        model.resize_token_embeddings(new_size, mean_resizing=mean_resizing)
        after_embeddings, after = model.get_input_embeddings()(ids), model(ids).logits
    assert model.config.vocab_size == new_size
    torch.testing.assert_close(after_embeddings, before_embeddings, **EXACT)
    assert after.shape[-1] == new_size
    assert after.isfinite().all()
    kept = min(17, new_size)
    # Log-probabilities of the last bin's words all move by what the words that came or went take from the bin.
    same = max(changes["cutoffs"]) if "cutoffs" in changes else 0 if model.config.is_adaptive else kept
    torch.testing.assert_close(after[..., :same], before[..., :same], **EXACT)
    moved = (after[..., :kept] - before[..., :kept])[..., same:]
    torch.testing.assert_close(moved, moved[..., :1].expand_as(moved), **EXACT)
    if changes.get("tie_word_embeddings", True):
        assert model.lm_head.weight is model.model.embed_tokens.weight
    loss = model(ids, labels=torch.tensor([[1, new_size - 1, 6, new_size - 1]])).loss
    loss.backward()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="input_ids"):
        model(torch.tensor([[new_size]]))


@pytest.mark.parametrize("changes", [RESIZES["one_table"], RESIZES["bins"]], ids=["one_table", "bins"])
@pytest.mark.parametrize("new_size", [11, 4, 0])
def test_resizing_away_the_last_bin_is_refused(changes, new_size):
    model = small_model(**changes)
    with pytest.raises(ValueError, match=rf"new_num_tokens={new_size}.*last vocabulary bin.*11.*larger"):
        model.resize_token_embeddings(new_size)
    assert model(torch.tensor([[16]])).logits.shape[-1] == 17


def test_resizing_a_projected_vocabulary_to_nothing_is_refused():
    with pytest.raises(ValueError, match="new_num_tokens=0"):
        small_model(embedding_size=4).resize_token_embeddings(0)


@pytest.mark.parametrize("changes", [RESIZES["plain"], RESIZES["bins"]], ids=["plain", "bins"])
def test_resizing_can_pad_to_a_multiple_and_leaves_the_global_defaults(changes):
    model = small_model(**changes)
    model.resize_token_embeddings(18, pad_to_multiple_of=8)
    assert model.config.vocab_size == 24
    assert model(torch.tensor([[23]])).logits.shape[-1] == 24
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert all(parameter.requires_grad for parameter in model.parameters())
