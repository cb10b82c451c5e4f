"""The matrix of cells: its order, and how prefills are thinned."""

from bench.cells import Cell, Kind, matrix


def test_prefills_come_first_and_both_rise_so_that_contexts_grow_out_of_each_other() -> None:
    cells = matrix([8, 1], [512, 128], prefill_tokens=10**6)
    pairs = [(1, 128), (1, 512), (8, 128), (8, 512)]
    assert cells == [Cell(kind, *pair) for kind in (Kind.PREFILL, Kind.DECODE) for pair in pairs]


def test_what_thinning_makes_alike_is_measured_once_and_decodes_are_never_thinned() -> None:
    cells = matrix([1, 8, 32], [512], prefill_tokens=1024)
    assert [cell.streams for cell in cells if cell.kind is Kind.PREFILL] == [1, 2]
    assert [cell.streams for cell in cells if cell.kind is Kind.DECODE] == [1, 8, 32]


def test_a_prefill_of_one_stream_is_measured_however_long_its_context() -> None:
    assert matrix([4], [4096], prefill_tokens=1024)[0] == Cell(Kind.PREFILL, 1, 4096)


def test_what_is_asked_for_twice_is_measured_once() -> None:
    assert matrix([2, 2], [64, 64], prefill_tokens=1024) == [Cell(kind, 2, 64) for kind in Kind]


def test_tokens_are_those_of_all_prompts() -> None:
    assert Cell(Kind.DECODE, 8, 512).tokens == 4096


def test_a_context_is_shortened_only_when_the_model_ends_before_what_is_generated() -> None:
    cell = Cell(Kind.DECODE, 8, 2048)
    assert cell.within(4096, 64) == cell
    assert cell.within(2048, 64) == Cell(Kind.DECODE, 8, 1984)
    assert cell.within(32, 64).context == 1
