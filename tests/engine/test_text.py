"""Incremental detokenisation and stop strings: what leaves, and when."""

from hypothesis import given
from hypothesis import strategies as st

from engine.text import OutputText, StopStrings, TextState

BYTES = tuple(bytes([value]) for value in range(256))
PIECES = (
    b"",
    b"a",
    b"b",
    b"ab",
    b"ba",
    b"c",
    b"\xe2",
    b"\x82",
    b"\xac",
    b"\xf0\x9f",
    b"\x98\x80",
    b"\xff",
    b"\xe2\x82",
)
STOPS = ("ab", "abb", "ba", "aab", "c", "\u20ac", "bab\u20ac", "b\ufffd", "\ufffd\ufffd")

ids = st.lists(st.integers(0, len(PIECES) - 1), max_size=30)
some_stops = st.lists(st.sampled_from(STOPS), max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """By definition: (end, stop string) of the match that ends first, then of the longest."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return end, max(matches, key=len)
    return None


def run(output: OutputText, tokens: list[int]) -> tuple[list[str], str | None]:
    """The pieces, up to the stop string if one comes, with what `finish` gives otherwise."""
    pieces = []
    for token in tokens:
        piece, stop = output.push(token)
        pieces.append(piece)
        if stop is not None:
            return pieces, stop
    return [*pieces, output.finish()], None


def test_a_code_point_leaves_only_when_its_last_byte_has_come() -> None:
    output = OutputText(BYTES)
    assert [output.push(byte)[0] for byte in "a\u20ac\U0001f600".encode()] == [
        *("a", "", "", "\u20ac"),
        *("", "", "", "\U0001f600"),
    ]
    assert output.finish() == ""


def test_an_incomplete_code_point_at_the_end_becomes_a_replacement_character() -> None:
    output = OutputText(BYTES)
    assert [output.push(0xE2)[0], output.push(0x82)[0], output.finish()] == ["", "", "\ufffd"]


@given(st.binary(max_size=40))
def test_pieces_join_to_the_decode_of_all_bytes(data: bytes) -> None:
    """Whatever the bytes, invalid ones included."""
    pieces, _ = run(OutputText(BYTES), list(data))
    assert "".join(pieces) == data.decode(errors="replace")


@given(ids, some_stops, st.booleans())
def test_text_is_cut_at_the_first_stop_string(tokens: list[int], stops: list[str], include: bool) -> None:
    """The match that ends first wins, then the longest: whatever the tokens' borders are."""
    text = b"".join(PIECES[token] for token in tokens).decode(errors="replace")
    pieces, found = run(OutputText(PIECES, stops, include), tokens)
    expected = first_stop(text, stops)
    if expected is None:
        assert ("".join(pieces), found) == (text, None)
    else:
        end, stop = expected
        assert "".join(pieces) == text[: end if include else end - len(stop)]
        assert found in (stop, None)  # None: the replacement character of the very end completed it


@given(ids, some_stops)
def test_no_piece_holds_part_of_a_stop_string_that_later_completes(
    tokens: list[int], stops: list[str]
) -> None:
    """At every moment what has left is a beginning of the final text."""
    text = b"".join(PIECES[token] for token in tokens).decode(errors="replace")
    expected = first_stop(text, stops)
    final = text if expected is None else text[: expected[0] - len(expected[1])]
    pieces, _ = run(OutputText(PIECES, stops), tokens)
    sent = ""
    for piece in pieces:
        sent += piece
        assert final.startswith(sent)


@given(ids, some_stops)
def test_no_more_is_held_back_than_may_begin_a_stop_string(tokens: list[int], stops: list[str]) -> None:
    """What is held is the longest end of the text that begins a stop string: it never waits without need."""
    output, plain, text = OutputText(PIECES, stops), OutputText(PIECES), ""
    for token in tokens:
        text += plain.push(token)[0]
        _, stop = output.push(token)
        if stop is not None:
            return
        beginnings = [text[at:] for at in range(len(text)) if any(s.startswith(text[at:]) for s in stops)]
        assert output.state.held == max(beginnings, key=len, default="")


@given(ids, some_stops, st.lists(st.booleans(), min_size=30, max_size=30))
def test_a_sequence_goes_on_elsewhere_from_its_state(
    tokens: list[int], stops: list[str], heed: list[bool]
) -> None:
    """An OutputText made anew from the state before every token gives the same pieces."""
    stayed, state = OutputText(PIECES, stops), TextState()
    for token, heeds in zip(tokens, heed, strict=False):
        moved = OutputText(PIECES, stops, state=state)
        piece, stop = stayed.push(token, heeds)
        assert moved.push(token, heeds) == (piece, stop)
        if stop is not None:
            return
        state = moved.state
        assert state == stayed.state
    assert OutputText(PIECES, stops, state=state).finish() == stayed.finish()


@given(ids, some_stops)
def test_stop_strings_not_heeded_let_all_text_through(tokens: list[int], stops: list[str]) -> None:
    output = OutputText(PIECES, stops)
    text = "".join(output.push(token, heed_stops=False)[0] for token in tokens) + output.state.held
    assert text == b"".join(PIECES[token] for token in tokens).decode(errors="replace").removesuffix(
        "\ufffd" if output.state.undecoded else ""
    )


def test_a_stop_string_that_begins_before_stops_are_heeded_still_stops() -> None:
    stops = StopStrings(["abc"])
    assert [stops.push("xab", heed=False), stops.push("c")] == [("x", None), ("", "abc")]


def test_an_unheeded_match_is_held_no_longer_than_needed() -> None:
    """`ab` may still become `abc`; once it cannot, it leaves."""
    stops = StopStrings(["ab", "abc", "bd"])
    assert stops.push("ab", heed=False) == ("", None)
    assert stops.push("d", heed=False) == ("abd", None)


def test_the_match_that_ends_first_wins_over_one_that_begins_first() -> None:
    stops = StopStrings(["abcd", "bc"])
    assert stops.push("abcd") == ("a", "bc")


def test_the_longest_of_matches_that_end_together_wins() -> None:
    assert StopStrings(["c", "bc", "abc"]).push("xabc") == ("x", "abc")


def test_the_stop_string_is_left_in_when_asked() -> None:
    stops = StopStrings(["\n\n"], include_stop_str=True)
    assert [stops.push("a\n"), stops.push("\nb")] == [("a", None), ("\n\n", "\n\n")]


def test_equal_stop_strings_share_their_automaton() -> None:
    """128 choices with 16 long stop strings each cost one automaton, not 128."""
    first, second = (OutputText(BYTES, ("ab", "abb")) for _ in range(2))
    assert first._stops is not None
    assert second._stops is not None
    assert first._stops._root is second._stops._root
    assert first.push(ord("a")) == ("", None)
    assert second.push(ord("b")) == ("b", None)
