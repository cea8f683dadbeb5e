"""Ways to decode beyond transformers' `generate`: the best of several samples, and talks of many turns."""

from .conversation import Conversation
from .sample_and_rank import SampleAndRankOutput, sample_and_rank

__all__ = ["Conversation", "SampleAndRankOutput", "sample_and_rank"]
