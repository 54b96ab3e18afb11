"""Requests from any language: plain JSON and CloudEvents, read in one place for every door."""
