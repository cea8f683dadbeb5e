"""`hf-efficient publish`: a model's folder becomes a repository on the Hub."""

from dataclasses import dataclass, field

from ..hub import publish
from .arguments import Command, Invocation
from .errors import CommandError


@dataclass
class PublishOptions:
    """Flags of `hf-efficient publish`."""

    folder: str | None = field(default=None, metadata={"help": "The model: a folder that `hf-efficient train` wrote"})
    repo_id: str | None = field(
        default=None, metadata={"help": "Its name on the Hub: name, under your account, or owner/name"}
    )
    with_code: bool = field(
        default=False,
        metadata={"help": "Also upload the architecture's code, for people who do not install hf_efficient"},
    )
    dry_run: bool = field(default=False, metadata={"help": "Check, and show what would go; send nothing"})
    private: bool | None = field(
        default=None,
        metadata={"help": "Make the new repository private, or not", "nargs": "?", "const": True},
    )
    exist_ok: bool = field(default=False, metadata={"help": "Add a commit to a repository that holds files already"})
    create_pr: bool = field(
        default=False, metadata={"help": "Propose the commit as a pull request, also to a repository of someone else"}
    )
    revision: str | None = field(
        default=None, metadata={"help": "Branch, made if it is missing, or a pull request such as refs/pr/1"}
    )
    commit_message: str | None = field(default=None, metadata={"help": "Title of the commit"})


def run(invocation: Invocation) -> None:
    """Publish, and print what goes, what stays, and where it is."""
    (options,) = invocation.options
    if options.folder is None or options.repo_id is None:
        raise CommandError(f"folder or repo_id is missing; write `{COMMAND.usage}`.")
    publication = publish(
        options.folder,
        options.repo_id,
        with_code=options.with_code,
        dry_run=options.dry_run,
        private=options.private,
        exist_ok=options.exist_ok,
        create_pr=options.create_pr,
        revision=options.revision,
        commit_message=options.commit_message,
    )
    if publication.url is not None:
        print(f"Published: {publication.url}")


COMMAND = Command(
    name="publish",
    description=(
        "Upload a model to the Hugging Face Hub: weights, configuration, tokenizer, and the card with its results. "
        "It shows what goes and what stays. Checkpoints, optimiser states, hidden files and what .gitignore or "
        ".hubignore name never go. The token is the one in HF_TOKEN or of `hf auth login`."
    ),
    usage="hf-efficient publish FOLDER REPO_ID [--flag value ...]",
    examples="""\
  hf-efficient publish runs/mine my-model --dry_run
  hf-efficient publish runs/mine my-model --private
  hf-efficient publish runs/mine my-team/my-model --with_code
  hf-efficient publish runs/mine my-model --exist_ok --commit_message "Longer training\"""",
    options=(PublishOptions,),
    positionals=("folder", "repo_id"),
    run=run,
)
