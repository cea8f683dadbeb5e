"""The stacks that an Evolved Transformer can have, and dropout, for tests of whole models."""

STACKS = {
    "encoder": {"is_decoder": False, "is_encoder_decoder": False},
    "decoder": {"is_decoder": True, "is_encoder_decoder": False},
    "both": {"is_decoder": False, "is_encoder_decoder": True},
}
DROPOUT = {"dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.2}

__all__ = ["DROPOUT", "STACKS"]
