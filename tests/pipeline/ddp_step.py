"""``python -m tests.pipeline.ddp_step FOLDER <command> CONFIG …``: each rank leaves its weights in FOLDER."""

import os
import sys
from pathlib import Path

import torch

from pipeline.__main__ import main
from stages.tokenizer.module import TokenizerModule


def keep(module):
    """Write this rank's state when training ends."""
    torch.save(module.state_dict(), Path(sys.argv[1]) / f"rank{os.environ.get('LOCAL_RANK', 0)}.pt")


if __name__ == "__main__":
    TokenizerModule.on_train_end = keep
    sys.exit(main(sys.argv[2:]))
