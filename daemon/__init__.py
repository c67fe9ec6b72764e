"""The process: watch, remember, schedule, run, show. It imports no torch and starts in a blink."""
