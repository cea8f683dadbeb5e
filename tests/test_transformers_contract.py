"""What we use of transformers beyond its top-level names, each checked to be there.

transformers promises stability for `from transformers import name` only. Everything else we lean on is listed here, so
that an upgrade which breaks us names the symbol. The lists are compared with the code both ways: using something
unlisted fails, and so does listing something unused. Methods of theirs that we replace must take what theirs take.
"""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_efficient

PACKAGE = Path(hf_efficient.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
LIBRARIES = ("accelerate", "datasets", "transformers")

# `from <module> import <name>`, for modules below the top level of a library.
IMPORTED = {
    "datasets.exceptions": {"DatasetGenerationError"},
    "transformers.activations": {"ACT2FN"},
    "transformers.cache_utils": {"Cache", "CacheLayerMixin", "DynamicCache", "EncoderDecoderCache"},
    "transformers.conversion_mapping": {"register_checkpoint_conversion_mapping"},
    "transformers.core_model_loading": {"Chunk", "WeightConverter", "WeightRenaming"},
    "transformers.dynamic_module_utils": {"get_relative_import_files"},
    "transformers.generation": {"GenerationMode"},
    "transformers.hf_argparser": {"string_to_bool"},
    "transformers.masking_utils": {"create_bidirectional_mask", "create_causal_mask"},
    "transformers.modeling_layers": {"GradientCheckpointingLayer"},
    "transformers.modeling_outputs": {
        "BaseModelOutput",
        "BaseModelOutputWithPast",
        "BaseModelOutputWithPastAndCrossAttentions",
        "CausalLMOutputWithPast",
        "MaskedLMOutput",
        "ModelOutput",
        "QuestionAnsweringModelOutput",
        "Seq2SeqLMOutput",
        "Seq2SeqModelOutput",
        "SequenceClassifierOutput",
        "SequenceClassifierOutputWithPast",
        "TokenClassifierOutput",
    },
    "transformers.modeling_utils": {"ALL_ATTENTION_FUNCTIONS", "slice_logits_to_keep"},
    "transformers.models.auto.modeling_auto": {"MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"},
    "transformers.trainer_callback": {"ProgressCallback"},
    "transformers.trainer_pt_utils": {"get_length_grouped_indices"},
    "transformers.trainer_utils": {"EvalLoopOutput", "TrainOutput"},
    "transformers.utils": {"ModelOutput", "can_return_tuple", "logging"},
    "transformers.utils.logging": {"disable_progress_bar"},
}
# Private members of a library's class that a class of ours replaces.
OVERRIDDEN = {
    "transformers.generation.utils.GenerationMixin": {
        "_expand_inputs_for_generation",
        "_get_candidate_generator",
        "_prepare_cache_for_generation",
    },
    "transformers.modeling_utils.PreTrainedModel": {
        "_can_set_attn_implementation",
        "_init_weights",
        "_is_stateful",
        "_keys_to_ignore_on_load_unexpected",
        "_no_split_modules",
        "_set_gradient_checkpointing",
        "_skip_keys_device_placement",
        "_supports_attention_backend",
        "_supports_sdpa",
        "_tied_weights_keys",
    },
    "transformers.tokenization_python.PythonBackend": {"_convert_id_to_token", "_convert_token_to_id", "_tokenize"},
    "transformers.tokenization_utils_base.PreTrainedTokenizerBase": {"_decode"},
    "transformers.trainer.Trainer": {
        "_get_train_sampler",
        "_issue_warnings_after_load",
        "_load_rng_state",
        "_save_checkpoint",
        "_save_rng_state",
    },
}
# Private members that we read or call without defining them, and an owner that has them.
USED = {
    "_C": "torch",
    "_actions": "argparse.ArgumentParser",
    "_added_tokens_decoder": "transformers.tokenization_python.PythonBackend",
    "_added_tokens_encoder": "transformers.tokenization_python.PythonBackend",
    "_attn_implementation": "transformers.configuration_utils.PreTrainedConfig",
    "_base": "torch.Tensor",
    "_current_graph_task_id": "torch._C",
    "_execution_engine": "torch.autograd.Variable",
    "_gen_kwargs": "transformers.Seq2SeqTrainer",
    "_get_formatter": "argparse.ArgumentParser",
    "_get_resized_embeddings": "transformers.modeling_utils.PreTrainedModel",
    "_get_resized_lm_head": "transformers.modeling_utils.PreTrainedModel",
    "_indices": "datasets.Dataset",
    "_is_replica": "torch.nn.Module",
    "_model_mapping": "transformers.AutoModel",
    "_prepare_inputs": "transformers.Trainer",
    "_replace": "collections.namedtuple",
    "_scaled_dot_product_flash_attention_for_cpu": "torch.ops.aten",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "torch.ops.aten",
    "_version": "torch.Tensor",
}


def modules() -> list[str]:
    """Dotted names of all modules of the package."""
    paths = [path.relative_to(PACKAGE.parent).with_suffix("") for path in SOURCES]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    return [name for name in names if not name.endswith(".__main__")]


def find(path: str):
    """The object at a dotted path, which begins with as many modules as can be imported."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(path)


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore."""
    return name.startswith("_") and not name.startswith("__")


def is_below_the_top(module: str) -> bool:
    """Whether a module is part of a library, but not the library's own name."""
    return "." in module and module.split(".")[0] in LIBRARIES


def nodes() -> Iterator[ast.AST]:
    """All syntax nodes of the package."""
    for path in SOURCES:
        yield from ast.walk(ast.parse(path.read_text("utf-8")))


def imported_below_the_top() -> dict[str, set[str]]:
    """Names imported from modules of a library, by module."""
    found: dict[str, set[str]] = {}
    for node in nodes():
        if isinstance(node, ast.ImportFrom) and not node.level and is_below_the_top(node.module):
            found.setdefault(node.module, set()).update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in filter(lambda alias: is_below_the_top(alias.name), node.names):
                found.setdefault(alias.name, set())
    return found


def replacements() -> Iterator[tuple[type, str, list[type]]]:
    """(our class, member, the library classes it stands in for, nearest first) for all members not in dunders.

    Of a class that is made of one of ours and one of theirs, what ours has counts too.
    """
    for module in map(importlib.import_module, modules()):
        for _, ours in inspect.getmembers(module, inspect.isclass):
            if ours.__module__ != module.__name__:
                continue
            bases = [base for base in ours.__mro__[1:] if base.__module__.split(".")[0] in LIBRARIES]
            family = [base for base in ours.__mro__ if base.__module__.split(".")[0] == hf_efficient.__name__]
            for name in {name: None for base in family for name in vars(base)}:
                owners = [base for base in bases if name in vars(base)]
                if owners and not name.startswith("__") and name != "_abc_impl":
                    yield ours, name, owners


def overridden() -> dict[str, set[str]]:
    """Private members of library classes that our classes replace, by the base class that has them first."""
    found: dict[str, set[str]] = {}
    for _, name, owners in replacements():
        if is_private(name):
            found.setdefault(f"{owners[-1].__module__}.{owners[-1].__qualname__}", set()).add(name)
    return found


def used_but_not_defined() -> set[str]:
    """Private attributes that the package reads, by syntax or by `getattr`, and nowhere defines."""
    defined, used = set(), set()
    for node in nodes():
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute):
            (defined if isinstance(node.ctx, ast.Store) else used).add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            used |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {name for name in used - defined if is_private(name)}


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in IMPORTED.items() for n in sorted(names)])
def test_imported_name_is_there(module, name):
    assert hasattr(importlib.import_module(module), name), f"{module}.{name} is gone"


