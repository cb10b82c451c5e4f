"""Device kernels behind one small protocol: `protocol.py` says what a model needs, one file a device."""
