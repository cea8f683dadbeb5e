"""What a model needs to stand on the Hub: a card with measured figures, and the way there."""

from .contents import Upload, collect_contents
from .model_card import write_model_card
from .publish import Publication, publish
from .trainer_card import write_trainer_card

__all__ = ["Publication", "Upload", "collect_contents", "publish", "write_model_card", "write_trainer_card"]
