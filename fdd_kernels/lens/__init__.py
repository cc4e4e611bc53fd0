"""The contract between the engine and the kernels: tensors, requests, row statistics, divergences
and distances.
"""
