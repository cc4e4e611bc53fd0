"""Autograd over the backends' operations. Knows requests and statistics, and no objective."""
