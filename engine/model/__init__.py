"""Models: a Hugging Face directory's config and weights, and one file for each family of layers."""
