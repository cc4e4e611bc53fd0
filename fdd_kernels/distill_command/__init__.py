"""`fdd-kernels distill`: text into windows, checkpoints into models, a training that survives being killed."""
