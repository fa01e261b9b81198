"""What the real clients do when a Hub refuses or fails: publishing builds on it."""

from typing import Any

import httpx2
import pytest
from datasets import load_dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from tests.publishing.conftest import ID, numbers, shards
from tests.publishing.local_hub import Hub

RETRIES = [1, 2, 4, 8, 8]


def error_of(act: Any) -> tuple[type[BaseException], int]:
    with pytest.raises(HfHubHTTPError) as caught:
        act()
    return caught.type, caught.value.response.status_code


@pytest.mark.parametrize(
    ("token", "new", "existing"),
    [
        (False, (HfHubHTTPError, 401), (RepositoryNotFoundError, 401)),
        ("wrong", (HfHubHTTPError, 401), (HfHubHTTPError, 401)),
        ("other", (HfHubHTTPError, 403), (HfHubHTTPError, 403)),
    ],
)
def test_who_may_push(hub: Hub, token: Any, new: tuple[type, int], existing: tuple[type, int]) -> None:
    """A missing repository fails where it is created, an existing one at the first upload."""
    HfApi(token="good").create_repo(ID, repo_type="dataset")
    assert error_of(lambda: numbers().push_to_hub("owner/new", token=token)) == new
    assert error_of(lambda: numbers().push_to_hub(ID, token=token)) == existing
    assert not hub.asked("PUT")
    assert hub.files("dataset", ID).keys() == {".gitattributes"}


def test_wrong_token_reads_nothing(hub: Hub) -> None:
    numbers().push_to_hub(ID, token="good")
    assert load_dataset(ID, token=False, split="train").num_rows == 4
    assert error_of(lambda: HfApi(token="wrong").repo_info(ID, repo_type="dataset")) == (HfHubHTTPError, 401)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="wrong").whoami()
    assert HfApi(token="other").whoami()["name"] == "stranger"


def test_taken_names(hub: Hub) -> None:
    """`exist_ok` finds the repository of another and says nothing: only the first upload does."""
    api, other = HfApi(token="good"), HfApi(token="other")
    api.create_repo(ID, repo_type="dataset")
    assert error_of(lambda: api.create_repo(ID, repo_type="dataset")) == (HfHubHTTPError, 409)
    api.create_repo(ID, repo_type="dataset", exist_ok=True)
    assert error_of(lambda: other.create_repo(ID, repo_type="dataset")) == (HfHubHTTPError, 403)
    assert other.create_repo(ID, repo_type="dataset", exist_ok=True).repo_id == ID
    assert other.create_repo("mine", repo_type="dataset").repo_id == "stranger/mine"


@pytest.mark.parametrize(
    ("method", "path", "status", "tries"),
    [
        ("GET", f"/api/datasets/{ID}$", 500, 1),
        ("POST", "/api/repos/create", 500, 1),
        ("POST", "/preupload/", 500, 6),
        ("POST", "/objects/batch", 500, 6),
        ("PUT", "/lfs/", 500, 6),
        ("PUT", "/lfs/", 503, 6),
        ("PUT", "/lfs/", 429, 6),
        ("PUT", "/lfs/", None, 6),
        ("GET", "/revision/", 500, 1),
        ("GET", "/tree/", 500, 6),
        ("POST", "/validate-yaml", 500, 1),
        ("POST", "/commit/", 500, 1),
        ("POST", "/commit/", 429, 1),
        ("POST", "/commit/", None, 1),
    ],
)
def test_what_clients_retry_when_they_push(
    logged_in: Hub, method: str, path: str, status: int | None, tries: int
) -> None:
    """Uploads and listings are tried six times within 23 seconds; looking, creating, validating, committing once."""
    fault = logged_in.fail(method, path, status, times=100)
    with pytest.raises((HfHubHTTPError, httpx2.RemoteProtocolError, RuntimeError)) as caught:
        numbers().push_to_hub(ID)
    assert (caught.type is RuntimeError) == (method == "PUT")
    assert fault.injected == tries
    assert logged_in.slept == RETRIES[: tries - 1]
    assert not shards(logged_in)


@pytest.mark.parametrize(
    ("headers", "slept"),
    [
        ({}, [1, 2]),
        ({"Retry-After": "0"}, [1, 1]),
        ({"Retry-After": "30"}, [31, 31]),
        ({"ratelimit": '"api";r=0;t=55'}, [56, 56]),
    ],
)
def test_rate_limit_says_how_long(logged_in: Hub, headers: dict[str, str], slept: list[float]) -> None:
    fault = logged_in.fail("PUT", status=429, times=2, headers=headers)
    numbers().push_to_hub(ID)
    assert fault.injected == 2
    assert logged_in.slept == slept


def test_push_that_broke_in_the_middle(logged_in: Hub) -> None:
    """Nothing is visible of it, and the second push sends only what had not arrived."""
    fault = logged_in.fail("PUT", after=2, times=6)
    with pytest.raises(RuntimeError, match="train-00002-of-00004"):
        numbers(8).push_to_hub(ID, num_shards=4)
    assert fault.injected == 6
    assert shards(logged_in) == []
    numbers(8).push_to_hub(ID, num_shards=4)
    arrived = [request.path for request in logged_in.asked("PUT") if request.status == 200]
    assert len(arrived) == len(set(arrived)) == 4
    assert load_dataset(ID, split="train")["n"][:] == list(range(8))


@pytest.mark.parametrize("status", [409, 412])
def test_conflicts_are_not_retried(logged_in: Hub, status: int) -> None:
    """`datasets` 5.2 means to, but looks for the status where `huggingface_hub` 2.4 does not leave it."""
    logged_in.fail("POST", "/commit/", status)
    assert error_of(lambda: numbers().push_to_hub(ID)) == (HfHubHTTPError, status)
    assert shards(logged_in) == []


def test_commit_on_an_old_parent(logged_in: Hub) -> None:
    numbers().push_to_hub(ID)
    api: Any = HfApi()
    old = api.repo_info(ID, repo_type="dataset").sha
    of = {"repo_id": ID, "repo_type": "dataset", "parent_commit": old}
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a", **of)
    assert error_of(lambda: api.upload_file(path_or_fileobj=b"2", path_in_repo="a", **of)) == (HfHubHTTPError, 412)
    assert logged_in.files("dataset", ID)["a"] == b"1"


def test_answer_of_a_commit_is_lost(logged_in: Hub) -> None:
    """The client cannot know, but the data is there; the second push changes nothing."""
    fault = logged_in.fail("POST", "/commit/", None, late=True)
    with pytest.raises(httpx2.RemoteProtocolError):
        numbers().push_to_hub(ID)
    assert fault.injected == 1
    before = logged_in.files("dataset", ID)
    assert load_dataset(ID, split="train").num_rows == 4
    numbers().push_to_hub(ID)
    assert logged_in.files("dataset", ID) == before


def test_hub_out_of_reach(logged_in: Hub) -> None:
    """The client's own error is no OSError; `load_dataset` turns it into the built-in ConnectionError."""
    numbers().push_to_hub(ID)
    logged_in.stop()
    with pytest.raises(httpx2.ConnectError) as caught:
        numbers().push_to_hub(ID)
    assert not isinstance(caught.value, OSError)
    assert logged_in.slept == []
    with pytest.raises(ConnectionError, match="Couldn't reach 'owner/other' on the Hub"):
        load_dataset("owner/other")
    assert logged_in.slept == RETRIES
