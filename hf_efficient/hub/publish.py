"""Share a model on the Hub: look at everything first, send it in one commit, and say what went wrong."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from hashlib import sha1
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .card_checks import CARD
from .contents import TOKENIZER, TOKENIZER_CONFIG, Contents, Upload, collect_contents
from .model_card import adapt_usage

# What may stand in a repository that counts as empty: the Hub puts it there itself.
FROM_THE_HUB = {".gitattributes"}
# What would be loaded in place of the new model, or with it, if an earlier commit has left it there.
STALE = (
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    *("adapter_config.json", "adapter_model.safetensors", "generation_config.json"),
)
OUT_OF_SPACE = {413, 507}
SPACE_WORDS = ("quota", "storage limit", "storage space")


@dataclass(frozen=True)
class Publication:
    """What `publish` sends, or has sent; `print` shows it as a list.

    repo_id: where it goes. files: what goes, by name. left_out: what of the folder stays, with the reason.
    hints: what could be better. removed: what of an earlier commit is deleted, because it would be loaded too.
    url: of the commit or pull request, None as long as nothing was sent.
    """

    repo_id: str
    files: dict[str, Upload]
    left_out: dict[str, str]
    hints: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    url: str | None = None

    @property
    def size(self) -> int:
        """Of all files together, in bytes."""
        return sum(upload.size for upload in self.files.values())

    def __str__(self) -> str:
        width = max(map(len, [*self.files, *self.left_out, *self.removed]))
        lines = [f"To {self.repo_id}: {len(self.files)} files, {in_words(self.size)}"]
        for name, upload in self.files.items():
            lines.append(f"  {name:<{width}}  {in_words(upload.size):>8}  {upload.note}".rstrip())
        if self.removed:
            lines.append("Deleted there:")
            lines += [f"  {name:<{width}}  of an earlier commit; it would be loaded" for name in self.removed]
        if self.left_out:
            lines.append("Stays here:")
            lines += [f"  {name:<{width}}  {reason}" for name, reason in self.left_out.items()]
        if self.hints:
            lines.append("Worth a look:")
            lines += [f"  {hint}" for hint in self.hints]
        return "\n".join(lines)


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    with_code: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    exist_ok: bool = False,
    create_pr: bool = False,
    dry_run: bool = False,
    token: str | None = None,
) -> Publication:
    """Upload a model's folder to the Hub, in one commit, after printing what goes and what stays.

    What goes: safetensors weights, configurations, tokenizer, the model card with its results and pictures. What
    never goes: checkpoints, states of optimiser and random generators, hidden files such as `.env`, what `.gitignore`,
    `.hubignore` or the card's `exclude` name, and anything that is no part of a model. Nothing of the folder is
    changed; in the card that goes, the program under "How to use it" has the model's new name.

    folder: of `hf-efficient train`, or of `save_pretrained` with a card added.
    repo_id: "name", which is put under your account, or "owner/name".
    with_code: also upload the architecture's code, so that every Auto class loads the model with
        `trust_remote_code=True` where hf_efficient is not installed.
    private: whether a new repository is private; None leaves it to the account's setting.
    revision: the branch, made if it is missing, or a pull request, such as "refs/pr/1"; None means main.
    exist_ok: add a commit to a repository of yours that holds other files already. One that is empty, as an
        interrupted attempt leaves it, needs no permission.
    create_pr: propose the commit as a pull request on the Hub; the repository may be another's.
    dry_run: check and print all that can be checked without the Hub; nothing is sent, not even a question.
    token: of the account; None takes the one in HF_TOKEN or of `hf auth login`.

    Returns what was sent, with the URL of its commit.

    An interrupted upload is continued by the same call: files that arrived are not sent again, and none is visible
    before all are there.

    Raises FileNotFoundError or ValueError for a folder that is not fit to be published (see `collect_contents`) or an
    argument that is wrong; PermissionError if the token is missing, wrong, or may not write there; FileExistsError if
    the name is taken; ConnectionError if the connection breaks and repeated attempts fail; OSError if the Hub has no
    room, or refuses for another reason. Each says what to do.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    check_token(token)
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"create_pr=True proposes to main, so revision={revision!r} must be left out.")
    contents = collect_contents(folder, with_code)
    rename_in_card(contents, repo_id, with_code)
    publication = Publication(repo_id, dict(sorted(contents.files.items())), contents.left_out, contents.hints)
    if dry_run:
        print(f"{publication}\nDry run: nothing was sent, and the Hub was not asked.")
        return publication

    api = HfApi(token=token, library_name="hf_efficient")
    with explained(repo_id, api, publication.size):
        account = api.whoami()  # tries the token, and says under which name a bare one stands
        repo_id = repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"
        rename_in_card(contents, repo_id, with_code)
        publication = replace(publication, repo_id=repo_id, files=dict(sorted(contents.files.items())))
        to_pull_request = revision is not None and revision.startswith("refs/")
        proposes = create_pr or to_pull_request
        prepare_repository(api, repo_id, None if proposes else owners(account), private)
        there = files_there(api, repo_id, revision)
        if there and not (exist_ok or proposes):
            check_same(there, publication)
        if revision is not None and not proposes:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        publication = compare(publication, there)
        print(publication)
        message = commit_message or f"Upload {folder.resolve().name}"
        commit = send(api, publication, message, revision=revision, create_pr=create_pr)
        check_arrival(api, publication, commit)
    return replace(publication, url=commit.pr_url if create_pr else commit.commit_url)


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError if the Hub allows no such name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"repo_id={repo_id!r} is no name for the Hub: {error} Write 'name' or 'owner/name'."
        ) from error


