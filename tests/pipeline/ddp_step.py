"""What processes that train together leave behind, to be compared."""

import os
from pathlib import Path

import torch

from stages.tokenizer.module import TokenizerModule


def keep_weights(folder: Path) -> None:
    """A setup: when training ends, this rank writes its state into ``folder``."""

    def keep(module: TokenizerModule) -> None:
        torch.save(module.state_dict(), folder / f"rank{os.environ.get('LOCAL_RANK', 0)}.pt")

    TokenizerModule.on_train_end = keep  # type: ignore[method-assign]
