"""Where KV cache lives: blocks, their keys, and the tiers that hold them."""
