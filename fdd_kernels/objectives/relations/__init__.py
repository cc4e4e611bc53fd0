"""Objectives of relations between positions: rows of attention, without their matrices."""
