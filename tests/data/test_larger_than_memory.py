"""From a text file to batches in a process that may not have the corpus in memory."""

import subprocess
import sys

import pytest

from hf_efficient.data import load_documents

CORPUS_BYTES = 100_000_000
MEMORY_BYTES = 60_000_000  # beyond what the process has when its libraries are loaded and warm

PIPELINE = """
import resource, sys
from torch.utils.data import DataLoader
from hf_efficient.data import SegmentCollator, load_documents, segment_lanes, tokenize_documents, train_tokenizer

def pipeline(source, cache_dir):
    documents = load_documents(source, cache_dir=cache_dir)
    tokens = tokenize_documents(documents, train_tokenizer(documents, "word"))
    lanes = segment_lanes(tokens, num_lanes=8, segment_length=256)
    batches = DataLoader(lanes, batch_size=8, collate_fn=SegmentCollator())
    return lanes.num_bytes, lanes.num_tokens, sum((batch["labels"] != -100).sum().item() for batch in batches)

corpus, cache_dir, corpus_bytes, memory_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
pipeline("python-docs", cache_dir)

[kibibytes] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData")]  # private memory
limit = int(kibibytes) * 1024 + memory_bytes
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
print(*pipeline(corpus, cache_dir))
try:
    bytearray(corpus_bytes)
except MemoryError:
    print("the corpus does not fit")
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts private mappings on Linux only")
@pytest.mark.parametrize("line_end", ["\n", " "], ids=["lines", "one line"])
def test_corpus_larger_than_memory(tmp_path, line_end):
    block = line_end.join(" ".join(load_documents("python-docs", cache_dir=tmp_path)["text"]).split()) + line_end
    repeats = CORPUS_BYTES // len(block.encode()) + 1
    with (tmp_path / "corpus.txt").open("w") as file:
        for _ in range(repeats):
            file.write(block)
    arguments = [tmp_path / "corpus.txt", tmp_path / "cache", CORPUS_BYTES, MEMORY_BYTES]
    result = subprocess.run(
        [sys.executable, "-c", PIPELINE, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    figures, verdict = result.stdout.splitlines()
    num_tokens = repeats * len(block.split()) + 1
    assert figures.split() == [str(repeats * len(block.encode())), str(num_tokens), str(num_tokens)]
    assert verdict == "the corpus does not fit"
