"""Whether an error means that memory ran out. No heavy imports."""

from __future__ import annotations

# CUDA, cuBLAS, cuDNN, Apple and torch's allocator on the CPU say it in their own words.
_WORDS = ("out of memory", "not enough memory", "allocate memory", "status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, CUDA's, or that of torch's allocator on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _WORDS)
