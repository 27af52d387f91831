"""Passes: functions from programs to programs, each in a file of its own.

Importing this package registers every pass, so that pipelines know their names.
"""

from daggc.passes import canonicalize, cse, dce, fold, remat, uncheckpoint, vjp

__all__ = ["SIMPLIFY", "canonicalize", "cse", "dce", "fold", "remat", "uncheckpoint", "vjp"]

SIMPLIFY = "fold,canonicalize,cse,dce"  # the pipeline every captured program goes through
