"""What torch prints when an export fails: the error that daggc raises says it, and a second attempt may succeed."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

_LOGGERS = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor", "torch._export.non_strict_utils")


@contextmanager
def without_export_reports() -> Iterator[None]:
    """Keep torch's own reports of a failed export from stderr; what else is written to it is kept."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    written, graph = io.StringIO(), ""
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(written):
            yield
    except Exception as wrong:
        graph = str(getattr(wrong, "partial_fx_graph", ""))  # torch prints the graph as far as it got
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        text = written.getvalue()
        sys.stderr.write(text.replace(f"{graph}\n", "") if graph else text)
