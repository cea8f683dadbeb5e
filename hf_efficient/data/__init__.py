"""Text to documents, documents to tokens, tokens to lanes of segments, and those to batches; generated tasks."""

from .agreement import (
    AgreementPair,
    AgreementSentence,
    agreement_accuracy,
    agreement_pairs,
    number_features,
    read_agreement_table,
    read_minimal_pairs,
    read_number_prediction,
    sentence_text,
)
from .algorithmic import ALGORITHMIC_TASKS, AdditionTask, CopyTask, ReverseTask, sequence_accuracy
from .babi import BabiQuestion, BabiVocabulary, babi_features, read_babi
from .collators import PaddingCollator, SegmentCollator
from .conversation import (
    DEFAULT_MAX_TURNS,
    conversation_texts,
    join_history,
    read_conversations,
    split_of_conversation,
    tokenize_conversations,
)
from .documents import load_documents
from .duplication import DuplicationTask, prediction_accuracy
from .generated_task import EOS_ID, PAD_ID, GeneratedTask
from .graves_tasks import (
    GRAVES_TASKS,
    AdditionVectorsTask,
    GravesTask,
    LogicTask,
    ParityTask,
    SortTask,
    sequence_error_rate,
)
from .lambada import evaluate_lambada, last_word_ids, read_lambada
from .lanes import IGNORE, SegmentLanes, segment_lanes
from .learning_to_execute import LearningToExecuteTask
from .logical_inference import (
    FORMULA_SYMBOLS,
    RELATIONS,
    FormulaPair,
    LogicalInferenceTask,
    pair_features,
    read_logical_inference,
)
from .phrases import generate_phrases
from .scan import SCAN_VOCAB_SIZE, ScanExample, generate_scan, read_scan, scan_actions, scan_features
from .seq2seq import (
    PairCollator,
    check_seq2seq_tokenizer,
    encode_sources,
    seq2seq_tokenizer,
    tokenize_pairs,
    train_seq2seq_tokenizer,
)
from .tokenization import load_tokenizer, tokenize_documents, train_tokenizer
from .translation import read_pairs, read_parallel

__all__ = [
    "ALGORITHMIC_TASKS",
    "AdditionTask",
    "AdditionVectorsTask",
    "AgreementPair",
    "AgreementSentence",
    "BabiQuestion",
    "BabiVocabulary",
    "CopyTask",
    "DEFAULT_MAX_TURNS",
    "DuplicationTask",
    "EOS_ID",
    "FORMULA_SYMBOLS",
    "FormulaPair",
    "GRAVES_TASKS",
    "GeneratedTask",
    "GravesTask",
    "IGNORE",
    "LearningToExecuteTask",
    "LogicTask",
    "LogicalInferenceTask",
    "PAD_ID",
    "PaddingCollator",
    "PairCollator",
    "ParityTask",
    "RELATIONS",
    "ReverseTask",
    "SCAN_VOCAB_SIZE",
    "ScanExample",
    "SegmentCollator",
    "SegmentLanes",
    "SortTask",
    "agreement_accuracy",
    "agreement_pairs",
    "babi_features",
    "check_seq2seq_tokenizer",
    "conversation_texts",
    "encode_sources",
    "evaluate_lambada",
    "generate_phrases",
    "generate_scan",
    "join_history",
    "last_word_ids",
    "load_documents",
    "load_tokenizer",
    "number_features",
    "pair_features",
    "prediction_accuracy",
    "read_agreement_table",
    "read_babi",
    "read_conversations",
    "read_lambada",
    "read_logical_inference",
    "read_minimal_pairs",
    "read_number_prediction",
    "read_pairs",
    "read_parallel",
    "read_scan",
    "scan_actions",
    "scan_features",
    "segment_lanes",
    "sentence_text",
    "seq2seq_tokenizer",
    "sequence_accuracy",
    "sequence_error_rate",
    "split_of_conversation",
    "tokenize_conversations",
    "tokenize_documents",
    "tokenize_pairs",
    "train_seq2seq_tokenizer",
    "train_tokenizer",
]
