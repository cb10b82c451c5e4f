"""Training of the small demonstration model that ships with the package."""
