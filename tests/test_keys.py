import numpy as np
import pytest

from hf_unlearnable import keys


def test_new_keys_differ_and_are_long() -> None:
    assert len({keys.new_key() for _ in range(100)}) == 100
    assert len(keys.new_key()) == 32


@pytest.mark.parametrize("bad", [True, 1.5, "7", None, [1]])
def test_wrong_type(bad: object) -> None:
    with pytest.raises(TypeError, match="int or 32 bytes"):
        keys.check_key(bad)


@pytest.mark.parametrize("bad", [-1, b"short", b"x" * 33])
def test_wrong_value_is_not_repeated(bad: int | bytes) -> None:
    with pytest.raises(ValueError) as caught:
        keys.check_key(bad)
    assert "short" not in str(caught.value)
    assert "xxx" not in str(caught.value)


def test_numpy_integers_are_seeds() -> None:
    assert keys.subkey(keys.check_key(np.int64(7)), "a") == keys.subkey(7, "a")


def test_contexts_do_not_collide() -> None:
    contexts = [
        ("a", "b"),
        ("ab",),
        ("a", b"b"),
        ("a", 1),
        ("a", "1"),
        (1, "a"),
        ("a", ""),
        ("", "a"),
        ("a", 11),
        ("a", 1, 1),
    ]
    assert len({keys.subkey(7, *context) for context in contexts}) == len(contexts)


def test_an_int_is_not_the_secret_of_its_digits() -> None:
    assert keys.subkey(int.from_bytes(b"0" * 32, "big"), "a") != keys.subkey(b"0" * 32, "a")


def test_generators_repeat_and_differ() -> None:
    a, b, c = (keys.numpy_generator(7, "x", i).random(5) for i in (0, 0, 1))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    assert keys.torch_generator(7, "x").initial_seed() != keys.torch_generator(8, "x").initial_seed()


def test_uniforms_belong_to_the_digest() -> None:
    digests = [bytes([i]) * 16 for i in range(200)]
    ranks = keys.uniforms(7, "a", digests)
    assert np.array_equal(keys.uniforms(7, "a", digests[::-1]), ranks[::-1])
    assert ranks.min() >= 0
    assert ranks.max() < 1
    assert abs(ranks.mean() - 0.5) < 0.1


def test_commitment_binds_secrets_and_shows_no_int() -> None:
    key = keys.new_key()
    assert keys.commitment(key) == keys.commitment(key)
    assert keys.commitment(key) != keys.commitment(keys.new_key())
    assert key.hex() not in (keys.commitment(key) or "")
    assert keys.commitment(7) is None


def test_cache_tag_needs_this_machine(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    tags = []
    for machine in ("a", "b", "a"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        keys._local_salt.cache_clear()
        tags.append(keys.cache_tag(7))
        assert keys.cache_tag(7) == tags[-1]
        assert keys.cache_tag(8) != tags[-1]
    keys._local_salt.cache_clear()
    assert tags[0] == tags[2] != tags[1]


def test_cache_tag_without_a_writable_folder(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keys._local_salt.cache_clear()
    assert keys.cache_tag(7) == keys.cache_tag(7)
    keys._local_salt.cache_clear()


def test_key_files(tmp_path) -> None:
    path = tmp_path / "key"
    key = keys.write_key(path)
    assert keys.read_key(path) == key
    assert path.stat().st_mode & 0o077 == 0
    with pytest.raises(FileExistsError):
        keys.write_key(path)
    assert keys.read_key(path) == key
    path.write_text("abc123 not a key")
    with pytest.raises(ValueError, match="64 hexadecimal") as caught:
        keys.read_key(path)
    assert "abc123" not in str(caught.value)
