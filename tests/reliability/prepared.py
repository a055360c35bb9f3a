"""What every command imports, for the process that commands are forked from. Nothing here may run a backward pass."""

import pipeline.cache
import pipeline.evaluate
import pipeline.train  # noqa: F401
