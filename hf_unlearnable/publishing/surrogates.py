"""Publish a surrogate as a model repository, with its own card."""

from pathlib import Path

from huggingface_hub import ModelCard

from hf_unlearnable import card
from hf_unlearnable.gate.secret_scan import files_hold_secret
from hf_unlearnable.keys import Key
from hf_unlearnable.publishing import pages
from hf_unlearnable.publishing.hub import HubError, Repository
from hf_unlearnable.surrogate import FILE, Surrogate

README = "README.md"
PART = "surrogate"


def publish_surrogate(
    path: str | Path,
    repository: Repository,
    *,
    class_name: str,
    private: bool | None = None,
    key: Key | None = None,
    allow_guessable_key: bool = False,
    license: str | None = None,
    title: str | None = None,
    dry_run: bool = False,
) -> str:
    """Push a surrogate's file and its card, in one commit; the same call again changes nothing.

    Args:
        class_name: the poison's class, for the card's code.
        private: only for a new repository.
        key: the secret that it was trained under, to make sure that the file does not hold it.
        allow_guessable_key: whoever has a surrogate can recompute what was drawn from it; a public one needs this.

    Returns: the card's part of README.md.

    Raises:
        FileNotFoundError, ValueError: no such file, or a damaged one; it holds the key.
        HubError: a public repository without `allow_guessable_key`; anything that the Hub refuses.
    """
    surrogate = Surrogate.load(path)
    if key is not None and (places := files_hold_secret({FILE: Path(path)}, key)):
        raise ValueError(f"the key is in {', '.join(places)}: nothing was sent")
    if not private and not allow_guessable_key:
        raise HubError(
            "whoever has a surrogate and the clean pictures can recompute what was made with it: publish it --private, "
            "or with --allow-guessable-key"
        )
    page = card.surrogate_page(
        surrogate, repo_id=repository.repo_id, class_name=class_name, title=title, guessable=not private
    )
    if dry_run:
        return page
    repository.create(private=private)
    parent = repository.commit_id()
    readme = repository.text(README)
    new = pages.put(readme, PART, page, card.surrogate_front_matter(surrogate, license=license))
    try:
        ModelCard(new).validate(repo_type="model")
    except ValueError as error:
        raise HubError(f"the Hub refuses the card's front matter: {error}") from error
    repository.commit(f"{surrogate.method} surrogate", {README: new, FILE: Path(path)}, parent=parent)
    return page
