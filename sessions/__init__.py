"""The folder tree as people see it: names, specs, captions, manifests. Pure, with no I/O surprises."""

__version__ = "0.1.0"
