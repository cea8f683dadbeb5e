"""One sentence that names the mend."""

from dataclasses import dataclass

import pytest
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from hf_efficient.cli.errors import nearest, one_sentence, unknown_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hiden_size", "hidden_size"),
        ("max_stps", "max_steps"),
        ("learning-rate".replace("-", "_"), "learning_rate"),
        ("lr", "learning_rate"),
        ("batch_size", "per_device_train_batch_size"),
        ("zzz", "hidden_size"),
    ],
)
def test_nearest_name(name, expected):
    names = ["max_steps", "learning_rate", "per_device_train_batch_size", "hidden_size", "lr_scheduler_type"]
    best = nearest(name, names)
    assert best == expected or (name == "zzz" and best in names)


def test_unknown_flag_is_named_as_a_flag():
    message = str(unknown_name("flag", "--max-stps", ["max_steps", "seed"], "hf-efficient train --help-all"))
    assert "'--max-stps'" in message
    assert "'--max_steps'" in message
    assert "hf-efficient train --help-all" in message


def test_strict_configuration_errors_lose_their_wrapping():
    @strict
    @dataclass
    class Config:
        size: int = 1

    with pytest.raises(StrictDataclassError) as caught:
        Config(size="many")
    message = one_sentence(caught.value)
    assert "\n" not in message
    assert message.startswith("Field 'size' expected int")


def test_error_without_message_says_its_name():
    assert one_sentence(ValueError()) == "ValueError"
