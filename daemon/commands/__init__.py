"""The commands of the command line, a module a family. Each takes the parsed arguments and returns the exit code."""
