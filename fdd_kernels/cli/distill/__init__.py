"""`fdd-kernels distill`: a training that survives being killed."""
