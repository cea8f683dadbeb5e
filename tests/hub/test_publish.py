"""Publishing over HTTP: what arrives, what never leaves, and what is said when it does not work."""

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
from hub.loopback_hub import READ_ONLY_TOKEN, TEAM, TOKEN, USER, Fault, Repository
from huggingface_hub import ModelCard

from hf_efficient import TransformerXLForCausalLM
from hf_efficient.hub import publish

PARTS = {
    *("README.md", "config.json", "generation_config.json", "loss.png", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json"),
}
NAME = f"{USER}/mine"


def shard(folder):
    """Save the folder's weights again, in several files."""
    model = TransformerXLForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="6KB")
    return sorted(path.name for path in folder.glob("model-*.safetensors"))


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what arrives ---------------------------------------------------------------------------------------------


def test_everything_arrives_in_one_commit(hub, folder, capsys):
    before = snapshot(folder)
    publication = publish(folder, "mine")
    files = hub.files(NAME)
    assert files.keys() == PARTS
    same = PARTS - {"README.md"}
    assert {name: files[name] for name in same} == {name: (folder / name).read_bytes() for name in same}
    assert hub.repositories[NAME].titles == ["initial commit", "Upload mine"]
    assert publication.url == f"{hub.endpoint}/{NAME}/commit/{hub.repositories[NAME].branches['main']}"
    assert publication.repo_id == NAME
    assert snapshot(folder) == before
    assert not hub.repositories[NAME].private
    printed = capsys.readouterr().out
    assert f"To {NAME}: 7 files" in printed
    assert re.search(r"model\.safetensors +13\.\d kB", printed)
    assert re.search(r"report\.json +record of the training", printed)


def test_card_that_arrives_is_valid_and_loads_the_model_by_its_new_name(hub, folder):
    publish(folder, "mine")
    card = ModelCard(hub.files(NAME)["README.md"].decode())
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "text-generation")
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "perplexity": 12.1825,
        "bits_per_byte": 1.8034,
    }
    assert f'AutoModelForCausalLM.from_pretrained("{NAME}")' in card.text
    assert f'AutoTokenizer.from_pretrained("{NAME}")' in card.text
    assert "import hf_efficient  #" in card.text


def test_code_goes_along(hub, folder):
    publish(folder, f"{TEAM}/mine", with_code=True)
    files = hub.files(f"{TEAM}/mine")
    code = {name for name in files if name.endswith(".py")}
    assert files.keys() - code == PARTS | {"LICENSE.hf_efficient"}
    assert files["LICENSE.hf_efficient"] == (Path(__file__).parents[2] / "LICENSE").read_bytes()
    assert {"configuration_transformer_xl.py", "modeling_transformer_xl.py", "cache_transformer_xl.py"} <= code
    assert not any("reference" in name or name == "__init__.py" for name in code)
    assert all(b"SPDX-License-Identifier: Apache-2.0" in files[name].splitlines()[0] for name in code)
    auto_map = json.loads(files["config.json"])["auto_map"]
    assert auto_map["AutoConfig"] == "configuration_transformer_xl.TransformerXLConfig"
    assert {reference.split(".")[0] + ".py" for reference in auto_map.values()} <= code
    text = files["README.md"].decode()
    assert f'AutoModelForCausalLM.from_pretrained("{TEAM}/mine", trust_remote_code=True)' in text
    assert "import hf_efficient" not in text


