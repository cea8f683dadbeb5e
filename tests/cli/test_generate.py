"""Text from a saved model: streamed and repeatable."""

from hf_efficient.cli.__main__ import main


def write(arguments, capsys):
    capsys.readouterr()
    assert main(["generate", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_begins_with_the_prompt_and_repeats_with_the_seed(finished_run, capsys):
    flags = [finished_run, "The quick", "--max_new_tokens", 12, "--temperature", 1.0, "--top_p", 1.0]
    first, again, other = (write([*flags, "--seed", seed], capsys) for seed in (3, 3, 4))
    assert first.startswith("The quick")
    assert first == again != other


def test_several_texts_differ(finished_run, capsys):
    text = write([finished_run, "The", "--num_texts", 2, "--max_new_tokens", 12, "--temperature", 2.0], capsys)
    _, first, second = text.split("--- ")
    assert first.startswith("1 ---\nThe")
    assert second.startswith("2 ---\nThe")
    assert first[1:] != second[1:]


def test_greedy_needs_no_seed(finished_run, capsys):
    flags = [finished_run, "The", "--greedy", "--max_new_tokens", 8]
    assert write([*flags, "--seed", 1], capsys) == write([*flags, "--seed", 2], capsys)


def test_prompt_longer_than_the_memory_and_another_memory(finished_run, capsys):
    prompt = "A module can define a set of functions."
    flags = [finished_run, prompt, "--greedy", "--max_new_tokens", 4]
    assert write(flags, capsys).startswith(prompt)
    assert write([*flags, "--mem_len", 32], capsys).startswith(prompt)
