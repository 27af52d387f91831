"""Lazy results: Dask collections that compute to what the model, or its pullback, gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dask.base import DaskMethodsMixin
from dask.threaded import get as threaded_get

from daggc.backend.dask_graph import Emission, Found, add_join
from daggc.runtime.dask_executor import new_token
from daggc.runtime.pool import Pool


class Thunk(DaskMethodsMixin):
    """A value not computed yet: ``t.compute()``, ``dask.compute(t, u)``, ``t.persist()``.

    ``t.compute()`` runs each task on the worker that the plan names; ``dask.compute`` leaves the choice to
    Dask, which goes where the parameters are.
    """

    def __init__(self, emission: Emission, key: str, pool: Pool | None, keep: Sequence[Any] = ()) -> None:
        self._emission = emission
        self._key = key
        self._pool = pool
        self._keep = tuple(keep)  # futures the graph refers to, the executor whose program it runs

    @property
    def key(self) -> str:
        return self._key

    @property
    def emission(self) -> Emission:
        """The tasks, for those who build on this thunk."""
        return self._emission

    @property
    def keep(self) -> tuple[Any, ...]:
        return self._keep

    def compute(self, **kwargs: Any) -> Any:
        """The value. Raises what the model's run raises, WorkerLostError if a worker is gone."""
        if self._pool is None or kwargs:
            return super().compute(**kwargs)
        (future,) = self._pool.submit(self._emission, [self._key])
        return self._pool.gather([future])[0]

    def __dask_graph__(self) -> Mapping[str, Any]:
        return self._emission.tasks

    def __dask_keys__(self) -> list[str]:
        return [self._key]

    def __dask_postcompute__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _only, ()

    def __dask_postpersist__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _persisted, (self._key, self._pool, self._keep)

    def __dask_tokenize__(self) -> str:
        return self._key

    @staticmethod
    def __dask_optimize__(graph: Any, keys: Any, **_: Any) -> Any:
        """The plan is the graph: nothing is fused or cut."""
        return graph

    __dask_scheduler__ = staticmethod(threaded_get)

    def __repr__(self) -> str:
        return f"Thunk({self._key})"


def join_thunk(
    emission: Emission,
    found: Sequence[Found],
    assemble: Callable[[list[Any]], Any],
    pool: Pool | None,
    keep: Sequence[Any] = (),
) -> Thunk:
    """A thunk of ``assemble(values)``, over values found in several tasks."""
    key = f"daggc.result-{new_token()}"
    joined = replace(emission, tasks=dict(emission.tasks))
    add_join(joined, key, _Join(assemble), found)
    return Thunk(joined, key, pool, keep)


class _Join:
    """``assemble`` over values picked out of dependencies."""

    def __init__(self, assemble: Callable[[list[Any]], Any]) -> None:
        self.assemble = assemble

    def __call__(self, sources: Sequence[tuple[int, Any]], *dependencies: Any) -> Any:
        values = [dependencies[place] if index is None else dependencies[place][index] for place, index in sources]
        return self.assemble(values)


def _only(results: Sequence[Any]) -> Any:
    return results[0]


def _persisted(
    graph: Mapping[str, Any], key: str, pool: Pool | None, keep: Sequence[Any], *, rename: Any = None
) -> Thunk:
    return Thunk(Emission(tasks=dict(graph)), (rename or {}).get(key, key), None, keep)
