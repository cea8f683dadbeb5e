"""Names of the weights on disk: those of `TransfoXLLMHeadModel`, so that every checkpoint there is loads.

transformers renames on load and back on save. The original attention has one fused matrix `qkv_net`; the model has one
per projection, as quantisation, LoRA and a memory that needs no queries want it.
"""

import re
from collections.abc import Mapping

from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

# (name on disk, name in the model), applied from top to bottom on load and from bottom to top on save. A name that is
# the beginning of another's comes first, so that saving meets the longer one first.
RENAMINGS = (
    (r"^transformer\.", "^model."),
    (r"word_emb\.emb_layers\.0\.", "embed_tokens."),
    (r"word_emb\.emb_layers\.(\d+)\.", r"embed_tokens.tails.\1."),
    (r"word_emb\.emb_projs\.(\d+)", r"embed_tokens.projections.\1"),
    (r"dec_attn\.", "self_attn."),
    (r"self_attn\.o_net\.", "self_attn.o_proj."),
    (r"self_attn\.r_net\.", "self_attn.r_proj."),
    ("r_w_bias", "content_bias"),
    ("r_r_bias", "position_bias"),
    (r"pos_ff\.", "feed_forward."),
    (r"feed_forward\.CoreNet\.0\.", "feed_forward.up_proj."),
    (r"feed_forward\.CoreNet\.3\.", "feed_forward.down_proj."),
    (r"crit\.out_layers\.0\.", "lm_head."),
    (r"crit\.out_layers\.(\d+)\.", r"lm_head.tails.\1."),
    (r"crit\.out_projs\.(\d+)", r"lm_head.projections.\1"),
    (r"crit\.cluster_", "lm_head.cluster_"),
)
FUSED = "self_attn.qkv_net.weight"
SPLIT = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"]


def register_checkpoint_names(model_type: str) -> None:
    """Make transformers translate the state dict of every model of `model_type` on load and on save."""
    mapping = [WeightRenaming(on_disk, in_model) for on_disk, in_model in RENAMINGS]
    mapping.append(WeightConverter(FUSED, SPLIT, operations=[Chunk(dim=0)]))
    register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)


def to_model_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the names in the model; what has them already is left alone."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        name = key
        for on_disk, in_model in RENAMINGS:
            name = re.sub(on_disk, in_model.removeprefix("^"), name)
        if name.endswith(FUSED):
            parts = zip(SPLIT, tensor.chunk(len(SPLIT)), strict=True)
            renamed |= {name.replace(FUSED, part): chunk for part, chunk in parts}
        else:
            renamed[name] = tensor
    return renamed