def test_dry_run_sends_nothing_and_shows_everything(hub, folder, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")  # a look needs no account
    publication = publish(folder, "mine", dry_run=True)
    assert (hub.requests, hub.repositories, publication.url) == ([], {}, None)
    assert publication.files.keys() == PARTS
    printed = capsys.readouterr().out
    assert all(name in printed for name in {*PARTS, "report.json"})
    assert "nothing was sent" in printed


def test_private_and_branch_and_message(hub, folder):
    publish(folder, NAME, private=True, revision="trial", commit_message="First try")
    assert hub.repositories[NAME].private
    assert hub.files(NAME) == {}
    assert hub.files(NAME, "trial").keys() == PARTS
    assert hub.repositories[NAME].titles[-1] == "First try"


def test_pull_request_to_the_repository_of_someone_else(hub, folder, capsys):
    hub.repositories["other/mine"] = Repository()
    hub.repositories["other/mine"].commit("main", {"notes.txt": b"theirs"}, "first")
    publication = publish(folder, "other/mine", create_pr=True)
    assert publication.url == f"{hub.endpoint}/other/mine/discussions/1"
    assert hub.files("other/mine").keys() == {"notes.txt"}
    assert hub.files("other/mine", "refs/pr/1").keys() == PARTS | {"notes.txt"}

    (folder / "generation_config.json").write_text("{}")
    capsys.readouterr()
    publish(folder, "other/mine", revision="refs/pr/1")
    assert hub.files("other/mine", "refs/pr/1")["generation_config.json"] == b"{}"
    printed = capsys.readouterr().out
    assert re.search(r"generation_config\.json .*  replaces the one there", printed)
    assert re.search(r"model\.safetensors .*  unchanged", printed)
    assert hub.files("other/mine").keys() == {"notes.txt"}


def test_pull_request_that_cannot_be(hub, folder):
    with pytest.raises(FileNotFoundError, match="'other/mine' is no repository that a pull request"):
        publish(folder, "other/mine", create_pr=True)
    with pytest.raises(ValueError, match="revision='trial' must be left out"):
        publish(folder, "other/mine", create_pr=True, revision="trial", dry_run=True)
    assert hub.repositories == {}


# --- what never leaves ----------------------------------------------------------------------------------------

STRANGERS = [
    *(".env", ".git/config", ".ipynb_checkpoints/x.json", ".hidden.safetensors", "token", "token.txt", "secrets.json"),
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt", "training_args.bin"),
    *("trainer_state.json", "run_settings.json", "recipe.yaml", "report.json", "notes.txt", "train.txt", "chat.jsonl"),
    *("checkpoint-500/model.safetensors", "checkpoint-500/optimizer.pt", "logs/events", "data/train.safetensors"),
    *("unshown.png", "modeling_mine.py", "run.sh", "id_rsa", "mine.log", "config.json.bak", "other.safetensors"),
    *("adapter_model.safetensors", "draft.md", "memory-0.safetensors"),
]


def test_what_is_no_part_of_the_model_never_leaves(hub, folder):
    """Neither the files nor their names: all that the Hub was sent is searched."""
    for name in STRANGERS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"CANARY in {name}")
    publication = publish(folder, "mine")
    assert hub.files(NAME).keys() == PARTS
    sent = b"".join(body for _, _, body in hub.requests) + b"".join(hub.files(NAME).values())
    assert b"CANARY" not in sent
    assert [name for name in STRANGERS if f'"{name}"'.encode() in sent] == []
    left = {name.split("/")[0] for name in STRANGERS}
    assert left == {name.rstrip("/") for name in publication.left_out}


@pytest.mark.parametrize("rules", [".gitignore", ".hubignore", "card"])
def test_what_rules_exclude_never_leaves(hub, folder, rules):
    if rules == "card":
        text = (folder / "README.md").read_text("utf-8")
        (folder / "README.md").write_text(text.replace("license:", "exclude: ['*.png']\nlicense:", 1), "utf-8")
    else:
        (folder / rules).write_text("# pictures\n*.png\n")
    publication = publish(folder, "mine")
    assert hub.files(NAME).keys() == PARTS - {"loss.png"}
    assert "loss.png" in publication.left_out