def check_token(token: str | None) -> None:
    """Raises ValueError, without the token in it, if that cannot be one: such as the whole line of a file."""
    if isinstance(token, bool):
        raise TypeError(f"token={token} is none; leave it out to take the one in HF_TOKEN or of `hf auth login`.")
    if token is not None and (not token or not token.isascii() or not token.isprintable() or " " in token):
        raise ValueError("token is empty, or has white space or other signs that no token has; copy it again.")


def rename_in_card(contents: Contents, repo_id: str, with_code: bool) -> None:
    """Let the card's program load the model by its name on the Hub."""
    text = contents.files[CARD].text()
    adapted = adapt_usage(text, repo_id, with_code)
    if adapted != text:
        contents.add(CARD, adapted.encode(), "with the name on the Hub")


def owners(account: dict[str, Any]) -> set[str]:
    """Under which names an account may publish."""
    return {account["name"], *(organisation["name"] for organisation in account.get("orgs", []))}


def prepare_repository(api: HfApi, repo_id: str, names: set[str] | None, private: bool | None) -> None:
    """Make the repository if it is missing.

    names: the owners under whose names the account may publish; None for a pull request, which may go to anyone.

    Raises FileExistsError if the repository is another's; FileNotFoundError if a pull request has none to go to;
    ValueError if it is there and not as `private` says.
    """
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        if names is None:
            raise FileNotFoundError(
                f"repo_id={repo_id!r} is no repository that a pull request could go to; publish without create_pr."
            ) from None
        api.create_repo(repo_id, private=private, exist_ok=False)
        return
    if names is not None and repo_id.partition("/")[0] not in names:
        raise FileExistsError(
            f"repo_id={repo_id!r} is taken, and not yours; choose a name under {' or '.join(sorted(names))}, or pass "
            "create_pr=True (--create_pr) to propose the model to its owner."
        )
    if private is not None and info.private != private:
        raise ValueError(
            f"private={private} cannot be had: {repo_id} is there already and is {'' if info.private else 'not '}"
            "private; leave the argument out, or change the repository in its settings on the Hub."
        )


def files_there(api: HfApi, repo_id: str, revision: str | None) -> dict[str, RepoFile]:
    """The files of a branch, by name; of main, from which it will start, if there is no such branch."""
    try:
        entries = list(api.list_repo_tree(repo_id, recursive=True, revision=revision))
    except RevisionNotFoundError:
        entries = list(api.list_repo_tree(repo_id, recursive=True))
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    return {file.path: file for file in files if file.path not in FROM_THE_HUB}


def check_same(there: dict[str, RepoFile], publication: Publication) -> None:
    """Raises FileExistsError if the repository holds other files than those that are to go there.

    It holds the same where the last attempt came to its end, but the answer was lost on the way.
    """
    for name, upload in publication.files.items():
        if name not in there or not is_same(there[name], upload):
            raise FileExistsError(
                f"repo_id={publication.repo_id!r} is taken: you have a model of that name. Choose another, or pass "
                "exist_ok=True (--exist_ok) to add a commit to it."
            )


def is_same(entry: RepoFile, upload: Upload) -> bool:
    """Whether a file on the Hub has the content of ours: it tells git's hash of small ones, SHA-256 of large ones."""
    if entry.size != upload.size:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == CommitOperationAdd(upload.name, upload.content).upload_info.sha256.hex()
    content = upload.read()
    return entry.blob_id == sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


