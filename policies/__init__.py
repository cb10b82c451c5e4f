"""Decisions as pure functions over read-only views. Standard library only; imports nothing of ours."""
