"""One program a peer: the same prompts through Sluice, vLLM and transformers, each in its own process."""
