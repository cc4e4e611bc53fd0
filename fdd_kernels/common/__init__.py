"""Helpers that depend on no other part of the package: files, progress, sizes, errors of
commands.
"""
