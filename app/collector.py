"""Python's garbage collector, as a server has it: what is loaded is not looked through, and the rest seldom."""

import atexit
import gc

YOUNG = 10_000
"""Objects made and not yet freed, after which the youngest are looked through. A step makes five a row, which are
freed with the next: at Python's 700 they are looked through once or twice a step of 256 rows, in vain, for 5 to 10 % of
its time."""


def spare() -> None:
    """What is loaded by now stays: the garbage collector need not look through it, 0.2 s each time.

    At the end it must: extension modules count what they are not given back as leaked.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, *gc.get_threshold()[1:])
    atexit.register(gc.unfreeze)
