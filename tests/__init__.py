"""Promises of Dagrelay, each with tests that try to break it."""
