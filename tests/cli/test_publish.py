"""`hf-efficient publish`: the command around `hf_efficient.hub.publish`, which tests/hub tests."""

import pytest
from hub.conftest import hub  # noqa: F401

from hf_efficient.cli.__main__ import main


@pytest.fixture
def run_folder(run_copy):
    """A run with what lies beside a model in practice."""
    (run_copy / ".env").write_text("HF_TOKEN=x")
    return run_copy


def test_dry_run_needs_no_account_and_shows_what_would_go(run_folder, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert main(["publish", str(run_folder), "my-model", "--dry_run", "--with_code"]) == 0
    printed = capsys.readouterr().out
    goes, stays = printed.split("Stays here:")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md", "modeling_transformer_xl.py"):
        assert f"  {name} " in goes
    for name in (".env", "training_args.bin", "report.json", "recipe.yaml", "run_settings.json", "checkpoint-4/"):
        assert f"  {name} " in stays
    assert "nothing was sent" in stays


def test_published(hub, run_folder, capsys):  # noqa: F811
    arguments = ["publish", str(run_folder), "team/my-model", "--private", "--revision", "trial"]
    assert main([*arguments, "--commit_message", "First try"]) == 0
    assert f"Published: {hub.endpoint}/team/my-model/commit/" in capsys.readouterr().out
    files = hub.files("team/my-model", "trial")
    assert files["model.safetensors"] == (run_folder / "model.safetensors").read_bytes()
    assert not any(name.endswith((".py", ".env", ".bin")) for name in files)
    assert hub.repositories["team/my-model"].private
    assert hub.repositories["team/my-model"].titles[-1] == "First try"

    (run_folder / "generation_config.json").write_text("{}")
    assert main([*arguments]) == 2
    assert "--exist_ok" in capsys.readouterr().err
    assert main([*arguments, "--exist_ok"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["publish"], ["folder", "hf-efficient publish FOLDER REPO_ID"]),
        (["publish", "run"], ["repo_id", "hf-efficient publish FOLDER REPO_ID"]),
        (["publish", "absent", "my-model"], ["absent", "no folder"]),
        (["publish", "run", "my model", "--dry_run"], ["repo_id", "my model", "owner/name"]),
        (["publish", "run", "my-model", "--dryrun"], ["--dryrun", "--dry_run"]),
        (["publish", "run", "my-model"], ["HF_HUB_OFFLINE", "unset"]),
    ],
)
def test_mistakes(arguments, words, run_folder, monkeypatch, capsys):
    monkeypatch.chdir(run_folder.parent)
    run_folder.rename("run")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert [word for word in words if word not in message] == []
