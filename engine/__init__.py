"""Sequences, the pure core, the step loop and the model runner of one replica."""
