"""The POST of `benchmarks.dispatch` in other frameworks. Runs in an environment of its own."""
