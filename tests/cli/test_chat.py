"""`hf-efficient generate MODEL --interactive`: a talk on the standard input."""

import io
import sys

import pytest
from datasets import Dataset

from hf_efficient import UniversalTransformerConfig, UniversalTransformerForConditionalGeneration
from hf_efficient.cli.__main__ import main
from hf_efficient.data import train_seq2seq_tokenizer
from hf_efficient.generation import Conversation

WORDS = ["Hi there.", "Hello!", "Do you like music?", "Yes, I do.", "Which?"]
FLAGS = ("--num_samples", "2", "--max_new_tokens", "5", "--device", "cpu")


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """Folder of a model that has learned nothing."""
    folder = tmp_path_factory.mktemp("talker")
    tokenizer = train_seq2seq_tokenizer(Dataset.from_dict({"text": WORDS}), 270)
    tokenizer.model_max_length = 40
    tokenizer.save_pretrained(folder)
    UniversalTransformerForConditionalGeneration(
        UniversalTransformerConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_attention_heads=2,
            max_steps=2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(folder)
    return folder


class Terminal(io.StringIO):
    """A standard input that says it is one."""

    def isatty(self):
        return True


@pytest.fixture
def talk(talker, monkeypatch, capsys):
    """Runs a talk: lines in, what was printed out."""

    def run(text, *flags, stdin=io.StringIO):
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", stdin(text))
        code = main(["generate", str(talker), "--interactive", *FLAGS, *map(str, flags)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def echo(monkeypatch):
    """The model answers with what it has been told, all of it."""

    def reply(self, text):
        self.turns += [text, f"heard: {' | '.join([*self.turns, text])}"]
        return self.turns[-1]

    monkeypatch.setattr(Conversation, "reply", reply)


def test_a_line_for_a_line(talk):
    code, out, _ = talk("Hi there.\nWhich?\n")
    assert code == 0
    assert len(out.splitlines()) == 2


def test_seed_repeats_the_talk(talk):
    lines = "Hi there.\nDo you like music?\n"
    first, again, other = (talk(lines, "--seed", seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_history_is_kept_and_forgotten(talk, echo):
    code, out, _ = talk("a\n\n  b  \n/reset\nc\n")
    assert code == 0
    assert out.splitlines() == ["heard: a", "heard: a | heard: a | b", "Forgotten.", "heard: c"]


def test_quit_ends_the_talk(talk, echo):
    code, out, _ = talk("a\n/quit\nb\n")
    assert (code, out.splitlines()) == (0, ["heard: a"])


def test_unknown_command_is_no_turn(talk, echo):
    _, out, _ = talk("/restart\na\n")
    first, second = out.splitlines()
    assert "no '/restart'" in first
    assert "/reset" in first
    assert second == "heard: a"


def test_last_line_without_an_end(talk, echo):
    assert talk("a\nb")[1].splitlines()[-1] == "heard: a | heard: a | b"


def test_terminal_gets_a_prompt(talk, echo, monkeypatch):
    """`input` reads from a terminal; EOF there ends the talk."""
    lines = iter(["a"])

    def read(prompt):
        assert prompt == "> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    code, out, _ = talk("", stdin=Terminal)
    assert code == 0
    greeting, answer = out.splitlines()[:2]
    assert "/reset" in greeting
    assert answer == "heard: a"


def test_interrupt_at_the_prompt_ends_the_talk(talk, monkeypatch):
    def interrupt(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    code, _, err = talk("", stdin=Terminal)
    assert (code, err) == (0, "")


def test_interrupt_of_an_answer_takes_the_line_back(talk, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(UniversalTransformerForConditionalGeneration, "generate", interrupted)
    code, out, _ = talk("Hi there.\nWhich?\n")
    assert code == 0
    assert out.splitlines() == ["Stopped; your line was taken back."] * 2


def test_a_line_that_is_too_long_is_explained(talk):
    code, out, _ = talk("x" * 200 + "\nHi there.\n")
    assert code == 0
    first, second = out.splitlines()
    assert first.startswith("No answer: The last turn has 201 tokens, more than max_length=40")
    assert not second.startswith("No answer")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "Hi"], "--prompt and --interactive contradict each other"),
        (["--greedy"], "--greedy and --interactive contradict each other"),
        (["--num_texts", 3], "--num_texts 3 is not for --interactive"),
        (["--num_samples", 0], "--num_samples 0 must be at least 1"),
        (["--max_turns", 0], "--max_turns 0 must be at least 1"),
    ],
)
def test_flags_that_mean_nothing_in_a_talk(talk, flags, message):
    code, _, err = talk("Hi there.\n", *flags)
    assert code == 2
    assert message in err
