"""The surrogate file: what is read is what was written, or an error says why not."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file

from hf_unlearnable import Surrogate, create_network
from hf_unlearnable.networks import placed
from hf_unlearnable.surrogate import SCHEMA


@pytest.fixture
def surrogate() -> Surrogate:
    network = create_network("tiny", num_classes=3, image_size=16, seed=5)
    return Surrogate(
        method="example",
        settings={"epsilon": 8 / 255, "milestones": [0.5]},
        classes=("a", "b", "c"),
        image_size=(16, 16),
        networks={"network": {"backbone": "cifar_tiny", "num_classes": 3, "mean": [0.0] * 3, "std": [1.0] * 3}},
        tensors={"extra": torch.arange(6.0), **{f"network.{k}": v for k, v in network.state_dict().items()}},
        provenance={"seed": 5},
    )


def rewrite(path: Path, tensors: dict[str, torch.Tensor] | None = None, **said: object) -> None:
    """The file with something changed, its digest left as it is."""
    with safe_open(path, "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = json.loads(file.metadata()["hf_unlearnable_surrogate"])
    save_file({**kept, **(tensors or {})}, path, metadata={"hf_unlearnable_surrogate": json.dumps({**text, **said})})


def test_what_is_loaded_is_what_was_saved(surrogate: Surrogate, tmp_path: Path) -> None:
    path = surrogate.save(tmp_path / "inner" / "s.safetensors")
    found = Surrogate.load(path)
    assert found == surrogate
    assert hash(found) == hash(surrogate)
    assert found.secret() == surrogate.secret()
    assert found.settings == surrogate.settings
    assert found.classes == surrogate.classes
    assert all(torch.equal(found.tensors[name], surrogate.tensors[name]) for name in surrogate.tensors)
    assert [p.name for p in path.parent.iterdir()] == ["s.safetensors"]


def test_its_network_is_the_one_that_was_kept(surrogate: Surrogate) -> None:
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    network = surrogate.network()
    assert not network.training
    assert not any(weight.requires_grad for weight in network.parameters())
    expected = create_network("tiny", num_classes=3, image_size=16, seed=5).eval()
    assert torch.equal(network(x), placed(expected, "cpu")(x))
    assert surrogate.network() is network
    with pytest.raises(KeyError):
        surrogate.network("other")


def test_the_digest_sees_tensors_and_words(surrogate: Surrogate) -> None:
    others = [
        replace(surrogate, tensors={**surrogate.tensors, "extra": torch.arange(6.0) + 1}),
        replace(surrogate, settings={}),
        replace(surrogate, classes=("a", "c", "b")),
        replace(surrogate, method="other"),
        replace(surrogate, image_size=(16, 17)),
        replace(surrogate, provenance={"seed": 6}),
    ]
    assert len({surrogate.digest, *(other.digest for other in others)}) == 1 + len(others)
    assert surrogate.secret() != others[0].secret()
    assert surrogate.secret() == others[1].secret()
    assert surrogate.secret().hex() not in surrogate.digest + repr(surrogate)


def test_with_a_file_it_pickles_small(surrogate: Surrogate, tmp_path: Path) -> None:
    surrogate.network()
    whole = pickle.dumps(surrogate)
    assert pickle.loads(whole) == surrogate  # noqa: S301
    found = Surrogate.load(surrogate.save(tmp_path / "s.safetensors"))
    assert len(pickle.dumps(surrogate)) < 1000
    found.network()
    small = pickle.dumps(found)
    assert len(small) < 1000 < len(whole)
    again = pickle.loads(small)  # noqa: S301
    assert again == found
    assert torch.equal(again.tensors["extra"], found.tensors["extra"])


def test_a_file_that_changed_meanwhile_is_noticed_in_workers(surrogate: Surrogate, tmp_path: Path) -> None:
    path = surrogate.save(tmp_path / "s.safetensors")
    small = pickle.dumps(Surrogate.load(path))
    replace(surrogate, settings={}).save(path)
    with pytest.raises(ValueError, match="another surrogate was written there meanwhile"):
        pickle.loads(small)  # noqa: S301


def test_altered_tensors_and_words_are_errors(surrogate: Surrogate, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    changes = [
        {"tensors": {"extra": torch.arange(6.0).flip(0)}},
        {"settings": {"epsilon": 1.0}},
        {"classes": ["b", "a", "c"]},
        {"provenance": {}},
        {"digest": "0" * 64},
    ]
    for change in changes:
        surrogate.save(path)
        rewrite(path, **change)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="was altered after it was made"):
            Surrogate.load(path)


def test_damaged_and_other_files_are_errors(surrogate: Surrogate, tmp_path: Path) -> None:
    path = surrogate.save(tmp_path / "s.safetensors")
    whole = path.read_bytes()
    for damaged in (whole[:-10], whole[: len(whole) // 2], b"", b"something else entirely"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="expected a safetensors file, got a damaged or another one"):
            Surrogate.load(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not a surrogate of this library"):
        Surrogate.load(path)
    surrogate.save(path)
    rewrite(path, schema="one")
    with pytest.raises(ValueError, match="description of this surrogate is damaged"):
        Surrogate.load(path)


def test_a_newer_schema_says_to_update(surrogate: Surrogate, tmp_path: Path) -> None:
    path = surrogate.save(tmp_path / "s.safetensors")
    rewrite(path, schema=SCHEMA + 1)
    with pytest.raises(ValueError, match=f"schema {SCHEMA} or older, got {SCHEMA + 1}: update hf_unlearnable"):
        Surrogate.load(path)


def test_folders_and_missing_files(surrogate: Surrogate, tmp_path: Path) -> None:
    surrogate.save(tmp_path / "surrogate.safetensors")
    assert Surrogate.load(tmp_path) == surrogate
    assert Surrogate.load(str(tmp_path)) == surrogate
    for missing in (tmp_path / "other.safetensors", "no/such.safetensors", "one two", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="expected a surrogate file"):
            Surrogate.load(missing)
    with pytest.raises(ValueError, match=r"expected the name of a \.safetensors file"):
        surrogate.save(tmp_path / "s.pt")


def test_a_hub_id_is_fetched(surrogate: Surrogate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = surrogate.save(tmp_path / "fetched.safetensors"), []

    def download(repo: str, name: str, *, revision: str | None = None) -> str:
        asked.append((repo, name, revision))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert Surrogate.load("someone/noise", revision="v1") == surrogate
    assert asked == [("someone/noise", "surrogate.safetensors", "v1")]

    def missing(repo: str, name: str, *, revision: str | None = None) -> str:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", missing)
    with pytest.raises(FileNotFoundError, match="someone/noise: neither a file here nor a model on the Hub"):
        Surrogate.load("someone/noise")
