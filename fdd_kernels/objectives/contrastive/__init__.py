"""Contrastive objectives: the rows of one side are the columns of the other."""
