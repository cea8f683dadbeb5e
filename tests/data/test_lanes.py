"""Lanes of segments against a cutter made of Python lists, and on several processes."""

import pickle
import random
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset, Features, List, Value, concatenate_datasets
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from hf_efficient.data import SegmentCollator, SegmentLanes, segment_lanes, tokenize_documents, train_tokenizer

FEATURES = Features({"input_ids": List(Value("int32")), "num_bytes": Value("int64"), "ends_document": Value("bool")})
BOUNDARIES = ("ignore", "reset")


def random_documents(lengths: list[int]) -> list[list[int]]:
    """Documents of these lengths; no token occurs twice, and none is 0."""
    numbers = iter(range(1, sum(lengths) + 1))
    return [[next(numbers) for _ in range(length)] for length in lengths]


def table_of(documents: list[list[int]], cache_dir=None, rows_per_batch: int = 3, piece: int | None = None) -> Dataset:
    """Documents as `tokenize_documents` gives them; in record batches on disk if `cache_dir` is given."""
    rows = []
    for document in documents:
        step = piece or max(len(document), 1)
        pieces = [document[start : start + step] for start in range(0, len(document), step)] or [[]]
        rows += [
            {"input_ids": part, "num_bytes": 2 * len(part), "ends_document": index == len(pieces) - 1}
            for index, part in enumerate(pieces)
        ]
    if cache_dir is None:
        return Dataset.from_list(rows, features=FEATURES)
    return Dataset.from_generator(
        lambda: iter(rows), features=FEATURES, cache_dir=str(cache_dir), writer_batch_size=rows_per_batch
    )