def test_weights_of_an_earlier_commit_are_not_left_to_be_loaded(hub, folder):
    """from_pretrained takes model.safetensors where there is one: old weights beside new shards would win."""
    publish(folder, "mine")
    shards = shard(folder)
    assert len(shards) > 1
    publication = publish(folder, "mine", exist_ok=True)
    assert publication.removed == ("model.safetensors",)
    assert hub.files(NAME).keys() == PARTS - {"model.safetensors"} | {*shards, "model.safetensors.index.json"}


@pytest.mark.parametrize("tokenizer", [True, False])
def test_what_would_be_loaded_with_the_new_model_is_deleted(hub, folder, tokenizer, capsys):
    """Of a tokenizer only if another one comes; what a person put there beside the model stays."""
    old = {"adapter_config.json", "adapter_model.safetensors", "generation_config.json", "chat_template.jinja"}
    kept = {"LICENSE", "notes.txt", "results/table.csv"}
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit("main", dict.fromkeys({*old, *kept, "tokenizer.json"}, b"{}"), "old")
    gone = {"generation_config.json"} | (set() if tokenizer else {"tokenizer.json", "tokenizer_config.json"})
    for name in gone:
        (folder / name).unlink()
    publication = publish(folder, "mine", exist_ok=True)
    assert set(publication.removed) == old - (set() if tokenizer else {"chat_template.jinja"})
    assert hub.files(NAME).keys() == PARTS - gone | kept | (
        set() if tokenizer else {"tokenizer.json", "chat_template.jinja"}
    )
    assert "adapter_config.json" in capsys.readouterr().out.split("Deleted there:")[1]


def test_flag_in_place_of_a_token(hub, folder):
    with pytest.raises(TypeError, match="token=True is none; leave it out"):
        publish(folder, "mine", token=True)


# --- a connection that breaks -----------------------------------------------------------------------------------


def test_upload_that_breaks_once_goes_on_by_itself(hub, folder):
    hub.faults.append(Fault("PUT", "/_blobs/", cut_after=100, times=1))
    publish(folder, "mine")
    assert hub.files(NAME)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_broken_upload_is_continued_by_the_same_call(hub, folder):
    """What arrived is not sent again; nothing is visible before all is there."""
    shards = shard(folder)
    hashes = {
        name: huggingface_hub.CommitOperationAdd(name, folder / name).upload_info.sha256.hex() for name in shards
    }
    broken = hashes[shards[-1]]
    hub.faults.append(Fault("PUT", f"/_blobs/{broken}", cut_after=100))
    with pytest.raises(ConnectionError, match="Publish again with the same arguments"):
        publish(folder, "mine")
    assert hub.files(NAME) == {}
    arrived = set(hub.blobs)
    assert broken not in arrived

    hub.faults.clear()
    hub.requests.clear()
    publish(folder, "mine")
    sent = {path.rpartition("/")[2] for method, path, _ in hub.requests if method == "PUT"}
    assert sent == set(hashes.values()) - arrived
    assert set(shards) < hub.files(NAME).keys()


@pytest.mark.parametrize("of_answer", [False, True])
def test_commit_whose_request_or_answer_is_lost(hub, folder, of_answer):
    hub.faults.append(Fault("POST", f"/api/models/{NAME}/commit/", cut_after=20, of_answer=of_answer, times=1))
    with pytest.raises(ConnectionError, match="Publish again"):
        publish(folder, "mine")
    publish(folder, "mine")
    assert hub.files(NAME).keys() == PARTS
    assert len(hub.repositories[NAME].titles) == 2


def test_no_connection_at_all(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9 broke"):
        publish(folder, "mine")


def test_offline(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        publish(folder, "mine")


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("hf_wrong", "token is refused .401.*settings/tokens.*HF_TOKEN"),
        (None, "token is missing.*settings/tokens.*HF_TOKEN"),
        (READ_ONLY_TOKEN, "may not write there .403"),
    ],
)
def test_token(hub, folder, monkeypatch, token, words):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match=words) as caught:
        publish(folder, "mine", token=token)
    assert "hf_wrong" not in str(caught.value)  # messages are pasted into reports
    assert hub.repositories == {}
    publish(folder, "mine", token=TOKEN)
    assert hub.files(NAME).keys() == PARTS


