"""How the miniatures are trained: one command each, on CPU or GPU, resumable at any moment."""
