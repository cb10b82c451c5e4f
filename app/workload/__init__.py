"""Recorded and drawn workloads: loaders, one file a format, and what may be done to a trace. No simulation here."""
