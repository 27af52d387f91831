"""The order of forward, backward and weight-gradient tasks of microbatches on each device."""

from daggc.plan.schedule.check import check_schedule
from daggc.plan.schedule.dag import dag
from daggc.plan.schedule.pipelines import gpipe, interleaved, one_f_one_b
from daggc.plan.schedule.problem import Options
from daggc.plan.schedule.registry import SCHEDULES, SEVERAL_STAGES, SPLIT_BACKWARD, schedule_named, stage_devices
from daggc.plan.schedule.tasks import BACKWARD, FORWARD, PHASES, WEIGHT_GRAD, Schedule, Task, split_batch
from daggc.plan.schedule.zero_bubble import zb_1p, zb_2p, zb_h1, zb_h2, zb_v

__all__ = [
    "BACKWARD",
    "FORWARD",
    "PHASES",
    "SCHEDULES",
    "SEVERAL_STAGES",
    "SPLIT_BACKWARD",
    "WEIGHT_GRAD",
    "Options",
    "Schedule",
    "Task",
    "check_schedule",
    "dag",
    "gpipe",
    "interleaved",
    "one_f_one_b",
    "schedule_named",
    "split_batch",
    "stage_devices",
    "zb_1p",
    "zb_2p",
    "zb_h1",
    "zb_h2",
    "zb_v",
]
