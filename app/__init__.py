"""The process: configuration, command line, HTTP and the composition root."""
