"""What a model needs to stand on the Hub: a card with measured figures."""

from .model_card import write_model_card

__all__ = ["write_model_card"]
