"""The distillation objectives: each turns a public call into requests, and row statistics into
terms.
"""
