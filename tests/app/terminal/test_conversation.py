"""A conversation by itself: what is asked, forgotten, set, saved and read again."""

from pathlib import Path

import pytest

from app.terminal.conversation import CannotRead, Conversation


def talk() -> Conversation:
    found = Conversation("otter", "be brief", {"temperature": 0.5})
    found.answered("one", "eins")
    found.answered("two", "zwei")
    return found


def test_a_request_has_the_system_text_and_all_that_was_said() -> None:
    body = talk().asking("three")
    assert [(each["role"], each["content"]) for each in body["messages"]] == [
        ("system", "be brief"), ("user", "one"), ("assistant", "eins"), ("user", "two"), ("assistant", "zwei"),
        ("user", "three"),
    ]  # fmt: skip
    assert (body["model"], body["temperature"], body["stream"]) == ("otter", 0.5, True)
    assert len(talk().messages) == 4, "what is not answered is not remembered"


def test_undo_forgets_an_exchange_at_a_time() -> None:
    found = talk()
    assert (found.undo(), found.undo(), found.undo()) == ("two", "one", None)


def test_settings_are_numbers_of_their_kind() -> None:
    found = talk()
    assert found.set("max_tokens = 7") == "max_tokens = 7"
    found.set("temperature=")
    assert found.settings == {"max_tokens": 7}
    for wrong, why in (("max_tokens=1.5", "no int"), ("colour=3", "known: temperature")):
        with pytest.raises(ValueError, match=why):
            found.set(wrong)


def test_a_saved_conversation_goes_on_with_whatever_model_is_there(tmp_path: Path) -> None:
    talk().save(tmp_path / "talk.json")
    found = Conversation("badger")
    found.load(tmp_path / "talk.json")
    assert (found.model, found.system, found.messages) == ("badger", "be brief", talk().messages)


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        '{"system": "", "settings": {}, "messages": [1]}',
        '{"system": "", "settings": {"colour": 1}, "messages": []}',
        '{"system": "", "settings": {}, "messages": [{"role": "user", "content": "alone"}]}',
    ],
)
def test_what_is_no_conversation_changes_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text(text)
    found = talk()
    with pytest.raises(CannotRead):
        found.load(tmp_path / "talk.json")
    assert found == talk()
