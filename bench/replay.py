"""Replays a recording (`engine.record`): the same events must give the same instructions, byte for byte.

    python -m bench.replay run.jsonl [--model DIRECTORY]

Ends with 1 at the first difference, and shows it.
"""

import argparse
import sys
from pathlib import Path

from engine.model.config import read_config
from engine.recording import Difference, RecordingError, replay
from engine.tokenizer import Tokenizer

SHIPPED = Path(__file__).parent.parent / "app" / "shipped" / "tales"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.replay", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("recording", type=Path)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="the directory that the run served")
    options = parser.parse_args()
    try:
        vocabulary = Tokenizer.load(options.model).vocabulary(read_config(options.model).vocab_size)
        print(f"{replay(options.recording, vocabulary)} events gave the same instructions, byte for byte")
    except (Difference, RecordingError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
