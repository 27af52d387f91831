"""The order of forward, backward and weight-gradient tasks of microbatches on each device."""

from daggc.plan.schedule.pipelines import SCHEDULES, gpipe, one_f_one_b, schedule_named
from daggc.plan.schedule.tasks import BACKWARD, FORWARD, WEIGHT_GRAD, Schedule, Task, split_batch

__all__ = [
    "BACKWARD",
    "FORWARD",
    "SCHEDULES",
    "WEIGHT_GRAD",
    "Schedule",
    "Task",
    "gpipe",
    "one_f_one_b",
    "schedule_named",
    "split_batch",
]
