"""What `mkdocs build` does to make the repository's own pages its site; mkdocs.yml names this file.

A page keeps its path, so that its links hold here as they do there. A link to a Python file or package leads
to the reference, which holds every module; a link to any other file of the repository is left out.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import tempfile
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGES = {"dfzsl": "dfzsl", "trainers": "dfzsl.trainers", "datasets": "dfzsl.datasets"}
ELSEWHERE = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md")
ELSEWHERE += ("compat/dassl/README.md",)
LINK = re.compile(r"\[([^]]+)\]\((?![a-z]+:|#)([^)#]+)(#[^)]*)?\)")


def modules() -> dict[str, list[str]]:
    """{package: its public modules}"""
    found: dict[str, list[str]] = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if not any(part.startswith("_") for part in parts):
                found.setdefault(".".join([package, *parts[:-1]]), []).append(".".join([package, *parts]))
    return found


def as_installed(folder: Path) -> Path:
    """A copy of the packages as they lie when installed, for a reader that imports nothing."""
    for source, package in PACKAGES.items():
        shutil.copytree(
            ROOT / source, folder / package.replace(".", "/"), ignore=shutil.ignore_patterns("*.s*")
        )
    return folder


@event_priority(100)  # before mkdocstrings takes its settings
def on_config(config):
    tree = as_installed(Path(tempfile.mkdtemp()))
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(tree)]
    config.nav.append({"Reference": [{package: f"reference/{package}.md"} for package in modules()]})
    return config


def on_files(files, config):
    theirs = [file for file in files if file.src_dir != config.docs_dir]  # the theme's
    paths = [
        f"docs/{file.src_uri}"
        for file in files
        if file not in theirs and not file.src_uri.endswith((".py", ".ipynb", ".sh"))
    ]
    paths += ELSEWHERE
    mine = [File(path, str(ROOT), config.site_dir, config.use_directory_urls) for path in paths]
    for package, names in modules().items():
        content = "\n\n".join([f"# {package}", *(f"::: {name}" for name in names)])
        mine.append(File.generated(config, f"reference/{package}.md", content=content))
    return Files([*theirs, *mine])


def on_page_markdown(markdown, page, config, files):
    here = posixpath.dirname(page.file.src_uri)
    known = {name: package for package, names in modules().items() for name in [package, *names]}

    def lead(match: re.Match) -> str:
        label, path, anchor = match[1], match[2], match[3] or ""
        target = posixpath.normpath(posixpath.join(here, path))
        if files.get_file_from_path(target):
            return match[0]
        if files.get_file_from_path(f"{target}/README.md"):
            return f"[{label}]({path}/README.md{anchor})"
        folder, _, rest = target.removesuffix(".py").partition("/")
        name = ".".join(filter(None, [PACKAGES.get(folder), *rest.split("/")]))
        if name in known:
            entry = "" if name == known[name] else f"#{name}"
            return f"[{label}]({posixpath.relpath(f'reference/{known[name]}.md', here or '.')}{entry})"
        return label if (ROOT / target).exists() else match[0]  # what is nowhere is for mkdocs to complain of

    return LINK.sub(lead, markdown)
