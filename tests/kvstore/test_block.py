"""Block keys: equal when and only when fingerprint, salt and all tokens so far are."""

from hypothesis import given
from hypothesis import strategies as st

from kvstore.block import extend_keys, root_key

TOKENS = st.lists(st.integers(0, 200_000), max_size=40)


def keys(tokens: list[int], salt: str = "", fingerprint: str = "", block_size: int = 4) -> list[bytes]:
    chain: list[bytes] = []
    extend_keys(chain, root_key(fingerprint, salt), tokens, block_size)
    return chain


@given(TOKENS, TOKENS)
def test_chains_agree_exactly_as_far_as_the_tokens_do(first: list[int], second: list[int]) -> None:
    for block, (one, other) in enumerate(zip(keys(first), keys(second), strict=False), 1):
        assert (one == other) == (first[: block * 4] == second[: block * 4])


@given(TOKENS, st.integers(0, 40))
def test_a_chain_grown_in_parts_is_the_chain_grown_at_once(tokens: list[int], cut: int) -> None:
    chain: list[bytes] = []
    for end in (cut, len(tokens)):
        extend_keys(chain, root_key("", ""), tokens[:end], 4)
    assert chain == keys(tokens)


def test_only_full_blocks_have_keys() -> None:
    assert [len(keys(list(range(n)))) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_salt_and_fingerprint_are_not_confused() -> None:
    tokens = [1, 2, 3, 4]
    variants = {keys(tokens, salt, name)[0] for salt in ("", "a", "ab") for name in ("", "a", "ba")}
    assert len(variants) == 9
