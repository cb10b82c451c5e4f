"""`sluice simulate`: traces on the simulated engine, and what came of them."""
