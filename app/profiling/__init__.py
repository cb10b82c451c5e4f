"""Making profiles for the simulator: measured on this machine, or from another engine's operator tables."""
