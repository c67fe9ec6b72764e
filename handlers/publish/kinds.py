"""The kinds of WebUI by name: a room of its own, since asking one takes modules that an idle daemon does without."""

from __future__ import annotations

A1111_KINDS = frozenset({"a1111", "forge"})
LATER_KINDS = frozenset({"sdnext", "comfyui", "sdcpp"})