def compare(publication: Publication, there: dict[str, RepoFile]) -> Publication:
    """The publication with what it changes in the repository: files replaced, and those that would be left over."""
    patterns = STALE + (TOKENIZER if TOKENIZER_CONFIG in publication.files else ())
    stale = {name for name in there if any(fnmatchcase(name, pattern) for pattern in patterns)}
    files = {
        name: with_note(upload, "unchanged" if is_same(there[name], upload) else "replaces the one there")
        if name in there
        else upload
        for name, upload in publication.files.items()
    }
    return replace(publication, files=files, removed=tuple(sorted(stale - files.keys())))


def with_note(upload: Upload, note: str) -> Upload:
    """The same file, with one more note on it."""
    return replace(upload, note=", ".join(filter(None, [upload.note, note])))


def send(api: HfApi, publication: Publication, message: str, **where: Any) -> CommitInfo:
    """Upload all files, then make them visible by one commit; where: branch or pull request."""
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(upload.name, upload.content) for upload in publication.files.values()
    ]
    operations += [CommitOperationDelete(name) for name in publication.removed]
    return api.create_commit(publication.repo_id, operations, commit_message=message, **where)


def check_arrival(api: HfApi, publication: Publication, commit: CommitInfo) -> None:
    """Raises ValueError if files are missing in the commit: the Hub leaves out what its own .gitignore names."""
    missing = sorted(publication.files.keys() - set(api.list_repo_files(publication.repo_id, revision=commit.oid)))
    if missing:
        raise ValueError(
            f"{', '.join(missing)} did not arrive in {publication.repo_id}: the .gitignore in that repository names "
            "them. Take those lines out of it and publish again."
        )


@contextmanager
def explained(repo_id: str, api: HfApi, size: int) -> Iterator[None]:
    """Within the block, what the Hub and the line to it refuse becomes an error that says what to do."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PermissionError(
            f"token is missing; make one with write access at {api.endpoint}/settings/tokens and pass it as token=, "
            "in HF_TOKEN, or with `hf auth login`."
        ) from error
    except OfflineModeIsEnabled as error:
        raise ConnectionError("HF_HUB_OFFLINE=1 forbids the upload; unset it, or make a dry run.") from error
    except (HTTPError, RuntimeError) as error:  # huggingface_hub wraps what happens in its threads
        raise explain(root_cause(error), repo_id, api, size) from error


def root_cause(error: BaseException) -> BaseException:
    """The error of HTTP that another was raised from, or else the first one of all."""
    while not isinstance(error, HTTPError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def explain(error: BaseException, repo_id: str, api: HfApi, size: int) -> OSError:
    """The error to raise in place of one of huggingface_hub."""
    if not isinstance(error, HfHubHTTPError):
        what = f"the connection to {api.endpoint} broke" if isinstance(error, HTTPError) else "the upload failed"
        return ConnectionError(
            f"repo_id={repo_id!r}: {what} ({type(error).__name__}: {error}). Publish again with the "
            "same arguments: it goes on where it stopped, and files that arrived are not sent a second time."
        )
    status, words = error.response.status_code, " ".join(str(error.server_message or error).split())
    if status in OUT_OF_SPACE or (status == 403 and any(word in words.lower() for word in SPACE_WORDS)):
        return OSError(
            f"repo_id={repo_id!r}: the Hub has no room for these {in_words(size)} ({status}: {words}). Free some or "
            f"ask for more at {api.endpoint}/settings/storage, then publish again: files that arrived are not sent a "
            "second time."
        )
    if status == 401:
        return PermissionError(
            f"token is refused ({status}: {words}); make one with write access at {api.endpoint}/settings/tokens and "
            "pass it as token=, in HF_TOKEN, or with `hf auth login`."
        )
    if status == 403:
        return PermissionError(
            f"repo_id={repo_id!r}: the token may not write there ({status}: {words}); take a name under your own "
            f"account, or a token with write access from {api.endpoint}/settings/tokens."
        )
    if status in (409, 412):
        return FileExistsError(
            f"repo_id={repo_id!r} was made or changed by someone else meanwhile ({status}: {words}); publish again."
        )
    return OSError(f"repo_id={repo_id!r}: the Hub refused ({status}: {words}); publish again when that is mended.")


def in_words(size: int) -> str:
    """A number of bytes for people.

    Example:

        >>> in_words(999), in_words(1_500_000)
        ('999 B', '1.5 MB')
    """
    if size < 1000:
        return f"{size} B"
    shown: float = size
    for unit in ("kB", "MB", "GB"):
        shown /= 1000
        if shown < 1000 or unit == "GB":
            break
    return f"{shown:.1f} {unit}"
