"""BLEU by sacrebleu, of texts and of padded ids."""

import sys

import numpy as np
import pytest
import sacrebleu
from datasets import Dataset
from transformers import EvalPrediction

from hf_efficient.data import train_seq2seq_tokenizer
from hf_efficient.training import BleuMetric, bleu

REFERENCES = ["Zwei Hunde laufen über eine Wiese.", "Ein Mann schläft."]
TRANSLATIONS = ["Zwei Hunde laufen über die Wiese.", "Ein Mann schläft auf einer Bank."]


def test_bleu_is_sacrebleu_s():
    score = bleu(TRANSLATIONS, REFERENCES)
    assert score.bleu == sacrebleu.corpus_bleu(TRANSLATIONS, [REFERENCES]).score
    assert score.length_ratio == pytest.approx(14 / 11)
    assert "tok:13a" in score.signature
    assert bleu(REFERENCES, REFERENCES).bleu == pytest.approx(100)
    assert bleu(["", ""], REFERENCES).bleu == 0


def test_ids_are_decoded_without_pads():
    tokenizer = train_seq2seq_tokenizer(Dataset.from_dict({"text": REFERENCES}), 300)
    predictions, labels = (tokenizer(texts)["input_ids"] for texts in (TRANSLATIONS, REFERENCES))
    longest = max(map(len, predictions + labels)) + 2
    # As generation leaves them: the start token in front, pads of both kinds behind.
    predicted = np.array([[0, *ids] + [0] * 2 + [-100] * (longest - len(ids)) for ids in predictions])
    expected = np.array([ids + [-100] * (longest - len(ids)) for ids in labels])
    metric = BleuMetric(tokenizer)
    figures = metric(EvalPrediction(predictions=predicted, label_ids=expected))
    assert figures["bleu"] == bleu(TRANSLATIONS, REFERENCES).bleu
    assert metric.signature == bleu(TRANSLATIONS, REFERENCES).signature


def test_what_is_refused(monkeypatch):
    for translations, references in ((["a"], []), ([], []), (["a"], ["a", "b"])):
        with pytest.raises(ValueError, match=f"translations has {len(translations)} texts and references has"):
            bleu(translations, references)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match="pip install hf_efficient"):
        bleu(["a"], ["a"])