def test_name_of_someone_else(hub, folder):
    hub.repositories["other/mine"] = Repository()
    with pytest.raises(
        FileExistsError, match="'other/mine' is taken, and not yours; choose a name under team or tester, .*create_pr"
    ):
        publish(folder, "other/mine", exist_ok=True)
    with pytest.raises(PermissionError, match="'other/new': the token may not write"):
        publish(folder, "other/new")


def test_name_taken_by_a_model_of_ours(hub, folder):
    publish(folder, "mine")
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="exist_ok=True"):
        publish(folder, "mine")
    assert len(hub.repositories[NAME].titles) == 2
    publish(folder, "mine", exist_ok=True)
    assert hub.files(NAME)["generation_config.json"] == b"{}"


def test_name_taken_at_the_last_moment(hub, folder):
    hub.faults.append(Fault("POST", "/api/repos/create", status=409, message="You already created this model repo"))
    with pytest.raises(FileExistsError, match="409"):
        publish(folder, "mine")


@pytest.mark.parametrize("token", ["", "hf_x\n", "Bearer hf_x", "hf_ü"])
def test_token_that_cannot_be_one(hub, folder, token):
    """Before it gets into a header, whose error would show it."""
    with pytest.raises(ValueError, match="token is empty, or has") as caught:
        publish(folder, "mine", token=token)
    assert "hf_" not in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize("private", [True, False])
def test_repository_that_is_not_as_private_says(hub, folder, private):
    hub.repositories[NAME] = Repository(private=not private)
    with pytest.raises(ValueError, match=f"private={private} cannot be had"):
        publish(folder, NAME, private=private)
    publish(folder, NAME, private=not private)
    assert hub.files(NAME).keys() == PARTS


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("PUT", "/_blobs/", 507, "Insufficient Storage"),
        ("PUT", "/_blobs/", 413, "Payload Too Large"),
        ("POST", f"/{NAME}.git/info/lfs", 403, "You have exceeded your private storage quota"),
        ("POST", f"/api/models/{NAME}/commit/", 507, "Insufficient Storage"),
    ],
)
def test_no_room(hub, folder, method, path, status, message):
    hub.faults.append(Fault(method, path, status=status, message=message))
    with pytest.raises(
        OSError, match=rf"'mine': the Hub has no room for these 18\.\d kB \({status}: .*settings/storage"
    ):
        publish(folder, "mine")
    assert hub.files(NAME) == {}
    hub.faults.clear()
    publish(folder, "mine")
    assert hub.files(NAME).keys() == PARTS


def test_hub_that_fails(hub, folder):
    hub.faults.append(Fault("POST", f"/{NAME}.git/info/lfs", status=500, message="internal error"))
    with pytest.raises(OSError, match="refused .500"):
        publish(folder, "mine")


def test_hub_that_leaves_a_file_out(hub, folder):
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit("main", {".gitignore": b"loss.png\n"}, "rules")
    with pytest.raises(ValueError, match=r"loss.png did not arrive .* \.gitignore in that repository"):
        publish(folder, NAME, exist_ok=True)


def test_metadata_that_only_the_hub_knows_to_be_wrong(hub, folder):
    text = (folder / "README.md").read_text("utf-8")
    (folder / "README.md").write_text(text.replace("text-generation", "no-such-task", 1), "utf-8")
    with pytest.raises(ValueError, match="pipeline_tag"):
        publish(folder, "mine")
    assert hub.files(NAME) == {}


@pytest.mark.parametrize("repo_id", ["a/b/c", "-mine", "mine--yours", "my model", ""])
def test_illegal_name(hub, folder, repo_id):
    with pytest.raises(ValueError, match=f"repo_id={repo_id!r}.*owner/name"):
        publish(folder, repo_id, dry_run=True)
    assert hub.requests == []
