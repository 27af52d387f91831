"""Pictures and tables of programs, plans and runs. Reads programs only; needs neither torch nor dask."""
