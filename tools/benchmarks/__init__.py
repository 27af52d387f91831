"""Measurements of daggc beside other ways to do the same."""
