"""BLEU of translations, by sacrebleu: the figure that papers compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class Bleu:
    """BLEU of a corpus.

    bleu: 0 to 100. length_ratio: words of all translations over words of all references; below 1, translations are
    too short, for which BLEU has a penalty. signature: sacrebleu's record of how it was computed.
    """

    bleu: float
    length_ratio: float
    signature: str


def bleu(translations: Sequence[str], references: Sequence[str]) -> Bleu:
    """sacrebleu's corpus BLEU with its default settings (Post 2018, arXiv 1804.08771), one reference each.

    The texts are plain: neither tokenised nor lower-cased.

    Raises ValueError for unequal numbers of texts or none, ImportError, with the mend, without sacrebleu.
    """
    if len(translations) != len(references) or not references:
        raise ValueError(
            f"translations has {len(translations)} texts and references has {len(references)}; give one reference for "
            "each translation, and at least one."
        )
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise ImportError("BLEU needs sacrebleu; install it with `pip install hf_efficient[train]`.") from error
    metric = BLEU()
    score = metric.corpus_score(list(translations), [list(references)])
    return Bleu(score.score, score.sys_len / max(score.ref_len, 1), str(metric.get_signature()))


class BleuMetric:
    """`compute_metrics` for a trainer with `predict_with_generate`: "bleu" and "length_ratio".

    References are the decoded labels, which are the target texts themselves with a tokenizer that gives any text back,
    such as that of `train_seq2seq_tokenizer`. `signature` is sacrebleu's, of the last call.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.signature = ""

    def __call__(self, prediction: EvalPrediction) -> dict[str, Any]:
        translations, references = (self.decode(ids) for ids in (prediction.predictions, prediction.label_ids))
        score = bleu(translations, references)
        self.signature = score.signature
        return {"bleu": score.bleu, "length_ratio": score.length_ratio}

    def decode(self, ids: np.ndarray) -> list[str]:
        """The texts of rows of ids, padded with -100 or the pad token."""
        ids = np.where(ids == IGNORED, self.tokenizer.pad_token_id, ids)
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)
