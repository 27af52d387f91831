"""From graphs to running code: generated Python over torch, in this process or as Dask tasks."""
