"""README.md: our part between marks, foreign text and metadata kept."""

import pytest

from hf_unlearnable.publishing import pages

FOREIGN = "---\nlicense: mit\ntags:\n- mine\nconfigs:\n- config_name: default\n---\n\n# My words\n\nKept.\n"


def test_a_new_readme_is_our_part_alone() -> None:
    made = pages.put(None, "default", "# Page\n", {"tags": ["a"], "license": "cc0-1.0"})
    assert pages.split(made) == (
        {"tags": ["a"], "license": "cc0-1.0"},
        "\n<!-- hf_unlearnable: default -->\n# Page\n<!-- end of hf_unlearnable: default -->\n",
    )
    assert pages.part_of(made, "default") == "# Page"


def test_foreign_text_and_metadata_are_kept() -> None:
    made = pages.put(FOREIGN, "default", "ours", {"tags": ["mine", "a"], "license": "mit", "pretty_name": "P: x"})
    data, text = pages.split(made)
    assert data == {
        "license": "mit",
        "tags": ["mine", "a"],
        "configs": [{"config_name": "default"}],
        "pretty_name": "P: x",
    }
    assert "# My words\n\nKept." in text
    again = pages.put(made, "default", "other", {"tags": ["a"]})
    assert pages.part_of(again, "default") == "other"
    assert again.replace("other", "ours") == made


def test_another_licence_and_comments_in_words_are_errors() -> None:
    with pytest.raises(ValueError, match="license 'mit', expected 'cc0-1.0'"):
        pages.put(FOREIGN, "default", "ours", {"license": "cc0-1.0"})
    with pytest.raises(ValueError, match="without HTML comments"):
        pages.put(None, "default", "# A <!-- end of hf_unlearnable: default --> title", {})


def test_every_configuration_has_its_part_and_what_follows_stays_behind() -> None:
    made = pages.put(FOREIGN, "default", "first", {})
    made += "\nAfterwards.\n"
    made = pages.put(made, "rate-50", "second", {})
    assert [pages.part_of(made, name) for name in ("default", "rate-50", "rate-5")] == ["first", "second", None]
    assert made.index("first") < made.index("second") < made.index("Afterwards.")
    changed = pages.put(made, "default", "third", {})
    assert [pages.part_of(changed, name) for name in ("default", "rate-50")] == ["third", "second"]


def test_a_scalar_where_a_list_belongs_becomes_its_first_entry() -> None:
    data, _ = pages.split(pages.put("---\ntags: mine\n---\n", "default", "x", {"tags": ["a"]}))
    assert data["tags"] == ["mine", "a"]


def test_unfinished_parts_are_seen() -> None:
    open_ = pages.put(None, "default", f"{pages.UNFINISHED} wait", {})
    assert not pages.finished(open_, "default")
    assert not pages.finished(open_, "other")
    assert pages.finished(pages.put(open_, "default", "done", {}), "default")


@pytest.mark.parametrize("front", ["a: [", "- a\n- b"])
def test_bad_front_matter_is_an_error(front: str) -> None:
    with pytest.raises(ValueError, match=r"README.md: expected"):
        pages.put(f"---\n{front}\n---\n", "default", "x", {})


def test_a_mark_without_its_end_is_an_error() -> None:
    made = pages.put(None, "default", "x", {}).replace("<!-- end of", "<!-- ende of")
    with pytest.raises(ValueError, match="without"):
        pages.put(made, "default", "y", {})


def test_front_matter_ends_where_a_line_begins_with_dashes() -> None:
    own = "---\n# ---------- metadata ----------\nlicense: mit\npretty_name: Shapes ---\n---\n\n# Mine\n"
    assert pages.split(own) == ({"license": "mit", "pretty_name": "Shapes ---"}, "\n# Mine\n")
    assert pages.split("---\n---\ntext") == ({}, "text")
    made = pages.put(own, "default", "ours", {"tags": ["a"]})
    assert pages.split(pages.put(made, "default", "ours", {"tags": ["a"]}))[0]["license"] == "mit"


def test_an_end_that_stands_before_the_beginning_is_not_ours() -> None:
    begin, end = pages._marks("default")
    made = pages.put(f"quoted: `{end}`\n", "default", "ours", {})
    assert pages.part_of(made, "default") == "ours"
    assert begin in made
