"""`fdd-kernels evaluate`: models side by side on a held-out text."""
