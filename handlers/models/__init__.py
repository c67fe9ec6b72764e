"""The models: which there are, where they lie, what a file of them is."""
