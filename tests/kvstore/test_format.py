"""The layouts of records say what they hold, and notice any change. Data values: test_values.py."""

from hypothesis import given
from hypothesis import strategies as st

from kvstore.copies import Place
from kvstore.format import (
    HEADER_BYTES,
    INDEX_BYTES,
    PAGE_HEADER_BYTES,
    About,
    first_page,
    header,
    pack_index,
    unpack_index,
    value_bytes,
    value_pages,
)

KEY = bytes(range(32))
keys = st.binary(min_size=32, max_size=32).filter(any)
u32 = st.integers(0, 2**32 - 1)


@given(st.integers(1, 2**26), st.sampled_from([4096, 16384, 65536]))
def test_a_value_fills_its_pages_and_no_page_is_spare(block_bytes: int, page: int) -> None:
    size = value_bytes(block_bytes, page)
    assert (size + PAGE_HEADER_BYTES) % page == 0
    assert size + PAGE_HEADER_BYTES == value_pages(block_bytes, page) * page
    assert 0 <= size - HEADER_BYTES - block_bytes < page


@given(keys, st.one_of(st.just(b""), keys), u32, u32, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_an_index_value_says_again_what_it_was_told(
    key: bytes, parent: bytes, depth: int, tokens: int, sequence: int, page: int
) -> None:
    place = Place(key, parent=parent, depth=depth, tokens=tokens)
    value = pack_index(place, sequence, page)
    assert unpack_index(key, value, {}) == (place, sequence)
    assert first_page(value) == page


@given(keys, st.integers(0, 8 * (32 + INDEX_BYTES) - 1))
def test_an_index_value_notices_each_flipped_bit_of_it_and_of_its_key(key: bytes, bit: int) -> None:
    both = bytearray(key + pack_index(Place(key, parent=KEY, depth=3, tokens=16), 9, 77))
    both[bit // 8] ^= 1 << bit % 8
    assert unpack_index(bytes(both[:32]), bytes(both[32:]), {}) is None


def test_an_index_value_of_another_size_is_none() -> None:
    assert unpack_index(KEY, pack_index(Place(KEY), 1, 2)[:-1], {}) is None


def test_what_a_store_is_comes_back_and_notices_each_flipped_bit() -> None:
    about = About.of(4096, "model")
    packed = about.pack()
    assert About.unpack(packed) == about
    for bit in range(8 * len(packed)):
        flipped = bytearray(packed)
        flipped[bit // 8] ^= 1 << bit % 8
        assert About.unpack(bytes(flipped)) is None, bit
    assert About.unpack(packed[:-1]) is None


def test_a_store_that_cannot_be_used_says_why() -> None:
    wanted = About.of(4096, "model")
    assert wanted.difference(wanted) == ""
    assert "format is 3" in About(4096, wanted.fingerprint, 3).difference(wanted)
    assert "8,192" in About.of(8192, "model").difference(wanted)
    assert "another model" in About.of(4096, "other").difference(wanted)


def test_layouts_are_those_of_format_2() -> None:
    """Stores on disk have these bytes: who changes them changes the format number too."""
    about = About.of(50, "model")
    digest = "9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4"
    magic = b"SluiceKV".hex()
    assert about.pack().hex() == (
        magic + "02000000" + "00000000" + "3200000000000000" + digest + "92cb46bfdae40cdf"
    )
    assert pack_index(Place(KEY, parent=KEY, depth=1, tokens=2), 3, 4).hex() == (
        KEY.hex() + "01000000" + "02000000" + "0300000000000000" + "0400000000000000" + "7f3a7226c304238a"
    )
    assert header(about, KEY, 16).hex() == (
        magic + "02000000" + "10000000" + "3200000000000000" + KEY.hex() + digest + "00" * 16
    )
