"""Benchmarks: commands that measure, print a table and write raw rows. See docs/benchmarks.md."""
