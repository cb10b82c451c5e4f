"""Tests mirror the packages; what they share lives here and in fakes.py."""
