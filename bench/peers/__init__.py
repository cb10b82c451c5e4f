"""One program a peer: the same prompts through Sluice, vLLM and two ways of transformers, each in its own process."""