@pytest.mark.parametrize(("owner", "name"), [(o, n) for o, names in OVERRIDDEN.items() for n in sorted(names)])
def test_overridden_member_is_there(owner, name):
    assert name in vars(find(owner)), f"{owner}.{name} is gone: our override would never be called"


@pytest.mark.parametrize(("name", "owner"), USED.items())
def test_used_member_is_there(name, owner):
    found = find(owner)
    assert hasattr(found, name) or name in inspect.getsource(found), f"{owner}.{name} is gone"


def test_lists_match_the_code():
    assert imported_below_the_top() == IMPORTED
    assert overridden() == OVERRIDDEN
    assert used_but_not_defined() == set(USED)


def parameters(function) -> dict[str, inspect.Parameter]:
    """Parameters that have a name of their own, by name."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    signature = inspect.signature(function).parameters
    return {name: parameter for name, parameter in signature.items() if parameter.kind not in variadic}


def test_replacing_methods_take_what_the_library_passes():
    missing = {}
    for ours, name, owners in replacements():
        method, theirs = inspect.getattr_static(ours, name), vars(owners[0])[name]
        if not (inspect.isfunction(method) and inspect.isfunction(theirs)):
            continue
        takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(method).parameters.values())
        unknown = set(parameters(theirs)) - set(parameters(method))
        if unknown and not takes_any:
            missing[f"{ours.__name__}.{name}"] = unknown
    assert missing == {}
