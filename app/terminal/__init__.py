"""Beside a running server, through HTTP: `sluice chat | ps`; and `sluice collect-env`."""