def reference_items(documents: list[list[int]], num_lanes: int, length: int, boundaries: str) -> list[dict[str, list]]:
    """All items, from lists of segments (document, tokens) per lane."""
    if boundaries == "ignore":
        stream = [token for document in documents for token in document]
        lanes = []
        for lane in range(num_lanes):
            stretch = stream[lane * len(stream) // num_lanes : (lane + 1) * len(stream) // num_lanes]
            lanes.append([(0, stretch[start : start + length]) for start in range(0, len(stretch), length)])
    else:
        segments = [
            (number, document[start : start + length])
            for number, document in enumerate(documents)
            for start in range(0, len(document), length)
        ]
        lanes = [
            segments[lane * len(segments) // num_lanes : (lane + 1) * len(segments) // num_lanes]
            for lane in range(num_lanes)
        ]
    items = []
    for step in range(max(map(len, lanes))):
        for lane in lanes:
            document, tokens = lane[step] if step < len(lane) else (None, [])
            following = lane[step + 1] if step + 1 < len(lane) else (None, [])
            labels = tokens[1:] + (following[1][:1] if following[0] == document else [])
            begins = step == 0 or (bool(tokens) and lane[step - 1][0] != document)
            padding = length - len(tokens)
            items.append(
                {
                    "input_ids": tokens + [0] * padding,
                    "shift_labels": labels + [-100] * (length - len(labels)),
                    "labels": tokens + [-100] * padding,
                    "attention_mask": [1] * len(tokens) + [0] * padding,
                    "reset": begins,
                }
            )
    return items


def as_lists(lanes: SegmentLanes) -> list[dict[str, list]]:
    return [{name: tensor.tolist() for name, tensor in item.items()} for item in lanes]


CASES = [  # document lengths, lanes, segment length
    ([40], 1, 8),
    ([40], 4, 10),
    ([41], 4, 10),
    ([43], 4, 5),
    ([7, 0, 9, 1, 0, 30, 2], 3, 4),
    ([1] * 30, 5, 2),
    ([100, 1, 1], 7, 3),
    ([0, 0, 25, 0], 2, 5),
    ([9], 3, 3),
    ([5, 4], 9, 1),
]


@pytest.mark.parametrize("boundaries", BOUNDARIES)
@pytest.mark.parametrize("piece", [None, 3])
@pytest.mark.parametrize(("lengths", "num_lanes", "segment_length"), CASES)
def test_items_are_those_of_the_reference(tmp_path, lengths, num_lanes, segment_length, boundaries, piece):
    documents = random_documents(lengths)
    expected = reference_items(documents, num_lanes, segment_length, boundaries)
    for cache_dir in (None, tmp_path):
        lanes = segment_lanes(table_of(documents, cache_dir, piece=piece), num_lanes, segment_length, boundaries)
        assert as_lists(lanes) == expected
        assert len(lanes) == len(expected) == lanes.num_segments * lanes.num_lanes
        assert lanes.num_tokens == sum(lengths)
        assert lanes.num_bytes == 2 * sum(lengths)
        assert lanes.num_predictions == sum(label != -100 for item in expected for label in item["shift_labels"])


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_random_corpora(boundaries):
    rng = random.Random(0)
    for _ in range(50):
        num_lanes, segment_length = rng.randint(1, 6), rng.randint(1, 9)
        lengths = [rng.choice([0, 1, 5, rng.randint(0, 60)]) for _ in range(rng.randint(1, 12))]
        lengths.append(max(0, num_lanes * segment_length - sum(lengths)))
        documents = random_documents(lengths)
        lanes = segment_lanes(table_of(documents, piece=rng.choice([None, 7])), num_lanes, segment_length, boundaries)
        assert as_lists(lanes) == reference_items(documents, num_lanes, segment_length, boundaries)


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_every_token_once_and_rows_continue(python_docs, boundaries):
    """On real text, from the batches alone: nothing here knows how the lanes are cut."""
    tokenizer = train_tokenizer(python_docs, "byte")
    tokens = tokenize_documents(python_docs, tokenizer)
    stream = np.concatenate([np.array(row) for row in tokens["input_ids"]])
    lanes = segment_lanes(tokens, 6, 50, boundaries)
    batches = list(DataLoader(lanes, batch_size=6))
    columns = {name: torch.stack([batch[name] for batch in batches], dim=1) for name in batches[0]}  # (6, steps, ...)
    real = columns["attention_mask"].bool()
    assert columns["input_ids"][real].tolist() == stream.tolist()
    assert columns["labels"][real].tolist() == stream.tolist()
    assert (columns["labels"][~real] == -100).all()
    for row in range(6):
        row_tokens, row_labels = columns["input_ids"][row][real[row]], columns["shift_labels"][row][real[row]]
        known = row_labels[:-1] != -100
        assert torch.equal(row_labels[:-1][known], row_tokens[1:][known])
        expected = (row_tokens == tokenizer.eos_token_id) if boundaries == "reset" else torch.zeros_like(row_tokens)
        expected[-1] = 1  # nothing follows a lane
        assert torch.equal(row_labels == -100, expected.bool())
    begins = columns["reset"].sum().item()
    assert begins == 6 if boundaries == "ignore" else len(tokens) <= begins <= len(tokens) + 5
    assert lanes.num_bytes == sum(len(text.encode()) for text in python_docs["text"])


def test_lanes_differ_by_one_token_at_most():
    lanes = segment_lanes(table_of(random_documents([1003])), 7, 10)
    lengths = [sum(int(lanes[i]["attention_mask"].sum()) for i in range(lane, len(lanes), 7)) for lane in range(7)]
    assert sum(lengths) == 1003
    assert max(lengths) - min(lengths) == 1


def test_indices_count_from_both_ends():
    lanes = segment_lanes(table_of(random_documents([40])), 2, 5)
    assert torch.equal(lanes[-1]["input_ids"], lanes[len(lanes) - 1]["input_ids"])
    for index in (len(lanes), -len(lanes) - 1):
        with pytest.raises(IndexError):
            lanes[index]


# --- tables of other shapes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_selected_and_concatenated_tables(tmp_path, boundaries):
    documents = random_documents([9, 4, 0, 17, 8, 3])
    table = table_of(documents, tmp_path)
    order = [4, 0, 3]
    for changed, expected in [
        (table.select(order), [documents[i] for i in order]),
        (table.select(range(1, 5)), documents[1:5]),
        (concatenate_datasets([table, table_of(documents[:1])]), [*documents, documents[0]]),
    ]:
        lanes = segment_lanes(changed, 2, 5, boundaries)
        assert as_lists(lanes) == reference_items(expected, 2, 5, boundaries)


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_table_with_nothing_but_tokens(boundaries):
    documents = random_documents([12, 9])
    table = Dataset.from_dict({"input_ids": documents}).with_format("torch")  # int64, every row a document
    lanes = segment_lanes(table, 2, 4, boundaries)
    assert as_lists(lanes) == reference_items(documents, 2, 4, boundaries)
    assert lanes.num_bytes is None


# --- loading in several processes ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # fork, from Python 3.12 on
@pytest.mark.filterwarnings("ignore:This DataLoader will create .* worker processes:UserWarning")  # on one core
@pytest.mark.parametrize(("method", "num_workers"), [("fork", 3), ("spawn", 1)])
def test_workers_give_the_same_batches(tmp_path, method, num_workers):
    lanes = segment_lanes(table_of(random_documents([50, 70, 33]), tmp_path), 4, 6, "reset")
    arguments = {"batch_size": 4, "collate_fn": SegmentCollator()}
    alone = list(DataLoader(lanes, **arguments))
    workers = list(DataLoader(lanes, num_workers=num_workers, multiprocessing_context=method, **arguments))
    assert len(alone) == len(workers) == lanes.num_segments
    for one, other in zip(alone, workers, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_pickled_lanes_share_the_table_on_disk(tmp_path):
    lanes = segment_lanes(table_of(random_documents([50_000]), tmp_path, piece=1000), 4, 6, "reset")
    assert len(pickle.dumps(lanes)) < 10_000  # of 200,000 bytes of tokens


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_each_rank_reads_its_own_lanes_in_order(num_ranks):
    num_lanes, per_device = 8, 8 // num_ranks
    lanes = segment_lanes(table_of(random_documents([301])), num_lanes, 7)
    for rank in range(num_ranks):
        sampler = BatchSampler(SequentialSampler(lanes), per_device, drop_last=True)
        shard = list(BatchSamplerShard(sampler, num_ranks, rank))
        assert len(shard) == lanes.num_segments
        for step, batch in enumerate(shard):
            first = step * num_lanes + rank * per_device
            assert batch == list(range(first, first + per_device))


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_reading_holds_a_segment_not_the_corpus(tmp_path, boundaries):
    """12 MB of tokens on disk; Python and Arrow together hold less than 1 MB at any time."""
    row = np.arange(10_000, dtype=np.int32)
    table = Dataset.from_generator(
        lambda: ({"input_ids": row, "num_bytes": 1, "ends_document": True} for _ in range(300)),
        features=FEATURES,
        cache_dir=str(tmp_path),
        writer_batch_size=100,
    )
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    lanes = segment_lanes(table, 8, 512, boundaries)
    total, most = 0, 0
    for item in lanes:
        total += int(item["attention_mask"].sum())
        most = max(most, pa.total_allocated_bytes() - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 3_000_000
    assert most + peak < 1_000_000


# --- what bad input gets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_corpus_shorter_than_one_segment_per_lane(boundaries):
    table = table_of(random_documents([39]))
    message = (
        "tokens holds 39 tokens, fewer than num_lanes=4 lanes of one segment of segment_length=10; use fewer lanes"
    )
    with pytest.raises(ValueError, match=message):
        segment_lanes(table, 4, 10, boundaries)
    assert len(segment_lanes(table, 3, 10)) == 6


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_lanes": 0}, ValueError, "num_lanes=0 must be at least 1"),
        ({"segment_length": -3}, ValueError, "segment_length=-3 must be at least 1"),
        ({"num_lanes": 2.0}, TypeError, "num_lanes=2.0 must be an integer"),
        ({"segment_length": True}, TypeError, "segment_length=True must be an integer"),
        ({"document_boundaries": "keep"}, ValueError, "document_boundaries='keep' is none of 'ignore', 'reset'"),
        ({"tokens": [[1, 2]]}, TypeError, "tokens must be a datasets.Dataset, not list"),
        ({"tokens": Dataset.from_dict({"text": ["a"]})}, ValueError, r"'input_ids', it has \['text'\]"),
    ],
)
def test_bad_arguments(arguments, error, message):
    good = {"tokens": table_of(random_documents([40])), "num_lanes": 2, "segment_length": 4}
    with pytest.raises(error, match=message):
        segment_lanes(**good | arguments)
