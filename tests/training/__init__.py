"""Tests of the training of the shipped demonstration model."""
