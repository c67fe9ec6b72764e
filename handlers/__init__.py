"""What happens to a file: crop, caption, train, convert, publish. One package each, run in worker processes."""
