"""Libraries that print while they load say nothing: the worker's log is for what a person can act upon."""

from __future__ import annotations

import diffusers
import transformers


def quiet_libraries() -> None:
    """No progress bars, and errors only, from diffusers and transformers in this process."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
