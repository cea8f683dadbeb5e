"""The API reference: a page for each room of the package and for each architecture, written from the docstrings."""

import ast
from collections.abc import Iterator
from pathlib import Path

from site_links import PACKAGE, ROOT

# Rooms of the package with public names, and how the reference calls them. Those that are not there are left out.
ROOMS = {
    "ops": "Operations",
    "data": "Data",
    "training": "Training",
    "generation": "Generation",
    "conversion": "Conversion",
    "hub": "Hub",
    "plots": "Pictures",
}
ARCHITECTURES = {
    "transformer_xl": "Transformer-XL",
    "reformer": "Reformer",
    "universal_transformer": "Universal Transformer",
    "evolved_transformer": "Evolved Transformer",
    "act_rnn": "RNN with ACT",
}
# Within an architecture: what a user touches first, then the operations, then the rest by name.
FIRST = ("configuration_", "modeling_", "language_models_", "encoder_decoder_", "heads_", "cache_")


def rooms() -> dict[str, str]:
    """The rooms that there are, with their titles."""
    places = {name: ROOT / PACKAGE / name for name in ROOMS}
    return {name: ROOMS[name] for name, path in places.items() if path.is_dir() or path.with_suffix(".py").is_file()}


def architectures() -> dict[str, str]:
    """The architectures that there are, with their titles."""
    folders = [path.parent.name for path in (ROOT / PACKAGE / "models").glob("*/__init__.py")]
    return {name: ARCHITECTURES[name] for name in ARCHITECTURES if name in folders}


def api_nav() -> list[dict[str, str]]:
    """The entries of the navigation."""
    pages = {"Public names": "index", **{title: name for name, title in (architectures() | rooms()).items()}}
    return [{title: f"api/{name}.md"} for title, name in pages.items()]


def api_pages() -> dict[str, str]:
    """The pages, by their places on the site."""
    pages = {"api/index.md": index_page()}
    pages |= {f"api/{name}.md": architecture_page(name, title) for name, title in architectures().items()}
    return pages | {f"api/{name}.md": room_page(name, title) for name, title in rooms().items()}


def index_page() -> str:
    """All names that `hf_efficient` and its rooms export, each with the first line of its docstring."""
    parts = ["# Public names", f"`import {PACKAGE}` registers the models with transformers' Auto classes."]
    for module in (PACKAGE, *(f"{PACKAGE}.{name}" for name in rooms() if name != "plots")):
        rows = [f"| [`{name}`][{path}] | {summary} |" for name, path, summary in exported(module)]
        parts.append("\n".join([f"## {module}", "", "| Name | What it is |", "| --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def room_page(name: str, title: str) -> str:
    """One room: its own docstring, then a section for each public name."""
    module = f"{PACKAGE}.{name}"
    if name == "plots":
        return f"# {title}\n\n::: {module}\n"
    paths = dict.fromkeys(path for _, path, _ in exported(module) if path.startswith(f"{module}."))
    intro = (
        f"# {title}\n\n::: {module}\n    options: {{members: false, show_root_heading: false, show_source: false}}\n"
    )
    if name == "ops":
        rows = [f"| [`{key}`][{path}] | {summary} |" for key, path, summary in exported(module)]
        return "\n".join([intro, "| Name | What it is |", "| --- | --- |", *rows]) + "\n"
    return "\n\n".join([intro, f"All of it is imported from `{module}`.", *(f"::: {path}" for path in paths)]) + "\n"


def architecture_page(name: str, title: str) -> str:
    """One architecture: every file of its folder but the registration."""
    folder = ROOT / PACKAGE / "models" / name
    stems = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    stems.sort(key=lambda stem: next((i for i, start in enumerate(FIRST) if stem.startswith(start)), len(FIRST)))
    return f"# {title}\n\n" + "\n\n".join(f"::: {PACKAGE}.models.{name}.{stem}" for stem in stems) + "\n"


def exported(module: str) -> list[tuple[str, str, str]]:
    """(name, dotted path of the definition, first line of the docstring) of all that a module exports."""
    tree = parse(module)
    origins = {
        alias.asname or alias.name: (origin(module, node), alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    return [(name, *definition(*origins.get(name, (module, name)))) for name in public_names(tree)]


def public_names(tree: ast.Module) -> list[str]:
    """What `__all__` holds."""
    return next((ast.literal_eval(value) for name, value in assignments(tree) if name == "__all__"), [])


def assignments(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Name and value of every plain assignment of a module."""
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        yield from ((target.id, node.value) for target in targets if isinstance(target, ast.Name))


def definition(module: str, name: str) -> tuple[str, str]:
    """Dotted path of the class, function or constant, and the first line said about it; other names are followed."""
    tree = parse(module)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return f"{module}.{name}", ((ast.get_docstring(node) or "").splitlines() or [""])[0]
        aliases = node.names if isinstance(node, ast.ImportFrom) and node.level else []
        for alias in aliases:
            if name == (alias.asname or alias.name):
                return definition(origin(module, node), alias.name)
    value = dict(assignments(tree))[name]
    if isinstance(value, ast.Name):
        return definition(module, value.id)
    return f"{module}.{name}", comment_at(module, value.lineno)


def comment_at(module: str, line: int) -> str:
    """The comment behind a line or right above it, as one line."""
    lines = file_of(module).read_text("utf-8").splitlines()
    if "  # " in lines[line - 1]:
        return lines[line - 1].split("  # ", 1)[1]
    words = []
    while line >= 2 and lines[line - 2].startswith("# "):
        words.insert(0, lines[line - 2].removeprefix("# "))
        line -= 1
    return " ".join(words)


def origin(module: str, node: ast.ImportFrom) -> str:
    """The module that a relative import in `module` reads from."""
    parts = module.split(".")
    if file_of(module).name != "__init__.py":
        parts = parts[:-1]
    return ".".join([*parts[: len(parts) + 1 - node.level], node.module or ""]).rstrip(".")


def parse(module: str) -> ast.Module:
    """The syntax tree of a module of the package."""
    return ast.parse(file_of(module).read_text("utf-8"))


def file_of(module: str) -> Path:
    """Where a module of the package stands."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
