"""Helpers that know nothing of models or losses: files, progress, sizes, errors of the command
line.
"""
